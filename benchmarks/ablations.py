"""The paper's ablations, redone: what each choice of a predicted range gains and costs, on one classifier.

gamma: the surrogate's sampling stride, against accuracy and time. laws: one law for all weights of a layer against one per output channel.
calibration: how many pictures, beside fixed ranges fitted to the same. criterion: least squared error against coverage (percentile) and
the extremes. rounding: weights to nearest, or gptq. profiles: cross-layer equalization (Nagel et al., arXiv 1906.04721) beside channel profiles
and beside neither: factors of the same channels, chosen by the weights alone. Everything else is as in the first row's: gaussian surrogate,
gamma 0, 64 pictures, least squared error, no channel profiles (which are not the paper's, and would be measured with it).

Rows: those of accuracy.py, whose `strategy` is the setting, with {ablation}; further metrics are `time`, over that of the same network with
fixed ranges (pairs alternated in one process, batch 1, one thread), and `predictor_share`, the predictors' bytes over the weights'.
Pictures beyond --limit serve for calibration where the folder's own do not suffice; none is both. report.py makes tables of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

import probquant
from accuracy import evaluate, parse_shift, predictor_share
from common import describe_run, keep_heap, print_run, text_table, times_over, write_results
from probquant import profiles
from probquant.data import ImageSet
from tasks import Classification, imagenet

quantize_module = importlib.import_module("probquant.quantize")  # `probquant.quantize` is the function

_BASE = {"strategy": "probabilistic", "surrogate": "gaussian", "gamma": 0, "criterion": "mse", "channel_profile": False}
_STATIC = {"strategy": "static", "criterion": "mse"}
_PICTURES = 64  # that calibrate, unless it is their number that varies
_PAIRS = 150  # of alternated calls
_EQUALIZED = "equalized"  # a channel_profile that build() knows, quantize() does not

#: {ablation: {setting: (pictures to calibrate on, options of quantize)}}
ABLATIONS = {
    "gamma": {f"gamma {gamma}": (_PICTURES, {**_BASE, "gamma": gamma}) for gamma in (0, 1, 2, 4, 8, 16)},
    "laws": {
        f"{surrogate}, gamma {gamma}": (_PICTURES, {**_BASE, "surrogate": surrogate, "gamma": gamma})
        for surrogate in ("gaussian", "gaussian_channel")
        for gamma in (0, 4)
    },
    "calibration": {
        f"{name}, {count} pictures": (count, options) for name, options in (("predicted", _BASE), ("fixed", _STATIC)) for count in (8, 16, 64, 256)
    },
    "criterion": {
        "squared error": (_PICTURES, _BASE),
        **{f"coverage {share} %": (_PICTURES, {**_BASE, "criterion": "percentile", "percentile": share}) for share in (99.9, 99.99, 99.999)},
        "extremes": (_PICTURES, {**_BASE, "criterion": "minmax"}),
    },
    "rounding": {
        f"{name}, {how}": (_PICTURES, {**options, "weight_rounding": how})
        for name, options in (("fixed", _STATIC), ("exact", {"strategy": "dynamic"}), ("predicted", _BASE))
        for how in ("nearest", "gptq")
    },
    "profiles": {
        f"{name}, {how}": (_PICTURES, {**options, "channel_profile": given})
        for name, options in (("fixed", _STATIC), ("exact", {"strategy": "dynamic"}))
        for how, given in (("none", False), ("equalized", _EQUALIZED), ("profiles", True))
    },
}


def task_with_pictures(model: str, folder: str, weights: str | None, limit: int) -> Classification:
    """The task on `limit` pictures; what is beyond them joins those that calibrate."""
    task = imagenet(model, folder, weights, None, None, None)
    order = task.evaluation.sample()
    parts = [ImageSet(order.paths[part], order.labels[part], order.source, order.views[part]) for part in (slice(limit), slice(limit, None))]
    calibrating = task.calibration + parts[1] if len(parts[1]) else task.calibration
    return Classification(task.name, task.model, task.preprocessing, calibrating, parts[0], parts[0].labels, task.training)


def weight_factors(component: profiles.Component, *_) -> dict[int, torch.Tensor]:
    """Cross-layer equalization's factor of each variable's channels, in place of what their values reach: the largest weight that writes a
    channel over the largest that reads it, as a square root; behind it both are the same."""
    writes, reads = ({v: torch.zeros(unit.weight.shape[0]) for unit, v in component.producers} for _ in range(2))
    for unit, v in component.producers:
        writes[v] = writes[v].maximum(unit.weight.abs().flatten(1).amax(1))
    for unit in component.consumers:
        weight, segments = unit.weight.abs(), component.tensors[unit.inputs[0]]
        columns = weight.reshape(unit.options.get("groups", 1), -1, weight.shape[-1]).amax(1).flatten()  # of every input channel
        for part, (v, positions) in zip(columns.split([len(reads[v]) * p for v, p in segments]), segments, strict=True):
            reads[v] = reads[v].maximum(part.reshape(-1, positions).amax(1))
    return {v: (writes[v].clamp(min=1e-6) / reads[v].clamp(min=1e-6)).sqrt().double() for v in writes}


@contextlib.contextmanager
def equalization() -> Iterator[None]:
    """quantize() takes channel profiles from weight_factors(), for every tensor that can have one."""
    kept = profiles._ceilings, quantize_module.choose_powers
    profiles._ceilings, quantize_module.choose_powers = weight_factors, lambda components, *_: [(1.0, 0.0)] * len(components)
    try:
        yield
    finally:
        profiles._ceilings, quantize_module.choose_powers = kept


def build(task: Classification, settings: dict[str, tuple[int, dict]]) -> Iterator[tuple[str, probquant.QuantizedModel]]:
    wanted = max(count for count, _ in settings.values())
    if len(task.calibration) < wanted:
        raise ValueError(f"{len(task.calibration)} pictures to calibrate on, want {wanted}")
    pictures = torch.cat([task.normalize(batch) for batch in task.pictures(task.calibration, 32)])[:wanted]
    for setting, (count, options) in tqdm(settings.items(), desc="calibrating", leave=False):
        equalized = options.get("channel_profile") is _EQUALIZED
        with equalization() if equalized else contextlib.nullcontext():
            qmodel = probquant.quantize(task.model, list(pictures[:count].split(8)), progress=False, **(options | ({"channel_profile": True} if equalized else {})))
        yield setting, qmodel


def times(task: Classification, models: dict[str, probquant.QuantizedModel], fixed: probquant.QuantizedModel) -> dict[str, float]:
    """Each model's time over that of fixed ranges, one picture: the median of alternated pairs of calls."""
    x = task.normalize(next(task.pictures(task.evaluation, 1)))
    with torch.no_grad():
        return times_over(models, fixed, x, _PAIRS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/ablations.py --imagenet DIR --json ablations.json",
    )
    parser.add_argument("--imagenet", required=True, metavar="DIR", help="pictures in folders by WordNet id, or `calibration` and `validation` of them")
    parser.add_argument("--model", default="efficientnet-lite0", help="as accuracy.py's --models (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="of the model")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help="default: all")
    parser.add_argument("--shifts", nargs="+", default=["clean", "dark"], metavar="SHIFT", help="default: clean dark")
    parser.add_argument("--limit", type=int, default=300, metavar="N", help="evaluate so many pictures (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()
    run = describe_run()
    print_run(run)
    rows: list[dict] = []
    try:
        for shift in args.shifts:
            parse_shift(shift)
        task = task_with_pictures(args.model, args.imagenet, args.weights, args.limit)
        for ablation in args.ablations:
            models = dict(build(task, ABLATIONS[ablation]))
            fixed = dict(build(task, {"": (_PICTURES, _STATIC)}))[""]
            new = [row for shift in args.shifts for row in evaluate(task, models, shift, 8)]
            told = {"time": times(task, models, fixed), "predictor_share": {name: predictor_share(model) for name, model in models.items()}}
            for metric, values in told.items():
                new += [{**new[0], "strategy": name, "shift": "clean", "metric": metric, "value": round(value, 5), "float32": None} for name, value in values.items()]
            rows += [{"ablation": ablation, **row} for row in new]
            write_results(args.json, rows, run)
            print(f"\n{ablation}\n{_table(new)}", flush=True)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SystemExit(f"ablations.py: error: {error}") from error


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys((row["shift"], row["metric"]) for row in rows if not row["metric"].startswith("drop_")))
    cells = {(row["strategy"], row["shift"], row["metric"]): row["value"] for row in rows}
    lines = [[name, *(f"{cells[name, *column]:.4g}" for column in columns)] for name in dict.fromkeys(row["strategy"] for row in rows)]
    return text_table(["setting", *(f"{shift} {metric}" for shift, metric in columns)], lines, left=1)


if __name__ == "__main__":
    sys.exit(main())
