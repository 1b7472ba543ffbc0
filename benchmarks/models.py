"""Times whole networks, float32 images in -> float32 logits out: ours against onnxruntime, OpenVINO and torch.

Random weights (networks.py), each network calibrated on the same noise images by everyone. Contestants alternate in one
process, pinned. Times are milliseconds per call (not per image). Peak activation bytes are what torch's allocator had handed
out at once (probquant.compare); other runtimes do not tell theirs. Ratios below 1 mean that ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import probquant
from common import Skip, add_clock_option, alternate, check_names, describe_run, keep_heap, paired_ratios, pin, print_run, ratio_summary, run_per_thread_count, text_table, use_clock, versions, write_results
from contestants import _require, openvino_precisions, openvino_settings
from networks import NETWORKS, noise_images
from probquant.compare import peak_activation_bytes, sqnr

PROBABILISTIC, STATIC, DYNAMIC = "probquant probabilistic", "probquant static", "probquant dynamic"
_PAIRS = ((PROBABILISTIC, STATIC), (DYNAMIC, PROBABILISTIC))
_CALIBRATION_IMAGES = 16
_LEAST_SQNR = 3.0  # dB; a network with random weights amplifies noise, a wrong one has none of the signal


@dataclass
class Network:
    """One network with everything that is made of it once."""

    name: str
    model: nn.Module
    calibration: list[Tensor]
    cache: Path
    gamma: int
    quantized: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def is_transformer(self) -> bool:
        return self.name.startswith("vit")

    def ours(self, strategy: str) -> nn.Module:
        if strategy not in self.quantized:
            options = {"surrogate": "gaussian", "gamma": self.gamma, "weight_rounding": "nearest"}  # how weights are rounded takes no time
            self.quantized[strategy] = probquant.quantize(self.model, self.calibration, strategy=strategy, progress=False, **options)
        return self.quantized[strategy]


@dataclass
class Runner:
    """call: what is timed. output: logits of the last call. module: what runs, if it is a torch module."""

    call: Callable[[], object]
    output: Callable[[], Tensor]
    module: nn.Module | None = None


def _torch_runner(module: nn.Module, x: Tensor, report: nn.Module | None = None) -> Runner:
    return Runner(lambda: module(x), lambda: module(x), report)


def probquant_model(network: Network, x: Tensor, threads: int, strategy: str) -> Runner:
    module = network.ours(strategy)
    return _torch_runner(module, x, module)


def probquant_compiled(network: Network, x: Tensor, threads: int) -> Runner:
    return _torch_runner(torch.compile(network.ours("probabilistic").recorded(x), fullgraph=True), x)


def torch_eager(network: Network, x: Tensor, threads: int) -> Runner:
    return _torch_runner(network.model, x, network.model)


def torch_compiled(network: Network, x: Tensor, threads: int) -> Runner:
    import torch._inductor.config as inductor

    compiled = torch.compile(network.model)
    with inductor.patch(freezing=True):
        compiled(x)
    return _torch_runner(compiled, x)


def torch_pt2e(network: Network, x: Tensor, threads: int) -> Runner:
    """Static int8 by torch's PT2E flow, for the oneDNN kernels that inductor calls."""
    _require("torchao")
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer, get_default_x86_inductor_quantization_config

    exported = torch.export.export(network.model, (x,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for start in range(0, _CALIBRATION_IMAGES, len(x)):
        prepared(torch.cat(network.calibration)[start : start + len(x)])
    compiled = torch.compile(convert_pt2e(prepared))
    with inductor.patch(freezing=True):
        compiled(x)
    return _torch_runner(compiled, x)


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


def onnx_file(network: Network, batch: int, kind: str) -> Path:
    """The network at one batch size as an ONNX file, exported and quantized once: kind is float32, static or dynamic."""
    _require("onnx")
    _require("onnxruntime")
    source = Path(__file__).with_name("networks.py").read_bytes() + Path(__file__).read_bytes() + repr(versions()).encode()
    key = hashlib.sha256(source).hexdigest()[:12]
    path = network.cache / f"{network.name}-b{batch}-{kind}-{key}.onnx"
    if path.exists():
        return path
    network.cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{os.getpid()}.{path.name}")
    if kind == "float32":
        _require("onnxscript")
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with _quiet():
            raw = temporary.with_suffix(".raw")
            program = torch.onnx.export(network.model, (noise_images(batch),), dynamo=True, opset_version=18, input_names=["x"], output_names=["y"])
            program.save(str(raw), external_data=False)
            quant_pre_process(str(raw), str(temporary))
            raw.unlink()
    else:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

        float_path = str(onnx_file(network, batch, "float32"))
        images = torch.cat(network.calibration)

        class Reader(CalibrationDataReader):
            def __init__(self):
                self.batches = iter(images.split(batch))

            def get_next(self):
                part = next(self.batches, None)
                return None if part is None or len(part) < batch else {"x": part.numpy()}

        # A transformer's other nodes stay float32: quantizing them breaks the fusion of GELU and LayerNorm and makes it slower.
        ops = ["Conv", "MatMul", "Gemm"] if network.is_transformer else None
        with _quiet():
            if kind == "static":
                quantize_static(
                    float_path, str(temporary), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=ops, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
                )  # fmt: skip
            else:  # ConvInteger has no int8 weights
                weights = QuantType.QInt8 if network.is_transformer else QuantType.QUInt8
                dynamic_ops = ["MatMul", "Gemm"] if network.is_transformer else ["Conv", "MatMul", "Gemm"]
                quantize_dynamic(float_path, str(temporary), op_types_to_quantize=dynamic_ops, per_channel=network.is_transformer, weight_type=weights)
    os.replace(temporary, path)
    return path


@contextlib.contextmanager
def _quiet():
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def onnxruntime_model(network: Network, x: Tensor, threads: int, kind: str) -> Runner:
    path = onnx_file(network, len(x), kind)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return Runner(lambda: session.run(None, feed), lambda: torch.from_numpy(session.run(None, feed)[0]))


def openvino_model(network: Network, x: Tensor, threads: int) -> Runner:
    """The same quantized ONNX file that onnxruntime gets."""
    _require("openvino")
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(onnx_file(network, len(x), "static"))), "CPU", openvino_settings(threads))
    precisions = [precision for _, precision in openvino_precisions(compiled)]
    share = sum(precision in ("u8", "i8") for precision in precisions) / max(1, len(precisions))
    if share < 0.5:
        raise Skip(f"OpenVINO runs only {100 * share:.0f} % of the layers in int8")
    request = compiled.create_infer_request()
    data = x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(data, shared_memory=True))
    call = request.infer
    return Runner(lambda: call(), lambda: (call(), torch.from_numpy(request.get_output_tensor().data.copy()))[1])


