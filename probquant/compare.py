"""Compare quantized models with the float32 model they were made from: accuracy, SQNR, clipping, latency, memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .files import replacing
from .metrics import joined_outputs, outputs_of, sqnr
from .model import QuantizedModel
from .quantize import arguments_in, capture, check_float_model, positional_limit

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

FLOAT32 = "float32"


def mean_and_worst1(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and mean of the lowest 1 % (at least one value); NaNs are left out; (None, None) if nothing is left."""
    kept = sorted(value for value in values if not math.isnan(value))
    if not kept:
        return None, None
    return statistics.fmean(kept), statistics.fmean(kept[: max(1, len(kept) // 100)])


def peak_activation_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Largest number of bytes that torch's CPU allocator had handed out at once during one forward, above its start.

    Counts every activation, temporary and the output; not the inputs and parameters, which existed before. The model
    is run once beforehand, so that what it prepares on its first call does not count.
    """
    with torch.no_grad():
        model(*inputs)
        with _profiled_memory() as changes:
            model(*inputs)
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def latency(models: dict[str, nn.Module], inputs: Sequence[Tensor], rounds: int = 15) -> dict[str, tuple[float, float]]:
    """Milliseconds per image of each model: (median, minimum) over ``rounds``, after one call to warm up.

    Each round times every model once, so that a slow moment of the machine hits all of them, in an order of its own:
    whoever follows the largest model finds the caches cold. Inputs are [N, ...].
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        shuffle = random.Random(0)
        for _ in range(rounds + 1):
            for name in shuffle.sample(list(models), len(models)):
                start = time.perf_counter()
                models[name](*inputs)
                times[name].append(1e3 * (time.perf_counter() - start) / len(inputs[0]))
    return {name: (statistics.median(taken[1:]), min(taken[1:])) for name, taken in times.items()}


@dataclass
class Comparison:
    """What :func:`compare` found. Shares (top1, agreement, clipped) are in 0..1, SQNR in dB, None where unknown.

    rows: one dict per strategy and shift: strategy, shift, top1, agreement, sqnr_mean, sqnr_worst1, clipped, ms,
        peak_activation_bytes.
    layers: one dict per strategy, shift and layer: strategy, shift, layer, kind, sqnr_mean, sqnr_worst1, clipped.
    image_sqnr: (strategy, shift) -> SQNR of the output of each image in dB.
    ms_min: (strategy, shift) -> lowest latency in ms per image.
    setup: how it was measured: images, layer_images, batch (of latency and memory), rounds, threads.
    """

    rows: list[dict] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)
    image_sqnr: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    ms_min: dict[tuple[str, str], float] = field(default_factory=dict)
    setup: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def joined(parts: Iterable[Comparison]) -> Comparison:
        """One comparison from several (say, one per shift), which were measured in the same way."""
        whole = Comparison()
        for part in parts:
            whole.rows += part.rows
            whole.layers += part.layers
            whole.image_sqnr |= part.image_sqnr
            whole.ms_min |= part.ms_min
            whole.setup = part.setup
        return whole

    def table(self) -> str:
        """The rows as plain text."""
        header = ["shift", "strategy", "top-1", "agreement", "SQNR mean", "worst 1 %", "clipped", "ms/image", "peak MiB"]
        return text_table(header, [[row["shift"], row["strategy"], *cells(row)] for row in self.rows], names=2)

    def layer_table(self, shift: str | None = None) -> str:
        """SQNR of every layer as plain text, for one shift (default: the first)."""
        header = ["layer", "kind", "strategy", "SQNR mean", "worst 1 %", "clipped"]
        shift = shift or self.rows[0]["shift"]
        return text_table(
            header,
            [
                [row["layer"], row["kind"], row["strategy"], *layer_cells(row)]
                for row in self.layers
                if row["shift"] == shift
            ],
            names=3,
        )

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The rows as a JSON list; also written to ``path`` (replaced in one step) if given."""
        text = json.dumps(self.rows, indent=1)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(
        self,
        path: str | os.PathLike,
        title: str = "probquant report",
        about: Sequence[str] = (),
        sensitivity: Sensitivity | None = None,
    ) -> None:
        """Write a self-contained page with tables and plots to ``path`` (replaced in one step); needs matplotlib.

        about: paragraphs of plain text that say what was compared. sensitivity: of probquant.sensitivity, for a section.
        """
        from .report import page

        write_text(path, page(self, title, about, sensitivity))


def compare(
    float_model: nn.Module,
    qmodels: dict[str, QuantizedModel] | QuantizedModel,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    labels: Tensor | Sequence[int] | None = None,
    *,
    shift: str = "clean",
    layer_images: int = 64,
    measure_batch: int = 1,
    rounds: int = 15,
    progress: bool = True,
) -> Comparison:
    """Run a float32 model and its quantized versions on the same images.

    qmodels: one QuantizedModel (its name becomes its strategy), or {name: QuantizedModel}; "float32" is taken.
    batches: float [N, ...] model inputs (a tuple or list of them for a model with several inputs; what it does not take, labels for example, is
        ignored, as by quantize()), gone through once.
    labels: class index of each image, in the batches' order, -1 where unknown; None: no top-1.
    shift: name for the rows. layer_images: this many first images give the layers' SQNR and the clipped share.
    measure_batch: images per call when latency and peak memory are measured (cut to the first batch's size).
    rounds: calls per model for the latency.

    Top-1 and agreement (the share of images with float32's class) are told if the model's first output is [N, classes].
    A model with several outputs is judged by the SQNR of all of them together.
    The clipped share is clipped values / written values, over all int8 layers.

    Raises ValueError for no images, labels that do not match them in number, or no model to compare; TypeError for models of another kind.
    """
    check_float_model(float_model)
    if isinstance(qmodels, QuantizedModel):
        qmodels = {qmodels.settings["strategy"]: qmodels}
    if not isinstance(qmodels, dict) or not all(isinstance(qmodel, QuantizedModel) for qmodel in qmodels.values()):
        raise TypeError(f"probquant: qmodels is a {type(qmodels).__name__}, want a QuantizedModel, or a dict of them by name")
    if not qmodels or FLOAT32 in qmodels:
        raise ValueError(f"probquant: qmodels must hold at least one model, none named {FLOAT32!r}; got {list(qmodels)}")
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    image_sqnr: dict[str, list[float]] = {name: [] for name in qmodels}
    classes: dict[str, list[Tensor]] = {name: [] for name in (FLOAT32, *qmodels)}
    layers = {name: _LayerStatistics() for name in qmodels}
    first, seen, layers_seen, limit = None, 0, 0, positional_limit(float_model)

    with torch.no_grad(), tqdm(desc=f"comparing on {shift} images", unit=" images", disable=not progress) as bar:
        for batch in batches:
            inputs = arguments_in(batch, limit)
            n = len(inputs[0])
            if n == 0:
                continue
            first = first or inputs
            with_layers = layers_seen < layer_images
            layers_seen += n * with_layers
            float_layers: dict[tuple, dict] = {}  # by which layers they are; mostly the same ones for every qmodel
            reference = float_model(*inputs)
            classes[FLOAT32].append(_classes(reference))
            for name, qmodel in qmodels.items():
                if with_layers:
                    output, captured = qmodel.capture(*inputs)
                    which = tuple((layer.name, layer.output) for layer in qmodel.layers if layer.int8)
                    if which not in float_layers:
                        float_layers[which] = capture(float_model, *inputs, like=qmodel)[1]
                    layers[name].add(n, float_layers[which], captured)
                else:
                    output = qmodel(*inputs)
                image_sqnr[name] += sqnr(joined_outputs(reference, n), joined_outputs(output, n)).tolist()
                classes[name].append(_classes(output))
            seen += n
            bar.update(n)
    if first is None:
        raise ValueError("probquant: there are no images in batches")
    if labels is not None and len(labels) != seen:
        raise ValueError(f"probquant: {len(labels)} labels for {seen} images")

    models = {FLOAT32: float_model, **qmodels}
    small = tuple(x[:measure_batch] for x in first)
    ms = latency(models, small, rounds)
    predicted = {name: None if parts[0] is None else torch.cat(parts) for name, parts in classes.items()}
    result = Comparison(
        setup={
            "images": seen,
            "layer_images": layers_seen,
            "batch": len(small[0]),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        }
    )
    for name, model in models.items():
        mean, worst = mean_and_worst1(image_sqnr.get(name, []))
        result.rows.append(
            {
                "strategy": name,
                "shift": shift,
                "top1": _share_equal(predicted[name], labels),
                "agreement": _share_equal(predicted[name], predicted[FLOAT32]),
                "sqnr_mean": mean,
                "sqnr_worst1": worst,
                "clipped": layers[name].clipped_share() if name in layers else None,
                "ms": ms[name][0],
                "peak_activation_bytes": peak_activation_bytes(model, *small),
            }
        )
        result.ms_min[name, shift] = ms[name][1]
        if name in qmodels:
            result.image_sqnr[name, shift] = image_sqnr[name]
            kinds = {layer.name: layer.kind for layer in model.layers}
            result.layers += [{"strategy": name, "shift": shift, **row} for row in layers[name].rows(kinds)]
    return result


class _LayerStatistics:
    """SQNR of every image, values clipped and values written, of every layer of one quantized model."""

    def __init__(self):
        self.sqnr: dict[str, list[float]] = {}
        self.clipped: dict[str, int] = {}
        self.written: dict[str, int] = {}

    def add(self, n: int, reference: dict, captured: dict) -> None:
        for name, layer in captured.items():
            if name in reference:
                expected = reference[name].value.reshape(n, -1)
                self.sqnr.setdefault(name, []).extend(sqnr(expected, layer.value.reshape(n, -1)).tolist())
            if layer.clipped is not None:
                self.clipped[name] = self.clipped.get(name, 0) + int(layer.clipped.sum())
                self.written[name] = self.written.get(name, 0) + layer.value.numel()

    def clipped_share(self) -> float | None:
        written = sum(self.written.values())
        return sum(self.clipped.values()) / written if written else None

    def rows(self, kinds: dict[str, str]) -> list[dict]:
        rows = []
        for name, values in self.sqnr.items():
            mean, worst = mean_and_worst1(values)
            clipped = self.clipped[name] / self.written[name] if self.written.get(name) else None
            kind = kinds.get(name, "")
            rows.append({"layer": name, "kind": kind, "sqnr_mean": mean, "sqnr_worst1": worst, "clipped": clipped})
        return rows


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _classes(output) -> Tensor | None:
    scores = outputs_of(output)[0]
    return scores.argmax(1) if scores.dim() == 2 else None


def _share_equal(classes: Tensor | None, wanted: Tensor | None) -> float | None:
    if classes is None or wanted is None or not (wanted >= 0).any():
        return None
    known = wanted >= 0
    return (classes[known] == wanted[known]).double().mean().item()


@contextlib.contextmanager
def _profiled_memory():
    """Yields a list that holds, once the block is left, the signed size of every CPU allocation and release, in order."""
    changes: list[int] = []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _without_stderr():  # the profiler announces itself there
        profiler.start()
    try:
        yield changes
    finally:
        with _without_stderr():
            profiler.stop()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes += [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextlib.contextmanager
def _without_stderr():
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# ---- text ----


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else format(value * factor, form)


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def cells(row: dict) -> list[str]:
    return [
        percent(row["top1"]),
        percent(row["agreement"]),
        _number(row["sqnr_mean"], ".1f"),
        _number(row["sqnr_worst1"], ".1f"),
        percent(row["clipped"], 3),
        _number(row["ms"], ".1f"),
        _number(row["peak_activation_bytes"], ".2f", 2**-20),
    ]


def layer_cells(row: dict) -> list[str]:
    return [_number(row["sqnr_mean"], ".1f"), _number(row["sqnr_worst1"], ".1f"), percent(row["clipped"], 3)]


def text_table(header: list[str], rows: list[list[str]], names: int, rules: bool = True) -> str:
    """Columns aligned, the first ``names`` of them to the left; with ``rules`` a line wherever the first column changes."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines, group = [], header[0]
    for line in [header, *rows]:
        if rules and line[0] != group:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
            group = line[0]
        cells = [text.ljust(w) if i < names else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
