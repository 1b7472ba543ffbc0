"""Telemetry: how often each layer of a served int8 model clips, counted outside its graph.

Every int8 op counts the values that saturated (csrc/NUMERICS.md). The graph of a Telemetry joins these counts into one more
output and stays pure; the object around it adds them up under a lock. Nothing is counted in a plain QuantizedModel.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from ._ops import Strategy
from .recording import record

if TYPE_CHECKING:
    from .model import QuantizedModel

_CLIPPED = 2  # column of the stats (kStatsClipped)
aten = torch.ops.aten


class Telemetry:
    """A QuantizedModel that counts what it clips: called like it, from any number of threads, with the same outputs.

    graph: the model as a pure fx.GraphModule that returns (the model's output, counts). counts: int64 [N, layers, 2], per image
        and layer the values clipped and the samples (images, or tokens) that were invalid: not finite. Export or compile
        this one; layers are in the order of rows().
    prepare: applied to the graph once, for example ``torch.compile``; the result is what a call runs. Without it that is the graph,
        on the CPU as recorded (recording.py), with the tensors that the model has at the first call.
    """

    def __init__(self, qmodel: QuantizedModel, prepare: Callable[[fx.GraphModule], Callable] | None = None):
        self.graph, self._nodes = _with_counts(qmodel)
        self._run = None if prepare is None else prepare(self.graph)
        described = {layer.name: layer for layer in qmodel.layers}
        self._layers = [described[node.meta["layer"]] for node in self._nodes]
        self._lock = threading.Lock()
        self._values: dict[tuple, torch.Tensor] = {}
        self.reset()

    def __call__(self, *inputs) -> Any:
        """The model's output. Counts the batch; reads the counts back to the host once."""
        if self._run is None:
            self._run = record(self.graph, inputs) or self.graph
        with torch.no_grad():
            output, counts = self._run(*inputs)
        self.update(counts, *inputs)
        return output

    def update(self, counts: torch.Tensor, *inputs) -> None:
        """Adds the counts that a call of the (compiled, exported) graph on `inputs` gave."""
        if counts.dtype != torch.int64 or counts.dim() != 3 or counts.shape[1:] != (len(self._layers), 2):
            raise ValueError(f"probquant: counts is {counts.dtype} {list(counts.shape)}, want int64 [N, {len(self._layers)}, 2]")
        totals = counts.sum(0).cpu()
        with self._lock:
            self._images += counts.shape[0]
            self._counts += totals
            self._written += self._values_of(inputs)

    def reset(self) -> None:
        """Starts again from nothing."""
        with self._lock:
            self._images = 0
            self._counts = torch.zeros(len(self._layers), 2, dtype=torch.int64)
            self._written = torch.zeros(len(self._layers), dtype=torch.int64)

    def rows(self) -> list[dict]:
        """One dict per layer: layer, kind, images, values (written), clipped (their share that saturated, None of no values),
        calibrated (that share on the calibration images, None if unknown), invalid (samples that were not finite)."""
        with self._lock:
            images, counts, written = self._images, self._counts.tolist(), self._written.tolist()
        return [
            {
                "layer": layer.name, "kind": layer.kind, "images": images, "values": values,
                "clipped": clipped / values if values else None, "calibrated": layer.clipped, "invalid": invalid,
            }
            for layer, values, (clipped, invalid) in zip(self._layers, written, counts, strict=True)
        ]  # fmt: skip

    def drifted(self, factor: float = 4.0, floor: float = 1e-4) -> list[dict]:
        """The rows to be alarmed about: clipped > factor * max(calibrated, floor), or an invalid sample.

        floor: a share that is never alarming by itself, for layers that clipped (nearly) nothing in calibration.
        """
        if not factor > 0 or not floor >= 0:
            raise ValueError(f"probquant: factor is {factor!r} and floor {floor!r}, want a factor > 0 and a floor >= 0")
        return [
            row for row in self.rows() if row["invalid"] or (row["clipped"] or 0.0) > factor * max(row["calibrated"] or 0.0, floor)
        ]  # fmt: skip

    def _values_of(self, inputs: tuple) -> torch.Tensor:
        """Values that each layer writes for these inputs, int64 [layers]: a question of shapes, answered once for each."""
        key = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in inputs)
        if key not in self._values:
            with torch.no_grad():
                FakeTensorProp(self.graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
            self._values[key] = torch.tensor([node.meta["val"][0].numel() for node in self._nodes], dtype=torch.int64)
        return self._values[key]


def _with_counts(qmodel: QuantizedModel) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A copy of the model's graph (it shares the tensors) that returns (output, counts), and the nodes that are counted."""
    graph = fx.Graph()
    leaves = graph.graph_copy(qmodel.graph, {})
    kinds = {layer.name: layer for layer in qmodel.layers}
    nodes = [node for node in graph.nodes if "layer" in node.meta and node.kwargs.get("strategy") != Strategy.NONE]
    batch = next(node for node in graph.nodes if node.op == "placeholder")

    def call(target, *args) -> fx.Node:
        return graph.call_function(target, args)

    images = call(aten.sym_size.int, batch, 0)
    clipped, invalid = [], []  # [images] each; a count below 0 stands for as many invalid samples
    for node in nodes:
        count = call(aten.select.int, call(operator.getitem, node, 3), -1, _CLIPPED)
        if kinds[node.meta["layer"]].sample == "image":
            clipped.append(count)
            invalid.append(count)
        else:  # tokens; those of all windows of an image lie together
            count = call(aten.reshape.default, count, [images, -1])
            clipped.append(call(aten.sum.dim_IntList, call(aten.clamp_min.default, count, 0), [1]))
            invalid.append(call(aten.sum.dim_IntList, call(aten.clamp_max.default, count, 0), [1]))
    if nodes:
        clipped = call(aten.clamp_min.default, call(aten.stack.default, clipped, 1), 0)
        invalid = call(aten.neg.default, call(aten.clamp_max.default, call(aten.stack.default, invalid, 1), 0))
        counts = call(aten.stack.default, [clipped, invalid], 2)
    else:  # every layer writes floats
        counts = graph.call_function(aten.new_zeros.default, (batch, [images, 0, 2]), {"dtype": torch.int64})
    # The graph returns the leaves of its output in a flat list; the new output is the pair (output, counts).
    info = qmodel.graph._codegen.pytree_info
    spec = pytree.tree_structure((pytree.tree_unflatten([0] * info.out_spec.num_leaves, info.out_spec), 0))
    graph._codegen = fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(info.orig_args, info.in_spec, spec))
    graph.output([*leaves, counts])
    graph.lint()
    return fx.GraphModule(qmodel, graph, "CountingModel"), nodes
