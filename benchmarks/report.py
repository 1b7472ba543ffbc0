"""Makes pages of the JSON files that the benchmarks wrote: tables, plots, and where ours wins, ties and loses.

Every FILE becomes OUT/<name>.md, those of layers.py and models.py also OUT/<name>-<threads>.svg; those of accuracy.py and
ablations.py become one page, OUT/accuracy.md, and OUT/accuracy-<model>.svg. The circumstances
(machine, versions, date, load) come from the .run.json file beside each. Ratios compare the smallest times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from common import BUSY_LOAD, context_path, markdown_table, write_text

TIE = 0.02  # a ratio to the best peer within 1 +- TIE is a tie
OURS = "probquant probabilistic"
_KINDS = {
    frozenset(("shape", "threads", "contestant", "us_min", "us_median", "percent_of_peak")): "layers",
    frozenset(("model", "batch", "threads", "contestant", "ms_min", "ms_median", "peak_activation_bytes")): "models",
    frozenset(("op", "threads", "us_min", "us_median")): "overhead",
    frozenset(("task", "model", "strategy", "shift", "metric", "value", "float32", "n")): "accuracy",
    frozenset(("ablation", "task", "model", "strategy", "shift", "metric", "value", "float32", "n")): "ablations",
    frozenset(("what", "level", "threads", "value", "unit")): "peak",
}
_COLOURS = {
    "probquant probabilistic": "#c1272d", "probquant static": "#f0a202", "probquant dynamic": "#7b2d8b", "best peer": "#1f6fb2",
    "onnxruntime static": "#1f6fb2", "openvino static": "#3aa17e", "onnxruntime dynamic": "#8db8d9", "torch float32": "#999999",
}  # fmt: skip


def is_static_peer(name: str) -> bool:
    return name.endswith("static") and not name.startswith("probquant")


def circumstances(run: dict, timed: bool = True) -> str:
    if not run:
        return "The circumstances of this run were not recorded.\n"
    names = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"- machine: {run['cpu']} (family/model {run['cpu_family_model']}), {run['cpus']} CPUs, {run['caches']}, {run['system']}",
        f"- versions: {names}" + (f"; probquant runs {run['probquant_isa']}" if "probquant_isa" in run else ""),
        f"- date: {run['date']}" + (f"; load average at the start: {run['load_at_start']}" if timed else ""),
        f"- command: `{run['command']}`" + (f"; clock: {run['clock']}" if "clock" in run else ""),
    ]
    if timed and run["load_at_start"] > BUSY_LOAD:
        lines.append(f"- **the machine was busy (load average above {BUSY_LOAD}): these times are noise**")
    return "\n".join(lines) + "\n"


def verdict(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return "win" if ratio < 1 - TIE else "tie" if ratio <= 1 + TIE else "lose"


def _grouped(rows: list[dict], keys: tuple[str, ...]) -> dict[tuple, dict[str, dict]]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["contestant"]] = row
    return groups


def _best_peer(group: dict[str, dict], value: str) -> dict | None:
    return min((row for name, row in group.items() if is_static_peer(name)), key=lambda row: row[value], default=None)


def _ratio(group: dict[str, dict], a: str, b: str, value: str) -> float | None:
    return group[a][value] / group[b][value] if a in group and b in group else None


def _text(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _contestants(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["contestant"] for row in rows))


def _wins(found: list[tuple[str, float | None]]) -> str:
    """One paragraph per verdict, the layers or models with their ratios."""
    lines = []
    for word, title in (("win", "Wins"), ("tie", "Ties"), ("lose", "Loses")):
        named = [f"{name} ({ratio:.2f})" for name, ratio in found if verdict(ratio) == word]
        lines.append(f"**{title}** ({len(named)}): {', '.join(named) or 'none'}.\n")
    return "\n".join(lines)


def _paired(run: dict, key: str, describe: Callable[[dict], str]) -> str:
    entries = [entry for entry in run.get(key, []) if entry.get("paired")]
    if not entries:
        return ""
    pairs = list(dict.fromkeys(name for entry in entries for name in entry["paired"]))

    def cell(entry, name):
        r = entry["paired"].get(name)
        return f"{r['median']:.3f} ({r['quartile1']:.3f} .. {r['quartile3']:.3f})" if r else "-"

    table = markdown_table(["", *pairs], [[describe(entry), *(cell(entry, name) for name in pairs)] for entry in entries])
    count = max(r["pairs"] for entry in entries for r in entry["paired"].values())
    return f"\n## Alternated pairs\n\nMedian (quartiles) of the ratio of two calls, one directly after the other, {count} pairs.\n\n{table}\n"


def _skipped(run: dict, key: str, describe: Callable[[dict], str]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in run.get(key, []):
        for name, reason in entry.get("skipped", {}).items():
            reasons.setdefault((name, reason), []).append(describe(entry))
    lines = [f"- {name}: {reason} ({', '.join(where[:4])}{f' and {len(where) - 4} more' if len(where) > 4 else ''})" for (name, reason), where in reasons.items()]
    return "\n## Not measured\n\n" + "\n".join(lines) + "\n" if lines else ""


# ----------------------------------------------------------------------------------------------------------------------


def layers_page(rows: list[dict], run: dict, out: Path, stem: str) -> str:
    groups = _grouped(rows, ("shape", "threads"))
    contestants = _contestants(rows)
    page = ["# Layers\n", circumstances(run)]
    page.append(
        f"Times are of one call, uint8 in, uint8 out. Peak: percent of the int8 multiply-accumulate rate ({run.get('peak', 'vnni')}) that was probed around the "
        f"measurement. Best peer: the fastest static int8 contestant that is not probquant. Ours carry a scale per image, moments and clip counts.\n"
    )
    for threads in sorted({key[1] for key in groups}):
        chosen = {shape: group for (shape, t), group in groups.items() if t == threads}
        page.append(f"## {threads} thread{'s' * (threads > 1)}\n")
        found, table = [], []
        for shape, group in chosen.items():
            peer = _best_peer(group, "us_min")
            ours = group.get(OURS)
            ratio = ours["us_min"] / peer["us_min"] if ours and peer else None
            found.append((shape, ratio))
            table.append(
                [
                    shape,
                    _text(ours and ours["us_min"], ".1f"),
                    _text(ours and ours["us_median"], ".1f"),
                    _text(ours and ours["percent_of_peak"], ".1f"),
                    f"{peer['contestant']} {peer['us_min']:.1f}" if peer else "-",
                    _text(ratio),
                    verdict(ratio),
                    _text(_ratio(group, OURS, "probquant static", "us_min"), ".3f"),
                    _text(_ratio(group, "probquant dynamic", OURS, "us_min")),
                    _text(_ratio(group, "onnxruntime dynamic", OURS, "us_min")),
                ]
            )
        page.append(f"{OURS} against the best peer:\n\n{_wins(found)}")
        header = ["shape", "us min", "us median", "% of peak", "best peer, us", "/ best peer", "", "/ own static", "own dynamic /", "ORT dynamic /"]
        page.append(markdown_table(header, table) + "\n")
        page.append("Percent of peak of every contestant:\n")
        table = [[shape, *(_text(group[c]["percent_of_peak"] if c in group else None, ".0f") for c in contestants)] for shape, group in chosen.items()]
        page.append(markdown_table(["shape", *contestants], table) + "\n")
        image = _plot_layers(chosen, out / f"{stem}-{threads}.svg", threads)
        if image:
            page.append(f"![percent of peak]({image})\n")
    if {1, 2} <= {key[1] for key in groups}:
        table = []
        for (shape, threads), group in groups.items():
            one = groups.get((shape, 1), {})
            if threads > 1 and OURS in group and OURS in one:
                table.append([shape, threads, f"{one[OURS]['us_min'] / group[OURS]['us_min']:.2f}"])
        page.append(f"## Speedup by threads, {OURS}\n\n" + markdown_table(["shape", "threads", "speedup"], table) + "\n")

    def describe(entry):
        return f"{entry['shape']}, {entry['threads']} T"

    return "\n".join(page) + _paired(run, "layers", describe) + _skipped(run, "layers", describe)


def models_page(rows: list[dict], run: dict, out: Path, stem: str) -> str:
    groups = _grouped(rows, ("model", "batch", "threads"))
    contestants = _contestants(rows)
    page = ["# Models\n", circumstances(run)]
    page.append("Milliseconds per call, smallest of all calls. Best peer: the fastest static int8 contestant that is not probquant.\n")
    found, table = [], []
    for (model, batch, threads), group in groups.items():
        peer, ours = _best_peer(group, "ms_min"), group.get(OURS)
        ratio = ours["ms_min"] / peer["ms_min"] if ours and peer else None
        found.append((f"{model} b{batch} {threads}T", ratio))
        times = [_text(group[c]["ms_min"] if c in group else None) for c in contestants]
        table.append([model, batch, threads, *times, _text(ratio, ".3f"), verdict(ratio), _text(_ratio(group, OURS, "probquant static", "ms_min"), ".3f")])
    page.append(f"{OURS} against the best peer:\n\n{_wins(found)}")
    page.append(markdown_table(["model", "batch", "threads", *contestants, "/ best peer", "", "/ own static"], table, left=1) + "\n")
    page.append("Peak activation megabytes (what torch's allocator had handed out at once during a forward):\n")
    told = [c for c in contestants if any(row["contestant"] == c and row["peak_activation_bytes"] is not None for row in rows)]
    table, seen = [], set()
    for (model, batch, _), group in groups.items():
        if (model, batch) not in seen:
            seen.add((model, batch))
            sizes = (group[c]["peak_activation_bytes"] if c in group else None for c in told)
            table.append([model, batch, *(_text(None if size is None else size / 1e6) for size in sizes)])
    page.append(markdown_table(["model", "batch", *told], table) + "\n")
    for threads in sorted({key[2] for key in groups}):
        image = _plot_models({k[:2]: g for k, g in groups.items() if k[2] == threads}, out / f"{stem}-{threads}.svg", threads)
        if image:
            page.append(f"![time against the best peer, threads {threads}]({image})\n")

    def describe(entry):
        return f"{entry['model']} b{entry['batch']} {entry['threads']}T"

    return "\n".join(page) + _paired(run, "models", describe) + _skipped(run, "models", describe)


def overhead_page(rows: list[dict], run: dict, out: Path, stem: str) -> str:
    table = [[row["op"], row["threads"], f"{row['us_min']:.2f}", f"{row['us_median']:.2f}"] for row in rows]
    text = "Microseconds from torch.ops to return on the smallest inputs (a 4 x 4 image of 16 channels, a row of 64).\n"
    return "\n".join(["# Call overhead\n", circumstances(run), text, markdown_table(["op", "threads", "us min", "us median"], table)]) + "\n"


def peak_page(rows: list[dict], run: dict, out: Path, stem: str) -> str:
    table = [[f"{row['what']} {row['level']}".strip(), row["threads"], row["value"], row["unit"]] for row in rows]
    return "\n".join(["# What the machine can do\n", circumstances(run), markdown_table(["", "threads", "value", "unit"], table)]) + "\n"


_METRICS = {  # of accuracy.py: title, format, factor
    "top1": ("top-1 %", ".1f", 100), "agreement": ("agreement %", ".1f", 100), "ap": ("AP", ".3f", 1), "ap50": ("AP50", ".3f", 1), "iou": ("IoU", ".3f", 1),
    "sqnr_mean": ("SQNR dB", ".2f", 1), "sqnr_worst1": ("worst 1 %", ".1f", 1),
}  # fmt: skip


_FILE_NAME = str.maketrans("_:./", "----")


def accuracy_page(parts: list[tuple[list[dict], dict]], ablations: list[tuple[list[dict], dict]], out: Path) -> str:
    """One page of several files of accuracy.py, a section for every model, and of ablations.py."""
    page = [
        "# Accuracy\n",
        "Every strategy runs on the same pictures as float32, in the same graph, with the same kernels and the same rounding and correction of weights (gptq, unless told); pictures that calibrate "
        "are not evaluated. Rounding, bias correction, channel profiles and the widths of predicted ranges are fitted on these pictures and on copies with less contrast, darker, brighter and noisier: kinds that "
        "the shifts belong to. Fixed ranges (static) are those of the pictures as they are, as is usual. Profile: with channel profiles, which even a tensor's channels out between the layers that write and read it, as cross-layer equalization does, "
        "by what its values reach and what noise in them is worth. Exact ranges (dynamic) are each picture's; in a transformer's blocks each token's. qat: trained to imitate float32's outputs, without labels. The drop is what float32 has more of the first metric, in points, with its 95 % interval, paired by picture (Agresti and Min for "
        "top-1; a jackknife over 16 groups of pictures for AP; the mean's for IoU, which is that with float32's mask). Agreement: the share of float32's classes. SQNR: of the network's whole output, per picture; "
        "worst 1 %: the mean of the lowest. What prediction itself takes of the time: probabilistic:gaussian over static, whose kernels are the same otherwise (static again is a copy of static: what the measurement makes of nothing); by layer, the column \"/ own static\" of the "
        "[page of layers](layers-amx.md). Shifts: `benchmarks/accuracy.py --help`; severity 3 of 5 unless told. Seeds are fixed: a run repeats itself.\n",
    ]
    sections = [(model, rows, run) for rows, run in parts for model in dict.fromkeys(row["model"] for row in rows)]
    for i, (model, rows, run) in enumerate(sections):
        before = sum(other == model for other, *_ in sections[:i])
        image = out / f"accuracy-{model.translate(_FILE_NAME)}{f'-{before + 1}' if before else ''}.svg"
        page.append(_accuracy_section([row for row in rows if row["model"] == model], run, model, image))
    if ablations:
        page.append(
            "## Ablations\n\nThe paper's, redone. What does not vary is: gaussian surrogate, gamma 0, 64 pictures to calibrate on, widths of least squared error, "
            "no channel profiles. Time: over that of fixed ranges in the same network, one picture, one thread, median of alternated pairs of calls. Predictors: "
            "their bytes over the weights'.\n"
        )
        page += [_ablation_section(rows, run) for rows, run in ablations]
    return "\n".join(page)


_ABLATIONS = {
    "gamma": "Sampling stride gamma", "laws": "One law per layer, or one per output channel", "calibration": "Pictures to calibrate on",
    "criterion": "Squared error or coverage", "rounding": "Rounding of the weights",
    "profiles": "Cross-layer equalization, or channel profiles",
}  # fmt: skip


def _ablation_section(rows: list[dict], run: dict) -> str:
    parts = [circumstances(run)]
    for ablation in dict.fromkeys(row["ablation"] for row in rows):
        chosen = [row for row in rows if row["ablation"] == ablation]
        cells = {(row["strategy"], row["shift"], row["metric"]): row for row in chosen}
        shifts = list(dict.fromkeys(row["shift"] for row in chosen))
        titles = [f"{shift}: {_METRICS[metric][0]}" for shift in shifts for metric in _ABLATION_METRICS]
        table = []
        for setting in dict.fromkeys(row["strategy"] for row in chosen):
            accuracy = [_metric_text(metric, cells[setting, shift, metric]["value"]) for shift in shifts for metric in _ABLATION_METRICS]
            cost = [f"{cells[setting, 'clean', 'time']['value']:.3f}", f"{100 * cells[setting, 'clean', 'predictor_share']['value']:.2f}"]
            table.append([setting, *accuracy, *cost])
        parts.append(f"### {_ABLATIONS[ablation]}\n\n{chosen[0]['model']}, {chosen[0]['n']} pictures.\n")
        parts.append(markdown_table([ablation, *titles, "time", "predictors, %"], table) + "\n")
    return "\n".join(parts)


_ABLATION_METRICS = ("top1", "agreement", "sqnr_mean", "sqnr_worst1")


def _metric_text(metric: str, value: float | None) -> str:
    _, form, factor = _METRICS[metric]
    return "-" if value is None else format(factor * value, form)


def _accuracy_section(rows: list[dict], run: dict, model: str, plot: Path) -> str:
    values = {(row["shift"], row["strategy"], row["metric"]): row for row in rows}
    shifts, strategies = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shift", "strategy"))
    metrics = [metric for metric in _METRICS if any(row["metric"] == metric for row in rows)]
    headline = metrics[0]
    title, form, factor = _METRICS[headline]
    table = []
    for shift in shifts:
        measured = [strategy for strategy in strategies if (shift, strategy, headline) in values]
        reference = values[shift, measured[0], headline]["float32"]
        table.append([f"**{shift}**", "float32", format(factor * reference, form), *["-"] * len(metrics)])
        best = max(values[shift, strategy, headline]["value"] for strategy in measured)
        for strategy in measured:
            cells = []
            for metric in metrics:
                value = values[shift, strategy, metric]["value"]
                text = _metric_text(metric, value)
                cells.append(f"**{text}**" if metric == headline and value == best else text)
            drop, low, high = (100 * values[shift, strategy, name]["value"] for name in ("drop", "drop_low", "drop_high"))
            table.append(["", strategy, cells[0], f"{drop:.1f} ({low:.1f} .. {high:.1f})", *cells[1:]])
    header = ["shift", "strategy", title, "drop, points", *(_METRICS[metric][0] for metric in metrics[1:])]
    calibration = run.get(f"calibration of {model}", "not recorded")
    training = run.get(f"training of {model}")
    if training and any(strategy.startswith("qat") for strategy in strategies):
        calibration += f"; qat: {training}"
    image = _plot_accuracy(values, shifts, strategies, plot)
    parts = [f"## {model}\n", f"{rows[0]['task'].capitalize()}, {rows[0]['n']} pictures; calibrated on {calibration}.\n", circumstances(run, timed=False)]
    times = run.get(f"time of {model}")
    if times:
        told = ", ".join(f"{strategy} {ratio:.3f}" for strategy, ratio in times.items())
        busy = f"; load average {run['load_at_start']}, so to be read with care" if run["load_at_start"] > BUSY_LOAD else ""
        parts += [f"Time over that of fixed ranges (static), one picture, median of alternated pairs of calls: {told}{busy}.\n"]
    shares = run.get(f"predictors of {model}")
    if shares:
        parts += [f"Bytes of the predictors over the weights': {', '.join(f'{strategy} {100 * share:.2g} %' for strategy, share in shares.items())}.\n"]
    parts += [f"What {strategy} chose: {choice}\n" for strategy, choice in run.get(f"choice of {model}", {}).items()]
    parts += [markdown_table(header, table, left=2) + "\n", *_against_exact(values, shifts)]
    return "\n".join([*parts, *([f"![drop by shift and strategy]({image})\n"] if image else [])])


def _against_exact(values: dict[tuple, dict], shifts: list[str]) -> list[str]:
    """How far auto is above or below exact ranges, and exact ranges with profiles: mean SQNR and the worst 1 %, dB."""
    table = []
    for rival in ("dynamic", "dynamic:profile"):
        cells = []
        for shift in shifts:
            pairs = [[values.get((shift, strategy, metric)) for strategy in ("probabilistic", rival)] for metric in ("sqnr_mean", "sqnr_worst1")]
            if all(row is not None for pair in pairs for row in pair):
                cells.append(" / ".join(f"{ours['value'] - theirs['value']:+.2f}" for ours, theirs in pairs))
        if len(cells) == len(shifts):
            table.append([f"probabilistic - {rival}", *cells])
    return ["SQNR over that of exact ranges, mean / worst 1 %, dB:\n", markdown_table(["", *shifts], table, left=1) + "\n"] if table else []


# ----------------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float):
    """A matplotlib figure and axes; None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "probquant", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> str:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path.name


