"""Times single layers, uint8 in -> uint8 out: ours against torch, onnxruntime and OpenVINO, each checked for a right result.

Ours run as a model runs them (torch.ops.probquant.run) with a scale for every image (or row), moments and clip counts; peers with one
scale.
Contestants alternate in one process, pinned. "peak" is the percent of the int8 peak that was probed around that very
measurement; "best peer" is the fastest static int8 contestant that is not ours; ratios below 1 mean that ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from tqdm import tqdm

from common import Skip, add_clock_option, alternate, check_names, describe_run, keep_heap, paired_ratios, pin, print_run, ratio_summary, run_per_thread_count, text_table, use_clock, write_results
from contestants import CONTESTANTS, OURS, STATIC_PEERS, Problem, build
from peak import probe_amx_gmacs, probe_avx2_gmacs, probe_vnni_gmacs
from shapes import FOLDER, read_shapes

PROBABILISTIC, STATIC, DYNAMIC = "probquant probabilistic", "probquant static", "probquant dynamic"
_PAIRS = ((PROBABILISTIC, STATIC), (DYNAMIC, PROBABILISTIC))
PROBES = {"amx": probe_amx_gmacs, "vnni": probe_vnni_gmacs, "avx2": probe_avx2_gmacs}  # what 100 % may be


def measure(shape, threads: int, names: list[str], args, probe) -> tuple[list[dict], dict, float]:
    """(rows of one shape, {"paired": ratios, "skipped": reasons}, the peak in GMAC/s)."""
    problem = Problem(shape, args.gamma, args.granularity, args.zero_point, args.weight_bits)
    runners, skipped = {}, {}
    for name in names:
        try:
            runners[name] = build(name, problem, threads)
        except Skip as reason:
            skipped[name] = str(reason)
    peaks = [probe(threads)]
    calls = {name: runner.call for name, runner in runners.items()}
    samples = alternate(calls, args.rounds, threads, args.turn_ms, on_round=lambda: peaks.append(probe(threads, 0.002)))
    peaks.append(probe(threads))
    paired = {}
    for a, b in _PAIRS:
        if args.pairs and a in calls and b in calls:
            paired[f"{a} / {b}"] = ratio_summary(paired_ratios(calls[a], calls[b], args.pairs))
    peaks.append(probe(threads))
    peak = max(peaks)
    rows = []
    for name, times in samples.items():
        fastest = min(times)
        rows.append(
            {
                "shape": shape.name,
                "threads": threads,
                "contestant": name,
                "us_min": round(fastest, 2),
                "us_median": round(statistics.median(times), 2),
                "percent_of_peak": round(100 * shape.macs / (fastest * 1e3) / peak, 4),
            }
        )
    return rows, {"paired": paired, "skipped": skipped}, peak


def best_peer(rows: list[dict]) -> dict | None:
    return min((row for row in rows if row["contestant"] in STATIC_PEERS), key=lambda row: row["us_min"], default=None)


def report_shape(shape, rows: list[dict], extra: dict, peak: float) -> str:
    peer = best_peer(rows)
    table = [
        [row["contestant"], f"{row['us_min']:.1f}", f"{row['us_median']:.1f}", f"{row['percent_of_peak']:.1f} %", f"{row['us_min'] / peer['us_min']:.2f}" if peer else "-"]
        for row in rows
    ]  # fmt: skip
    threads = rows[0]["threads"] if rows else "?"
    lines = [f"\n{shape.name}  ({shape.macs / 1e6:.1f} MMAC, threads {threads}, peak {peak:.0f} GMAC/s)"]
    lines.append(text_table(["", "us min", "us median", "peak", "/ best peer"], table))
    lines += [f"{name}: median of {r['pairs']} pairs {r['median']:.3f} ({r['quartile1']:.3f} .. {r['quartile3']:.3f})" for name, r in extra["paired"].items()]
    lines += [f"{name} skipped: {reason}" for name, reason in extra["skipped"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/layers.py --json layers.json                    every shape of shapes/performance.csv, one thread
  python benchmarks/layers.py --shapes resnet50 --threads 1 2 --only "3x3"
  python benchmarks/layers.py --contestants probquant --pairs 1000  ours only, paired ratios
contestants: """
        + ", ".join(CONTESTANTS),
    )
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.csv")))
    parser.add_argument("--shapes", default="performance", metavar="FILE", help=f"CSV file, or one of: {known} (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="only shapes whose name contains one of these")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts (default: 1)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="names, or beginnings of names (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--turn-ms", type=float, default=3.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=200, help="alternated pairs for the ratios between ours; 0: none (default: %(default)s)")
    parser.add_argument("--gamma", type=int, default=4, help="gamma of the probabilistic strategy (default: %(default)s)")
    parser.add_argument("--granularity", choices=("tensor", "channel"), default="tensor", help="of the probabilistic strategy")
    parser.add_argument("--zero-point", type=int, help="of the input (default: 0 for convolutions, as behind a ReLU, 110 for linear and first layers)")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=8, help="7: weights in [-63, 63], the most that AVX2 kernels built on saturating int8 products get right (default: %(default)s)")
    parser.add_argument("--malloc", choices=("keep", "system"), default="keep", help="keep: freed memory stays mapped, so that a large output costs no page faults in any contestant (default); system: as malloc does by itself")
    parser.add_argument("--peak", choices=tuple(PROBES), help="what 100 %% is (default: that of the instruction set probquant uses)")
    add_clock_option(parser)
    parser.add_argument("--json", metavar="OUT", help="write rows {shape, threads, contestant, us_min, us_median, percent_of_peak}")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.pairs < 0:
        parser.error("--rounds must be at least 1 and --pairs at least 0")

    names = check_names(args.contestants, list(CONTESTANTS), list(CONTESTANTS), "contestant")
    shapes = [s for s in read_shapes(args.shapes) if not args.only or any(text in s.name for text in args.only)]
    if not shapes:
        raise SystemExit("no shape is left")
    if args.malloc == "keep":
        keep_heap()
    use_clock(args.clock, args.threads)
    if len(args.threads) > 1:
        return run_per_thread_count(__file__, argv, args.threads, args.json, "layers")
    (threads,) = args.threads
    pin(threads)
    torch.set_num_threads(threads)
    run = describe_run()
    print_run(run)
    kind = args.peak or {"amx": "amx", "avx2": "avx2"}.get(run.get("probquant_isa"), "vnni")
    probe = PROBES[kind]
    if not probe(threads) > 0:
        raise SystemExit(f"layers.py measures against the int8 peak of x86-64 CPUs with AVX2 or newer; this one has no {kind}")
    print("int8 peaks, GMAC/s: " + ", ".join(f"{name} {rate:.0f}" for name, one in PROBES.items() if (rate := one(threads)) > 0) + f"; 100 % is {kind}")
    context = {**run, "peak": kind, "gamma": args.gamma, "granularity": args.granularity, "weight_bits": args.weight_bits, "rounds": args.rounds, "malloc": args.malloc, "clock": args.clock, "layers": []}
    rows: list[dict] = []
    with torch.no_grad(), tqdm(total=len(shapes), unit=" layers") as bar:
        for shape in shapes:
            bar.set_description(f"{shape.name}, threads {threads}")
            found, extra, peak = measure(shape, threads, names, args, probe)
            rows += found
            facts = {"shape": shape.name, "threads": threads, "mmacs": shape.macs / 1e6, "count": shape.count, "peak_gmacs": round(peak, 1)}
            context["layers"].append({**facts, **extra})
            bar.write(report_shape(shape, found, extra, peak), file=sys.stdout)
            write_results(args.json, rows, context)  # after every layer: an interrupted run keeps what it has
            bar.update()
    print("\n" + summary(rows, context))


def summary(rows: list[dict], context: dict) -> str:
    """Counts of layers where ours beats the best peer, and the median paired ratios."""
    lines = []
    for ours in OURS:
        ratios = []
        for entry in context["layers"]:
            found = [row for row in rows if (row["shape"], row["threads"]) == (entry["shape"], entry["threads"])]
            mine, peer = next((row for row in found if row["contestant"] == ours), None), best_peer(found)
            if mine and peer:
                ratios.append(mine["us_min"] / peer["us_min"])
        if ratios:
            lines.append(f"{ours}: faster than the best peer on {sum(r < 1 for r in ratios)} of {len(ratios)} layers, median ratio {statistics.median(ratios):.3f}")
    for pair in (f"{a} / {b}" for a, b in _PAIRS):
        medians = [entry["paired"][pair]["median"] for entry in context["layers"] if pair in entry["paired"]]
        if medians:
            lines.append(f"{pair}: median {statistics.median(medians):.3f}, largest {max(medians):.3f} over {len(medians)} layers")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
