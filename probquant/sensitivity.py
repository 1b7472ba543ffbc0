"""Which layers cost most by running in int8: each is kept in float in turn, and the network's output compared with float32's."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
from torch import nn
from tqdm import tqdm

from .compare import latency, percent, text_table
from .graph import trace
from .metrics import joined_outputs, sqnr
from .model import QuantizedModel
from .quantize import check_float_model, chunks_for, model_inputs, quantize, quantize_graph


@dataclass
class Sensitivity:
    """What :func:`sensitivity` found. SQNR is that of the network's output in dB, the mean over the images.

    sqnr, ms: of the model as it is; ms per image. rows: one dict per layer with weights, the costliest first: layer, kind,
    sqnr (with this layer in float), gain (over the model as it is), weights (the layer's share of the int8 weights).
    exclude: the proposal, for quantize(exclude=...); may be empty. sqnr_excluded, ms_excluded, weights_excluded: what the
    model with all of them in float reaches, takes, and keeps in float.
    """

    sqnr: float
    ms: float
    rows: list[dict] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    sqnr_excluded: float | None = None
    ms_excluded: float | None = None
    weights_excluded: float | None = None

    def table(self) -> str:
        """The layers and the proposal as plain text."""
        header = ["layer kept in float", "kind", "SQNR", "gain", "weights"]
        rows = [
            [row["layer"], row["kind"], f"{row['sqnr']:.2f}", f"{row['gain']:+.2f}", percent(row["weights"])] for row in self.rows
        ]
        return "\n".join([text_table(header, rows, names=2, rules=False), "", *self.verdict()])

    def verdict(self) -> list[str]:
        """What is proposed, what it buys and what it costs, in two lines."""
        as_it_is = f"As it is: {self.sqnr:.2f} dB, {self.ms:.2f} ms per image."
        if not self.exclude:
            return [as_it_is, "No layer is worth keeping in float by itself."]
        return [
            as_it_is,
            f"Proposed: exclude={self.exclude}: {self.sqnr_excluded:.2f} dB ({self.sqnr_excluded - self.sqnr:+.2f}), "
            f"{self.ms_excluded:.2f} ms per image; {percent(self.weights_excluded)} of the weights stay float.",
        ]


def sensitivity(
    model: nn.Module,
    settings: QuantizedModel | dict,
    batches: Iterable,
    *,
    layers: Sequence[str] | None = None,
    images: int = 16,
    most: int = 3,
    minimum_gain: float = 0.5,
    rounds: int = 5,
    progress: bool = True,
) -> Sensitivity:
    """Quantizes the model once for every layer with that layer left in float, and tells what each gains at the output.

    model: the float model. settings: an int8 model made from it, or keyword arguments of quantize(). batches: calibration
    batches as quantize() takes them; all are held in memory, every variant is calibrated on them, and the first `images`
    images (whole chunks of 8) are what SQNR is measured on. layers: names or fnmatch patterns of the layers to try (default: all with weights).
    most, minimum_gain: the proposal takes at most so many layers, each of which gains at least so many dB by itself; it is
    measured as a whole. rounds: calls that the latency is the median of (one image).

    The time is that of one calibration per layer: a few dozen images do. Raises TypeError for other settings, ValueError when no layer
    matches, and what quantize() raises.
    """
    check_float_model(model)
    if not isinstance(settings, (QuantizedModel, dict)):
        raise TypeError(f"probquant: settings is a {type(settings).__name__}, want a QuantizedModel, or keyword arguments of quantize() as a dict")
    batches = list(batches)
    given = dict(settings.settings) if isinstance(settings, QuantizedModel) else dict(settings)
    if isinstance(settings, QuantizedModel):  # its float layers stay float
        given["exclude"] = [_literal(layer.name) for layer in settings.layers if not layer.int8]
    base = quantize(model, batches, progress=False, **given)
    weighted = [layer for layer in base.layers if layer.int8 and layer.kind in ("conv2d", "linear")]
    if len(weighted) < 2:
        raise ValueError(f"probquant: {weighted[0].name} is the only int8 layer with weights, want at least two to compare")
    candidates = [layer for layer in weighted if _chosen(layer.name, layers)]
    if not candidates:
        raise ValueError(f"probquant: layers is {layers!r}, want patterns that match int8 layers: {[layer.name for layer in weighted]}")

    inputs = list(model_inputs(model, batches))
    graph_module = trace(model, inputs[0])
    chunks = list(chunks_for(graph_module, inputs))
    starts = accumulate((chunk[0].shape[0] for chunk in chunks), initial=0)
    evaluation = [chunk for chunk, start in zip(chunks, starts) if start < images]
    with torch.no_grad():
        reference = [joined_outputs(graph_module(*chunk), chunk[0].shape[0]) for chunk in evaluation]

    def measure(qmodel: QuantizedModel) -> float:
        with torch.no_grad():
            found = [sqnr(expected, joined_outputs(qmodel(*chunk), chunk[0].shape[0])) for chunk, expected in zip(evaluation, reference, strict=True)]
        return float(torch.cat(found).nanmean())

    def variant(names: list[str]) -> QuantizedModel:
        exclude = [*(given.get("exclude") or ()), *map(_literal, names)]
        with warnings.catch_warnings():  # of torch, about how it copies its own graphs
            warnings.simplefilter("ignore", FutureWarning)
            graph = copy.deepcopy(graph_module)
        return quantize_graph(graph, iter(chunks), base.settings, given.get("include"), exclude, progress=False)

    sizes = _weights(base)
    as_it_is = measure(base)
    rows = []
    for layer in tqdm(candidates, desc="layers kept in float", disable=not progress):
        value = measure(variant([layer.name]))
        share = sizes[layer.name] / sum(sizes.values())
        rows.append({"layer": layer.name, "kind": layer.kind, "sqnr": value, "gain": value - as_it_is, "weights": share})
    rows.sort(key=lambda row: row["gain"], reverse=True)

    one = tuple(x[:1] if isinstance(x, torch.Tensor) and x.dim() else x for x in chunks[0])
    proposed = [row for row in islice(rows, min(most, len(weighted) - 1)) if row["gain"] >= minimum_gain]
    if not proposed:
        return Sensitivity(as_it_is, latency({"": base}, one, rounds)[""][0], rows)
    excluded = [row["layer"] for row in proposed]
    kept = variant(excluded)
    ms = {name: taken[0] for name, taken in latency({"base": base, "kept": kept}, one, rounds).items()}
    return Sensitivity(
        as_it_is, ms["base"], rows, [_literal(name) for name in excluded], measure(kept), ms["kept"], sum(row["weights"] for row in proposed)
    )  # fmt: skip


def _chosen(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _weights(qmodel: QuantizedModel) -> dict[str, int]:
    """How many int8 weights each layer has."""
    units = {}
    for node in qmodel.graph.nodes:
        for source in node.all_input_nodes if "layer" in node.meta else ():
            if source.op == "get_attr" and source.target.endswith(".packed_weight"):
                units[node.meta["layer"]] = qmodel.get_buffer(source.target.removesuffix("packed_weight") + "weight").numel()
    return units