def _plot_layers(groups: dict[str, dict], path: Path, threads: int) -> str | None:
    """Percent of peak: a line per shape, a dot per contestant."""
    made = _figure(9, 0.9 + 0.2 * len(groups))
    if made is None:
        return None
    figure, axes = made
    shapes = list(groups)
    for name, marker in (("best peer", "o"), ("probquant dynamic", "v"), ("probquant static", "s"), (OURS, "D")):
        points = []
        for y, shape in enumerate(shapes):
            row = _best_peer(groups[shape], "us_min") if name == "best peer" else groups[shape].get(name)
            if row:
                points.append((row["percent_of_peak"], y))
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, marker=marker, color=_COLOURS[name], label=name, zorder=3)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="both", color="#dddddd", linewidth=0.5)
    axes.set_xlabel(f"percent of the probed int8 peak, threads {threads}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return _save(figure, path)


def _plot_models(groups: dict[tuple, dict], path: Path, threads: int) -> str | None:
    """Time against the best static peer, a group of bars per model and batch; long bars are cut and labelled."""
    groups = {key: group for key, group in groups.items() if _best_peer(group, "ms_min")}
    made = _figure(9, 3.2) if groups else None
    if made is None:
        return None
    figure, axes = made
    shown = [name for name in _COLOURS if any(name in group for group in groups.values())]
    cut, width = 3.0, 0.85 / len(shown)
    for i, name in enumerate(shown):
        for x, group in enumerate(groups.values()):
            if name in group:
                ratio = group[name]["ms_min"] / _best_peer(group, "ms_min")["ms_min"]
                left = x + (i - (len(shown) - 1) / 2) * width
                axes.bar(left, min(ratio, cut), width, color=_COLOURS[name], label=name if x == 0 else None)
                if ratio > cut:
                    axes.text(left, cut, f"{ratio:.1f}", ha="center", va="bottom", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xticks(range(len(groups)), [f"{model}\nbatch {batch}" for model, batch in groups])
    axes.set_ylabel(f"time / best static peer, threads {threads}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return _save(figure, path)


def _plot_accuracy(values: dict[tuple[str, str, str], dict], shifts: list[str], strategies: list[str], path: Path) -> str | None:
    """The drop and its interval: a group of points per shift, one per strategy."""
    made = _figure(9, 3.2)
    if made is None:
        return None
    figure, axes = made
    width = 0.8 / len(strategies)
    for i, strategy in enumerate(strategies):
        at, drops, below, above = [], [], [], []
        for x, shift in enumerate(shifts):
            if (shift, strategy, "drop") in values:
                drop, low, high = (100 * values[shift, strategy, metric]["value"] for metric in ("drop", "drop_low", "drop_high"))
                at.append(x + (i - (len(strategies) - 1) / 2) * width)
                drops.append(drop)
                below.append(max(drop - low, 0))  # Agresti and Min's interval is not centred on the drop
                above.append(max(high - drop, 0))
        axes.errorbar(at, drops, (below, above), fmt="o", markersize=3, linewidth=0.8, color=f"C{i}", label=strategy)
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set_xticks(range(len(shifts)), shifts)
    axes.set_ylabel("drop against float32, points")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
    return _save(figure, path)


_PAGES = {"layers": layers_page, "models": models_page, "overhead": overhead_page, "peak": peak_page}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/report.py peak.json layers.json models.json overhead.json",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that peak.py, layers.py, models.py, overhead.py, accuracy.py or ablations.py wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the pages (default: benchmarks/results)")
    args = parser.parse_args(argv)
    accuracy: list[tuple[list[dict], dict]] = []
    ablations: list[tuple[list[dict], dict]] = []
    for path in args.files:
        rows = json.loads(path.read_text())
        kind = _KINDS.get(frozenset(rows[0])) if rows else None
        if kind is None:
            raise SystemExit(f"{path.name}: not a result of these benchmarks")
        beside = context_path(path)
        run = json.loads(beside.read_text()) if beside.exists() else {}
        if kind in ("accuracy", "ablations"):
            (accuracy if kind == "accuracy" else ablations).append((rows, run))
            continue
        page = args.out / f"{path.stem}.md"
        write_text(page, _PAGES[kind](rows, run, args.out, path.stem))
        print(page)
    if accuracy or ablations:
        write_text(args.out / "accuracy.md", accuracy_page(accuracy, ablations, args.out))
        print(args.out / "accuracy.md")


if __name__ == "__main__":
    sys.exit(main())
