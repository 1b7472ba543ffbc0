"""Fits the constants of probquant/choice.py: what each way to a range costs beyond a fixed range, in nanoseconds.

Every shape's layer runs under every strategy, alternated and pinned; the excess over the fixed range is fitted by non-negative least squares to
the counts that a strategy's work depends on. Paste what it prints into COSTS. The page of layers tells whether a strategy is fast; this only
lets auto compare them.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from scipy.optimize import nnls
from tqdm import tqdm

from common import alternate, describe_run, keep_heap, pin, print_run, text_table, write_results
from contestants import Problem
from probquant import Strategy, ops, surrogates
from shapes import read_shapes

COUNTS = ("call", "output", "input", "out_channel", "in_channel", "mac")
# What may enter each strategy's cost. `channel stats`: what the layer that writes them pays, in terms of the one that reads them.
DEPENDS = {
    "gaussian": ("call",),
    "gaussian_channel": ("call", "out_channel"),
    "channel": ("call", "in_channel"),
    "patch sums": ("call", "input"),
    "probe": ("call", "output", "out_channel", "mac"),
    "dynamic": ("call", "output", "out_channel", "mac"),
    "channel stats": ("call", "input", "in_channel"),
}
_WEIGHT_NS = 2000.0  # errors of small costs count relative to this


def counts(shape) -> dict[str, float]:
    outputs = shape.batch * shape.out_height * shape.out_width * shape.out_channels
    inputs = shape.batch * shape.height * shape.width * shape.in_channels
    return dict(zip(COUNTS, (1, outputs, inputs, shape.out_channels, shape.in_channels, shape.macs)))


def measure(shape, rounds: int, turn_ms: float) -> dict[str, float]:
    """Median microseconds of a convolution by what its range comes from."""
    p, s = Problem(shape), shape
    weight = p.weight.permute(0, 2, 3, 1).contiguous()
    packed, real = ops.pack_weight(weight, p.weight_scale, p.bias, s.groups), weight * p.weight_scale.reshape(-1, 1, 1, 1)
    x, x_channels = (ops.quantize(p.float_input(), channel_stats=stats) for stats in (False, True))
    head = torch.tensor([4.0, 4.0, 0.0])
    gaussian = torch.cat([head, surrogates.weight_laws(real, p.bias, False)])
    fixed = surrogates.static_predictor(-3.0 if p.bounds[0] is None else p.bounds[0], 6.0 if p.bounds[1] is None else p.bounds[1])
    bounds = {name: bound for name, bound in zip(("activation_min", "activation_max"), p.bounds) if bound is not None}

    def call(strategy: Strategy, predictor=None, codes=x, **options):
        geometry = ([s.kernel] * 2, [s.stride] * 2, [s.padding] * 2, [1, 1], s.groups)
        return lambda: ops.conv2d(*codes, packed, s.out_channels, *geometry, strategy=int(strategy), predictor=predictor, **bounds, **options)

    calls = {
        "fixed": call(Strategy.FIXED, fixed),
        "gaussian": call(Strategy.GAUSSIAN, gaussian),
        "gaussian_channel": call(Strategy.GAUSSIAN_CHANNEL, torch.cat([head, surrogates.weight_laws(real, p.bias, True)])),
        "channel": call(Strategy.CHANNEL, torch.cat([head, surrogates.channel_laws(real, p.bias, s.groups, 1.0, 1.0)]), x_channels),
        "patch sums": call(Strategy.GAUSSIAN, gaussian, gamma=4),
        "probe": call(Strategy.PROBE, torch.tensor([0.1, 0.1])),
        "dynamic": call(Strategy.DYNAMIC),
        "channel stats": call(Strategy.FIXED, fixed, channel_stats=True),
    }
    return {name: statistics.median(times) for name, times in alternate(calls, rounds, 1, turn_ms).items()}


def fit(rows: list[dict], name: str) -> dict[str, float]:
    """Nanoseconds of each count that the strategy depends on."""
    excess = torch.tensor([(row[name] - row["fixed"]) * 1e3 for row in rows], dtype=torch.float64)  # below 0, too: noise is as often
    matrix = torch.tensor([[row["counts"][count] for count in DEPENDS[name]] for row in rows], dtype=torch.float64)
    if name == "channel stats":  # measured on the layer that writes them: its outputs are the reader's inputs
        written = {"call": "call", "input": "output", "in_channel": "out_channel"}
        matrix = torch.tensor([[row["counts"][written[count]] for count in DEPENDS[name]] for row in rows], dtype=torch.float64)
    weight = (excess.clamp(min=0) + _WEIGHT_NS).rsqrt()
    found, _ = nnls((matrix * weight[:, None]).numpy(), (excess * weight).numpy())
    return dict(zip(DEPENDS[name], found.tolist()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["mobilenet_v2", "resnet50"], metavar="FILE", help="CSV files, or names of those in shapes/ (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each strategy (default: %(default)s)")
    parser.add_argument("--turn-ms", type=float, default=1.5, help="length of a turn (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write the times")
    args = parser.parse_args(argv)
    keep_heap()
    pin(1)
    torch.set_num_threads(1)
    run = describe_run()
    print_run(run)
    rows = []
    with torch.no_grad():
        for shape in tqdm([s for name in args.shapes for s in read_shapes(name) if s.op == "conv2d"], unit=" layers"):
            rows.append({"shape": shape.name, "counts": counts(shape), **measure(shape, args.rounds, args.turn_ms)})
            write_results(args.json, rows, run)
    print(text_table(["us beyond fixed", "fixed", *DEPENDS], [[r["shape"], f"{r['fixed']:.1f}", *(f"{r[name] - r['fixed']:+.1f}" for name in DEPENDS)] for r in rows]))
    for name in DEPENDS:
        print(f"{name}: Cost({', '.join(f'{count}={value:.3g}' for count, value in fit(rows, name).items() if value > 0)})")


if __name__ == "__main__":
    sys.exit(main())
