"""The HTML page of a comparison: one file, plots inlined as SVG images, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .compare import FLOAT32, Comparison, cells, layer_cells, percent

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

_COLOURS = {FLOAT32: "#6b7280", "static": "#d97706", "dynamic": "#2563eb", "probabilistic": "#059669"}
_OTHER_COLOURS = ("#9333ea", "#db2777", "#0891b2", "#65a30d", "#b91c1c")
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; background: #f9fafb; margin: 0; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 8px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p, figcaption { max-width: 80ch; margin: 6px 0; color: #374151; }
.card { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; padding: 12px 16px; overflow-x: auto; }
figure { margin: 0 0 16px; } figure img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #d1d5db; } td { border-bottom: 1px solid #f3f4f6; }
th.name, td.name { text-align: left; } details table { font-size: 13px; } details th, details td { padding: 4px 7px; }
tr.over th { border: 0; text-align: center; }
tr.group td { border-top: 2px solid #d1d5db; }
td .dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
td.best { font-weight: 700; } details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; }
"""


def page(comparison: Comparison, title: str, about: Sequence[str], sensitivity: Sensitivity | None = None) -> str:
    """The page as HTML text, with a section on the layers' sensitivity if that is given. ModuleNotFoundError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the HTML report needs matplotlib: pip install 'probquant[demo]'") from error

    strategies = list(dict.fromkeys(row["strategy"] for row in comparison.rows))
    shifts = list(dict.fromkeys(row["shift"] for row in comparison.rows))
    others = iter(_OTHER_COLOURS * len(strategies))
    colours = {name: _COLOURS.get(name) or next(others) for name in strategies}
    setup = comparison.setup
    clean, *shifted = (_layers(comparison, shift, strategies[1:], colours) for shift in shifts)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in about),
        "<h2>Results</h2>",
        _results(comparison, colours),
        f"<p>Top-1 against the labels, agreement with float32's class. SQNR: signal to quantization noise ratio of the "
        f"network's output per image, in dB; worst 1 %: mean of the worst hundredth of the images (at least one). "
        f"Clipped: share of the values written by int8 layers that saturated, on {setup['layer_images']} images. "
        f"Latency: median of {setup['rounds']} alternated rounds, and peak memory of one forward's activations, both "
        f"at batch {setup['batch']} with {setup['threads']} thread{'s' * (setup['threads'] != 1)}.</p>",
        "<h2>Accuracy, latency, memory</h2>",
        _figure(_bars(comparison, strategies, shifts, colours), "Latency and memory do not depend on the shift."),
        "<h2>SQNR of the output</h2>",
        _figure(_distributions(comparison, strategies[1:], shifts, colours), "A point per image; the bar is the mean."),
        "<h2>SQNR per layer</h2>",
        clean,
        *(
            f"<details><summary>{html.escape(shift)} images</summary>{text}</details>"
            for shift, text in zip(shifts[1:], shifted)
        ),
        *(_sensitivity(sensitivity) if sensitivity else ()),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _results(comparison: Comparison, colours: dict[str, str]) -> str:
    names = ("shift", "strategy")
    header = [*names, "top-1", "agreement", "SQNR mean", "worst 1 %", "clipped", "ms / image", "min ms", "peak MiB"]
    lines, shift = [_header(header, len(names))], None
    for row in comparison.rows:
        dot = f'<span class="dot" style="background:{colours[row["strategy"]]}"></span>'
        *values, peak = cells(row)
        values += [f"{comparison.ms_min[row['strategy'], row['shift']]:.1f}", peak]
        lines.append(
            f'<tr{" class=group" if row["shift"] != shift else ""}><td class="name">{html.escape(row["shift"])}</td>'
            f'<td class="name">{dot}{html.escape(row["strategy"])}</td>'
            + "".join(f"<td>{value}</td>" for value in values)
            + "</tr>"
        )
        shift = row["shift"]
    return _table(lines)


def _layers(comparison: Comparison, shift: str, strategies: list[str], colours: dict[str, str]) -> str:
    """Plot and table of one shift's layers."""
    rows = {
        name: {row["layer"]: row for row in comparison.layers if (row["strategy"], row["shift"]) == (name, shift)}
        for name in strategies
    }
    layers = {layer: row["kind"] for name in strategies for layer, row in rows[name].items()}
    if not layers:
        return "<p>No layers were compared.</p>"
    figure, (axes, difference) = _subplots(2, 1, 6)
    mean, worst = (
        {name: [_or_nan(rows[name].get(layer, {}).get(key)) for layer in layers] for name in strategies}
        for key in ("sqnr_mean", "sqnr_worst1")
    )
    for name in strategies:
        axes.plot(mean[name], color=colours[name], lw=1.6, label=name)
        axes.plot(worst[name], color=colours[name], lw=0.9, ls=":")
        difference.plot([a - b for a, b in zip(mean[name], mean[strategies[0]])], color=colours[name], lw=1.6)
    for panel, label in ((axes, "SQNR [dB]"), (difference, f"above {strategies[0]} [dB]")):
        panel.set(ylabel=label, xlim=(-0.5, len(layers) - 0.5))
        panel.grid(axis="y", alpha=0.3)
    axes.set_xticks([])
    difference.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6 if len(layers) > 40 else 8)
    _legend_above(axes)

    groups = "".join(f"<th colspan={len(strategies)}>{text}</th>" for text in ("SQNR mean", "worst 1 %", "clipped"))
    lines = [f"<tr class=over><th></th><th></th>{groups}</tr>", _header(["layer", "kind", *strategies * 3], 2)]
    for layer, kind in layers.items():
        told = [layer_cells(rows[name][layer]) if layer in rows[name] else ["-"] * 3 for name in strategies]
        values = "".join(f"<td>{cell}</td>" for column in zip(*told) for cell in column)
        lines.append(f'<tr><td class="name">{html.escape(layer)}</td><td class="name">{html.escape(kind)}</td>{values}</tr>')
    caption = (
        f"{shift} images. Above: mean over the images (solid) and worst 1 % (dotted); below: the mean against {strategies[0]}'s. "
        "A layer's error holds what the layers before it have added."
    )
    return (
        _figure(_svg(figure), caption)
        + f"<details><summary>Table of the layers, {html.escape(shift)} images</summary>{_table(lines)}</details>"
    )