#: name -> builder(network, images, threads)
CONTESTANTS: dict[str, Callable[[Network, Tensor, int], Runner]] = {
    STATIC: lambda n, x, t: probquant_model(n, x, t, "static"),
    PROBABILISTIC: lambda n, x, t: probquant_model(n, x, t, "probabilistic"),
    DYNAMIC: lambda n, x, t: probquant_model(n, x, t, "dynamic"),
    "onnxruntime static": lambda n, x, t: onnxruntime_model(n, x, t, "static"),
    "onnxruntime dynamic": lambda n, x, t: onnxruntime_model(n, x, t, "dynamic"),
    "openvino static": openvino_model,
    "torch float32": torch_eager,
    "onnxruntime float32": lambda n, x, t: onnxruntime_model(n, x, t, "float32"),
    "torch float32 compiled": torch_compiled,
    "torch PT2E static": torch_pt2e,
    "probquant compiled": probquant_compiled,
}
DEFAULT = tuple(CONTESTANTS)[:7]
STATIC_PEERS = ("onnxruntime static", "openvino static", "torch PT2E static")


def measure(network: Network, batch: int, threads: int, names: list[str], args) -> tuple[list[dict], dict]:
    """(rows of one network, batch and thread count, {"paired", "skipped", "sqnr"})."""
    torch._dynamo.reset()  # what was compiled for another batch; not later, which would have contestants of this one recompile
    x = noise_images(batch, seed=1)
    if not network.is_transformer:
        x = x.to(memory_format=torch.channels_last)
    expected = network.model(x)
    runners, skipped, quality, memory = {}, {}, {}, {}
    for name in names:
        try:
            runner = CONTESTANTS[name](network, x, threads)
            output = runner.output()
            quality[name] = round(float(sqnr(expected, output.clone()).mean()), 1)
            if not quality[name] >= _LEAST_SQNR:
                raise Skip(f"wrong result: SQNR {quality[name]} dB against the float32 network")
            if runner.module is not None:
                memory[name] = peak_activation_bytes(runner.module, x)
            runners[name] = runner
        except Skip as reason:
            skipped[name] = str(reason)
        except Exception as error:
            first = str(error).strip().splitlines()
            skipped[name] = f"{type(error).__name__}: {first[0][:200] if first else ''}"
    calls = {name: runner.call for name, runner in runners.items()}
    samples = alternate(calls, args.rounds, threads, args.turn_ms)
    paired = {}
    for a, b in _PAIRS:
        if args.pairs and a in calls and b in calls:
            paired[f"{a} / {b}"] = ratio_summary(paired_ratios(calls[a], calls[b], args.pairs))
    rows = [
        {
            "model": network.name,
            "batch": batch,
            "threads": threads,
            "contestant": name,
            "ms_min": round(min(times) * 1e-3, 3),
            "ms_median": round(statistics.median(times) * 1e-3, 3),
            "peak_activation_bytes": memory.get(name),
        }
        for name, times in samples.items()
    ]
    return rows, {"paired": paired, "skipped": skipped, "sqnr_db": quality}


