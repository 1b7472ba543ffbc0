"""What a call costs beside its arithmetic: microseconds from torch.ops to return, per op, on the smallest inputs.

The first line, an empty Python function, is the clock itself. torch's own relu and add on the same number of bytes are
the yardstick for what torch's dispatcher and allocator cost. Ours write four tensors per call, relu one. "Recorded" is an op's share
of a chain of 32 in one call, as a model runs its layers (probquant/recording.py). "Arguments alone" is the floor of a convolution's call: an
op of the same schema that does nothing (overhead.cpp, left out where there is no C++ compiler), whose four results are made nowhere.

A direct call of conv2d cannot cost less than that floor, whatever it does, and the stable ABI is the smallest part of it: of the floor (perf, torch
2.13) torch's Python binding takes four fifths, 42 % the making of a stack of 22 arguments and 14 % the look for __torch_function__ alone, and
its dispatcher with the boxed conversion 17 %. The same empty op through TORCH_LIBRARY, unboxed, costs .91 of it (5.41 and 5.97 us, alternating, on
a busy machine). So it is recordings that make calls cheap, not another way to register ops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from common import compiled, describe_run, keep_heap, pin, print_run, text_table, write_results
from contestants import recorded_call
from probquant import surrogates
from probquant._ops import Strategy, ops

_CALLS = 200  # in one measurement
_CHAIN = 32  # ops of a recording


def conv2d_floor() -> Callable | None:
    """An op that takes what conv2d takes and gives its first four arguments back."""
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        return None
    here, torch_libraries = Path(__file__).parent, Path(torch.__file__).with_name("lib")
    csrc = here.parent / "csrc"
    library = compiled(here / "overhead.cpp", "-O2", f"-I{csrc / 'include'}", f"-L{torch_libraries}", "-ltorch_cpu", reads=sorted((csrc / "torch").glob("*.h")))
    torch.ops.load_library(library)
    return torch.ops.probquant_floor.conv2d.default


def calls() -> dict[str, Callable[[], object]]:
    """Every op on one image of 4 x 4 pixels and 16 channels, or one row of 64."""
    image = torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last)
    row = torch.randn(1, 64)
    x, r = ops.quantize.default(image), ops.quantize.default(row)
    fixed = torch.tensor([0.05, 128.0])

    def layer(size):
        weight, scale = surrogates.quantize_weight(torch.randn(size))
        law = surrogates.weight_laws(weight.float() * scale.reshape(-1, *[1] * (len(size) - 1)), None, False)
        predictor = torch.cat([torch.tensor([6.0, 6.0, 0.0]), law])
        return weight, scale, predictor

    def ranges(predictor):
        return {
            "static": {"strategy": int(Strategy.FIXED), "predictor": fixed},
            "probabilistic": {"strategy": int(Strategy.GAUSSIAN), "predictor": predictor},
            "dynamic": {"strategy": int(Strategy.DYNAMIC)},
        }

    found: dict[str, Callable[[], object]] = {
        "(nothing)": lambda: None,
        "torch relu": lambda: torch.ops.aten.relu.default(image),
        "torch add": lambda: torch.ops.aten.add.Tensor(image, image),
        "quantize": lambda: ops.quantize.default(image),
        "dequantize": lambda: ops.dequantize.default(*x[:3]),
        "moments": lambda: ops.moments.default(x[0]),
        "max_pool2d": lambda: ops.max_pool2d.default(*x[:3], [2, 2], [2, 2], [0, 0], [1, 1]),
    }
    weight, scale, predictor = layer((16, 64))
    packed = ops.pack_weight.default(weight, scale)
    for name, options in ranges(predictor).items():
        gamma = {"gamma": 4} if name == "probabilistic" else {}
        found[f"linear 1x16x64 {name}"] = lambda o={**options, **gamma}, p=packed: ops.linear.default(*r, p, 16, **o)
    for kernel, groups, text in ((1, 1, "1x1"), (3, 1, "3x3"), (3, 16, "depthwise 3x3")):
        weight, scale, predictor = layer((16, kernel, kernel, 16 // groups))
        packed = ops.pack_weight.default(weight, scale, None, groups)
        geometry = (packed, 16, [kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], groups)
        for name, options in ranges(predictor).items():
            gamma = {"gamma": 4} if name == "probabilistic" else {}
            found[f"conv2d {text} {name}"] = lambda o={**options, **gamma}, g=geometry: ops.conv2d.default(*x, *g, **o)
            found[f"conv2d {text} {name}, recorded"] = recorded_call(ops.conv2d.default, x, geometry, {**options, **gamma}, _CHAIN)
            if kernel == 1 and name == "static" and (floor := conv2d_floor()):
                found["conv2d, arguments alone"] = lambda o=options, g=geometry: floor(*x, *g, **o)
    head = torch.tensor([6.0, 6.0, 0.0])
    for name, options in ranges(head).items():
        found[f"add {name}"] = lambda o=options: ops.add.default(*x, *x, **o)
    for name, options in ranges(None).items():
        found[f"activation {name}"] = lambda o=options: ops.activation.default(*x[:3], 1, **o)
        found[f"concat {name}"] = lambda o=options: ops.concat.default([x[0]] * 2, [x[1]] * 2, [x[2]] * 2, **o)
        found[f"avg_pool2d {name}"] = lambda o=options: ops.avg_pool2d.default(*x[:3], [2, 2], [2, 2], [0, 0], **o)
        found[f"adaptive_avg_pool2d {name}"] = lambda o=options: ops.adaptive_avg_pool2d.default(*x[:3], [1, 1], **o)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="example: python benchmarks/overhead.py --json overhead.json"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help=f"measurements of {_CALLS} calls per op (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write rows {op, threads, us_min, us_median}")
    args = parser.parse_args(argv)
    keep_heap()
    run = describe_run()
    print_run(run)
    pin(args.threads)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        named = calls()
        times: dict[str, list[float]] = {name: [] for name in named}
        for _ in tqdm(range(args.rounds), unit=" rounds", leave=False):
            for name, call in named.items():
                call()
                start = time.perf_counter_ns()
                for _ in range(_CALLS):
                    call()
                ops_in_call = _CHAIN if name.endswith("recorded") else 1
                times[name].append((time.perf_counter_ns() - start) * 1e-3 / _CALLS / ops_in_call)
    rows = [
        {"op": name, "threads": args.threads, "us_min": round(min(values), 3), "us_median": round(statistics.median(values), 3)}
        for name, values in times.items()
    ]
    print("\n" + text_table(["", "us min", "us median"], [[row["op"], f"{row['us_min']:.2f}", f"{row['us_median']:.2f}"] for row in rows]))
    write_results(args.json, rows, run)


if __name__ == "__main__":
    sys.exit(main())