def _sensitivity(sensitivity: Sensitivity) -> list[str]:
    """What keeping each layer in float gains: the verdict, and a table of the layers."""
    lines = [_header(["layer kept in float", "kind", "SQNR", "gain", "weights"], 2)]
    for row in sensitivity.rows:
        values = "".join(f"<td>{cell}</td>" for cell in (f"{row['sqnr']:.2f}", f"{row['gain']:+.2f}", percent(row["weights"])))
        lines.append(f'<tr><td class="name">{html.escape(row["layer"])}</td><td class="name">{html.escape(row["kind"])}</td>{values}</tr>')
    told = "".join(f"<p>{html.escape(line)}</p>" for line in sensitivity.verdict())
    return ["<h2>Layers kept in float</h2>", told, _table(lines)]


def _bars(comparison: Comparison, strategies: list[str], shifts: list[str], colours: dict[str, str]) -> str:
    rows = {(row["strategy"], row["shift"]): row for row in comparison.rows}
    figure, axes = _subplots(2, 2, 6.2)
    for panel, (key, label) in zip(axes[0], (("top1", "top-1 [%]"), ("agreement", "agreement with float32 [%]"))):
        told = [name for name in strategies if key == "top1" or name != FLOAT32]
        width = 0.8 / len(told)
        for i, name in enumerate(told):
            values = [rows[name, shift][key] for shift in shifts]
            heights = [100 * _or_nan(value) for value in values]
            at = [x + (i - (len(told) - 1) / 2) * width for x in range(len(shifts))]
            panel.bar(at, heights, width * 0.92, color=colours[name], label=name)
        panel.set_xticks(range(len(shifts)), shifts)
        panel.set_ylim(0, 100)
        panel.set_title(label if any(rows[s, h][key] is not None for s in told for h in shifts) else f"{label}: no labels")
    measures = (("ms", "latency [ms per image]", 1), ("peak_activation_bytes", "peak activation memory [MiB]", 2**-20))
    for panel, (key, label, factor) in zip(axes[1], measures):
        values = [rows[name, shifts[0]][key] * factor for name in strategies]
        bars = panel.barh(strategies, values, color=[colours[name] for name in strategies])
        panel.bar_label(bars, fmt="%.3g", padding=3)
        panel.set_xlim(0, 1.15 * max(values) or 1)
        panel.invert_yaxis()
        panel.set_title(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return _svg(figure)


def _distributions(comparison: Comparison, strategies: list[str], shifts: list[str], colours: dict[str, str]) -> str:
    figure, axes = _subplots(1, 1, 3.6)
    width = 0.8 / len(strategies)
    for i, name in enumerate(strategies):
        for x, shift in enumerate(shifts):
            values = sorted(v for v in comparison.image_sqnr[name, shift] if not math.isnan(v))
            centre = x + (i - (len(strategies) - 1) / 2) * width
            # spread the points sideways in a fixed pattern (golden ratio), so that equal values stay visible
            at = [centre + width * 0.7 * ((n * 0.618034) % 1 - 0.5) for n in range(len(values))]
            axes.scatter(at, values, s=16, alpha=0.5, lw=0, color=colours[name], label=None if x else name, rasterized=True)
            if values:
                axes.hlines(sum(values) / len(values), centre - width * 0.42, centre + width * 0.42, color="#111827", lw=1.6)
    axes.set_xticks(range(len(shifts)), shifts)
    axes.set_ylabel("SQNR of the output [dB]")
    axes.grid(axis="y", alpha=0.3)
    _legend_above(axes)
    return _svg(figure)


def _header(texts: Sequence[str], names: int) -> str:
    """A row of column titles, the first ``names`` of them to the left."""
    return "<tr>" + "".join(
        f"<th{' class=name' if i < names else ''}>{html.escape(text)}</th>" for i, text in enumerate(texts)
    ) + "</tr>"  # fmt: skip


def _table(lines: Sequence[str]) -> str:
    return '<div class="card"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(image: str, caption: str) -> str:
    alternative = html.escape(caption, quote=True)
    return (
        f'<figure class="card"><img alt="{alternative}" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _subplots(rows: int, columns: int, height: float):
    """A figure without pyplot's global state, 10.5 inches wide, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _legend_above(axes) -> None:
    axes.legend(frameon=False, ncols=8, loc="lower center", bbox_to_anchor=(0.5, 1))


def _svg(figure) -> str:
    """The figure as base64 of an SVG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