def best_peer(rows: list[dict]) -> dict | None:
    return min((row for row in rows if row["contestant"] in STATIC_PEERS), key=lambda row: row["ms_min"], default=None)


def report(title: str, rows: list[dict], extra: dict) -> str:
    peer = best_peer(rows)
    table = [
        [
            row["contestant"],
            f"{row['ms_min']:.2f}",
            f"{row['ms_median']:.2f}",
            f"{row['ms_min'] / peer['ms_min']:.3f}" if peer else "-",
            "-" if row["peak_activation_bytes"] is None else f"{row['peak_activation_bytes'] / 1e6:.2f}",
            f"{extra['sqnr_db'][row['contestant']]:.1f}",
        ]
        for row in rows
    ]
    lines = [f"\n{title}", text_table(["", "ms min", "ms median", "/ best peer", "peak MB", "SQNR dB"], table)]
    lines += [f"{name}: median of {r['pairs']} pairs {r['median']:.3f} ({r['quartile1']:.3f} .. {r['quartile3']:.3f})" for name, r in extra["paired"].items()]
    lines += [f"{name} skipped: {reason}" for name, reason in extra["skipped"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/models.py --json models.json                     every network, batch 1 and 8, one thread
  python benchmarks/models.py --models resnet50 --batch 8 --threads 1 2
  python benchmarks/models.py --contestants probquant onnxruntime "torch PT2E"
contestants (the default is the first seven): """
        + ", ".join(CONTESTANTS),
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probquant-benchmarks" / "onnx"
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {', '.join(NETWORKS)} (default: all)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="names, or beginnings of names")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts (default: 1)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--turn-ms", type=float, default=50.0, help="length of a turn, at least one call (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=50, help="alternated pairs for the ratios between ours; 0: none (default: %(default)s)")
    parser.add_argument("--gamma", type=int, default=4, help="gamma of the probabilistic strategy (default: %(default)s)")
    parser.add_argument("--malloc", choices=("system", "keep"), default="system", help="keep: freed memory stays mapped (as in layers.py); default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="where exported ONNX files are kept (default: the user's cache folder)")
    add_clock_option(parser)
    parser.add_argument("--json", metavar="OUT", help="write rows {model, batch, threads, contestant, ms_min, ms_median, peak_activation_bytes}")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.pairs < 0 or min(args.batch) < 1:
        parser.error("--rounds and --batch must be at least 1, --pairs at least 0")
    models = check_names(args.models, list(NETWORKS), list(NETWORKS), "model")
    names = check_names(args.contestants, list(CONTESTANTS), DEFAULT, "contestant")
    if args.malloc == "keep":
        keep_heap()
    use_clock(args.clock, args.threads)
    if len(args.threads) > 1:
        return run_per_thread_count(__file__, argv, args.threads, args.json, "models")
    (threads,) = args.threads
    pin(threads)
    torch.set_num_threads(threads)
    run = describe_run()
    print_run(run)
    context = {**run, "gamma": args.gamma, "rounds": args.rounds, "malloc": args.malloc, "clock": args.clock, "models": []}
    rows: list[dict] = []
    with torch.no_grad(), tqdm(total=len(models) * len(args.batch), unit=" runs") as bar:
        for name in models:
            bar.set_description(f"{name}: preparing")
            try:
                network = Network(name, NETWORKS[name](), [noise_images(_CALIBRATION_IMAGES)], args.cache, args.gamma)
            except ModuleNotFoundError as error:
                bar.write(f"\n{name} skipped: {error}", file=sys.stdout)
                bar.update(len(args.batch))
                continue
            if not network.is_transformer:
                network.model.to(memory_format=torch.channels_last)
            for batch in args.batch:
                title = f"{name}, batch {batch}, threads {threads}"
                bar.set_description(title)
                found, extra = measure(network, batch, threads, names, args)
                rows += found
                context["models"].append({"model": name, "batch": batch, "threads": threads, **extra})
                bar.write(report(title, found, extra), file=sys.stdout)
                write_results(args.json, rows, context)
                bar.update()


if __name__ == "__main__":
    sys.exit(main())
