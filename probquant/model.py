"""The int8 model: a torch.nn.Module whose layers are torch.ops.probquant ops; looking inside it; saving and loading it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import keyword
import math
import operator
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ._native import are_held
from ._ops import ops
from .files import replacing
from .huge_pages import side_by_side
from .nodes import check_sizes
from .recording import record
from .telemetry import Telemetry

# Asked for at every call, by names of this module: torch's own have thousands of names beside them, which the last call's weights drove from the caches.
_is_compiling, _is_tracing, _dispatch_modes = torch.compiler.is_compiling, torch._C._is_tracing, torch._C._len_torch_dispatch_stack

_UNITS = "int8_layers"
_FORMAT = 1
_NOTHING_RECORDED = (None, ((), (), ()))  # what runs a plain call, and the tensors that it reads (QuantizedModel._tensors_read)


@dataclasses.dataclass
class LayerInfo:
    """What became of one layer of the float model.

    name: module path in the float model (or the graph node's name). kind: conv2d, linear, add, ... int8: whether it runs on
    8-bit codes; if not, `reason` says why. strategy: how its output gets its range ("float32" where the output is not
    quantized). sample: "image" or "token", what has a scale of its own. fused: what runs in the same kernel. output: node
    of the float graph that its output stands for. predictor: fitted values by name. gamma: the surrogate's sampling stride.
    judged: where surrogate="auto" had a choice, the SQNR of the layer's rounded output in dB that each candidate reached on
    calibration samples (shifted ones, too) that it was not fitted to: [of the mean noise, of the worst sample] by name.
    clipped: share of its output values that saturated on the calibration images, where it was measured (see telemetry.py).
    rounding: how its weights were rounded, unless simply to nearest. cost, saved: where auto had a choice, what its range costs
    over a fixed one (nanoseconds per sample, choice.py's estimate) and gains over it at the network's output (decibels, estimated).
    """

    name: str
    kind: str
    int8: bool
    reason: str = ""
    strategy: str = ""
    sample: str = "image"
    fused: str = ""
    output: str = ""
    predictor: dict[str, float] = dataclasses.field(default_factory=dict)
    clipped: float | None = None
    rounding: str = ""
    gamma: int = 0
    judged: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cost: float = 0.0
    saved: float = 0.0

    @property
    def choice(self) -> str:
        """Why auto took this layer's strategy; empty where it had no choice."""
        if not self.judged:
            return ""
        name = self.strategy + (f" (gamma {self.gamma})" if self.gamma else "")
        best = max(self.judged, key=lambda candidate: self.judged[candidate][0])
        mean, worst = self.judged[name]
        told = f"{mean:.1f} dB, worst {worst:.1f}"
        if self.cost > 0:
            told += f" (for {self.cost / 1e3:.1f} us, which gain {self.saved:.2f} dB of output)"
        return f"{told}: the best" if name == best else f"{told}; {best}: {self.judged[best][0]:.1f}, {self.judged[best][1]:.1f}"


class Summary:
    """Printable table of what is int8, what stays float, and why."""

    def __init__(self, layers: list[LayerInfo], choice: str = ""):
        self.layers, self.choice = layers, choice

    def __str__(self) -> str:
        rows = [("layer", "kind", "runs in", "output range", "per", "note")]
        for layer in self.layers:
            fitted = ", ".join(f"{name} {value:.3g}" for name, value in layer.predictor.items())
            note = layer.reason if not layer.int8 else ", ".join(part for part in (layer.fused, fitted, layer.rounding, layer.choice) if part)
            rows.append((layer.name, layer.kind, "int8" if layer.int8 else "float", layer.strategy, layer.sample if layer.int8 else "", note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip() for row in rows]
        weighted = [layer for layer in self.layers if layer.kind.startswith(("conv", "linear"))]
        done = sum(layer.int8 for layer in weighted)
        lines.append(f"{done} of {len(weighted)} layers with weights run in int8, {len(weighted) - done} stay float")
        return "\n".join([*lines, self.choice] if self.choice else lines)


@dataclasses.dataclass
class Capture:
    """Output of one layer in a forward pass: its value in float32 (dequantized), and per image the clipped values."""

    value: torch.Tensor
    clipped: torch.Tensor | None = None


class QuantizedModel(fx.GraphModule):
    """An int8 model. Call it as the float model it was made from: same inputs, same outputs, any batch size. Images may have other sizes than those
    it was calibrated on unless the model computes with these: `sizes` holds then what is wanted of each input, and another one is a ValueError.

    Its graph is straight-line code over torch.ops.probquant; `units` holds the tensors of the int8 layers. Copying and
    pickling go through the same form as files do. A plain call on the CPU runs the graph's int8 ops as recorded (recording.py), which
    happens at the first one, after recompile(), and when a tensor that the graph reads was exchanged. On the CPU its packed weights lie
    together in huge pages.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, units: nn.Module, layers: list[LayerInfo], settings: dict[str, Any], sizes: list[list[int | None] | None] | None
    ):  # fmt: skip
        super().__init__(root, graph, "QuantizedModel")
        setattr(self, _UNITS, units)  # with the canonical weights, which the graph does not read
        self.meta["layers"], self.meta["settings"], self.meta["sizes"] = layers, settings, sizes
        on_cpu = [unit for unit in units.modules() if isinstance(unit, UnitTensors) and unit.packed_weight.is_cpu]
        for unit, packed in zip(on_cpu, side_by_side([unit.packed_weight for unit in on_cpu]), strict=True):
            unit.packed_weight = packed
        self.eval()

    @property
    def layers(self) -> list[LayerInfo]:
        """What became of every layer, in execution order."""
        return self.meta["layers"]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of quantize() that shaped the model."""
        return self.meta["settings"]

    @property
    def sizes(self) -> list[list[int | None] | None] | None:
        """The sizes that each input must have, None where any does (the batch's); None: images of any size."""
        return self.meta["sizes"]

    def recompile(self):
        code = super().recompile()
        cls = type(self)  # of this model alone: fx makes one for each
        del cls.__call__  # which tells more of errors in generated code, and takes its time: the base's does the rest
        graph_forward = cls.forward

        @functools.wraps(graph_forward)
        def forward(self, *args, **kwargs):
            traced = _is_traced()
            if self.meta["sizes"] is not None and not traced:
                check_sizes("the call", self._bound(args, kwargs) if kwargs else args, self.meta["sizes"])
            if traced or not _all_on_cpu(args) or (kwargs and not _all_on_cpu(kwargs.values())):
                return graph_forward(self, *args, **kwargs)
            run, read = self._recorded
            if run is None or not are_held(*read):
                if not all(x.numel() for x in (*args, *kwargs.values())):  # whose sizes tell nothing
                    return graph_forward(self, *args, **kwargs)
                recorded = record(self, self._bound(args, kwargs), hold=True)
                run = recorded.forward if recorded else functools.partial(graph_forward, self)
                self.__dict__["_recorded"] = (run, self._tensors_read())
            return run(*args, **kwargs)

        cls.forward = forward
        self.__dict__["_recorded"] = _NOTHING_RECORDED
        return code

    def _bound(self, args: tuple, kwargs: dict) -> tuple:
        """What forward's parameters are in a call."""
        bound = inspect.signature(type(self).forward).bind(self, *args, **kwargs)
        bound.apply_defaults()
        return bound.args[1:]

    def _tensors_read(self) -> tuple[tuple[dict, ...], tuple[str, ...], tuple[torch.Tensor, ...]]:
        """Of each tensor that the graph reads: where it is held, by which name, and itself."""
        found = []
        for target in dict.fromkeys(node.target for node in self.graph.nodes if node.op == "get_attr"):
            path, _, leaf = target.rpartition(".")
            module = self.get_submodule(path)
            holder = next(held for held in (module._buffers, module._parameters, module.__dict__) if leaf in held)
            found.append((holder, leaf, holder[leaf]))
        return tuple(zip(*found, strict=True)) or ((), (), ())

    def _apply(self, fn, recurse=True):
        """share_memory() leaves every tensor the same object with other memory: what is recorded still points to the old."""
        super()._apply(fn, recurse)
        self.__dict__["_recorded"] = _NOTHING_RECORDED
        return self

    def __deepcopy__(self, memo) -> QuantizedModel:
        return _rebuild(_header(self), {name: tensor.clone() for name, tensor in _tensors(self).items()})

    def __reduce__(self):
        return _rebuild, (_header(self), _tensors(self))

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("probquant: a QuantizedModel is for inference, it cannot be trained")
        return super().train(mode)

    def summary(self) -> Summary:
        return Summary(self.layers, self.meta.get("choice", ""))

    def capture(self, *inputs) -> tuple[Any, dict[str, Capture]]:
        """Runs the model and returns (output, {layer name: Capture})."""
        check_sizes("the call", inputs, self.sizes)
        captures: dict[str, Capture] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, node):
                result = super().run_node(node)
                layer = node.meta.get("layer")
                if layer is not None:
                    captures[layer] = _capture(result)
                    if "profile" in node.meta:
                        profile = operator.attrgetter(node.meta["profile"])(self.module)
                        image = result[0].dim() == 4 and result[1].dim() == 1
                        captures[layer].value *= profile.reshape(-1, 1, 1) if image else profile
                return result

        with torch.no_grad():
            return Recorder(self).run(*inputs), captures

    def recorded(self, *inputs) -> fx.GraphModule:
        """This model with its int8 ops put into a few calls of torch.ops.probquant.run, for those who trace it on the CPU: what torch.compile and
        torch.export make of it runs as fast as a plain call does. It has the tensors that the model has now.

        inputs: what it will be called with, or the like of it: their sizes tell how to split batches whose activations outgrow the cache. Without
            inputs, or with an empty batch, no batch is split. Any batch size can be called.
        """
        return record(self, inputs or None) or fx.GraphModule(self, self.graph)

    def telemetry(self, prepare: Callable[[fx.GraphModule], Callable] | None = None) -> Telemetry:
        """This model with its clipped values counted, to be called in its place: see Telemetry."""
        return Telemetry(self, prepare)

    def __repr__(self) -> str:
        count = sum(layer.int8 for layer in self.layers)
        return f"QuantizedModel(strategy={self.settings.get('strategy')!r}, {count} int8 layers; print(model.summary()) lists them)"

    def __str__(self) -> str:  # a GraphModule's is its code: model.print_readable()
        return repr(self)


def _capture(result: tuple[torch.Tensor, ...]) -> Capture:
    q, scale, zero_point, stats = result[:4]
    if q.dtype != torch.uint8:
        return Capture(q)
    clipped = stats[..., 2].reshape(stats.shape[0], -1).sum(1)
    return Capture(ops.dequantize(q, scale, zero_point), clipped)


def _is_traced() -> bool:
    """Whether what is called now must be the graph's ops: by torch.compile, torch.export, make_fx, fake tensors, torch.jit.trace."""
    return _is_compiling() or _is_tracing() or _dispatch_modes() > 0


def _all_on_cpu(given: Iterable) -> bool:
    """Whether all are tensors on the CPU, and no subclass's."""
    for x in given:  # a generator would cost more than what it says of one input
        if type(x) is not torch.Tensor or not x.is_cpu:
            return False
    return True


class UnitTensors(nn.Module):
    """Tensors of one int8 layer: the canonical weight (what files hold) and its packed form (what kernels read)."""

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, profile: torch.Tensor | None, groups: int):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("profile", profile)
        self.groups = groups
        self.register_buffer("packed_weight", self._pack(), persistent=False)

    def _apply(self, fn, recurse=True):
        device = self.weight.device
        super()._apply(fn, recurse)
        if self.weight.device != device:  # every kind of device has its own packed form
            self.packed_weight = self._pack()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.packed_weight.copy_(self._pack())  # where it is, in huge pages

    def _pack(self) -> torch.Tensor:
        return ops.pack_weight(self.weight, self.weight_scale, self.bias, self.groups, self.profile)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def validate(qmodel: QuantizedModel) -> None:
    """Checks every value the kernels rely on and cannot check themselves: scales, predictors, weights.

    Raises ValueError naming the layer, the value and what was wanted.
    """
    for name, tensor in qmodel.state_dict().items():
        if not name.startswith(_UNITS):
            continue
        leaf = name.rsplit(".", 1)[1]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"probquant: {name} holds a value that is not finite, want finite float32 values")
        if leaf == "weight_scale" and not bool((tensor > 0).all()):
            raise ValueError(f"probquant: {name} has a minimum of {float(tensor.min())}, want scales > 0")
        if leaf == "weight" and bool((tensor == -128).any()):
            raise ValueError(f"probquant: {name} holds -128, want codes in [-127, 127]")
        if leaf == "fixed":
            scale, zero_point = tensor.tolist()
            if not scale > 0 or not 0 <= zero_point <= 255:
                raise ValueError(f"probquant: {name} is scale {scale}, zero point {zero_point}, want scale > 0 and zero point in 0..255")


# ----------------------------------------------------------------------------------------------------------------------
# Files: one safetensors file, tensors in canonical form, the graph as JSON in its metadata


def save(qmodel: QuantizedModel, path: str | os.PathLike) -> None:
    """Writes the model to one safetensors file. The file appears complete or not at all."""
    if not isinstance(qmodel, QuantizedModel):
        raise TypeError(f"probquant: save wants a QuantizedModel, got {type(qmodel).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in _tensors(qmodel).items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"probquant": json.dumps(_header(qmodel))})


def _tensors(qmodel: QuantizedModel) -> dict[str, torch.Tensor]:
    """What a file holds: canonical weights, predictors, and the parameters and constants of float layers."""
    tensors = {name: tensor.detach() for name, tensor in qmodel.state_dict().items()}
    for node in qmodel.graph.nodes:  # constants that are neither parameters nor persistent buffers
        if node.op == "get_attr" and node.target not in tensors and not node.target.startswith(_UNITS):
            tensors[node.target] = operator.attrgetter(node.target)(qmodel).detach()
    return tensors


def _header(qmodel: QuantizedModel) -> dict:
    """Everything but the tensors, as JSON can hold it."""
    info = getattr(qmodel.graph._codegen, "pytree_info", None)
    return {
        "format": _FORMAT,
        "layers": [dataclasses.asdict(layer) for layer in qmodel.layers],
        "settings": qmodel.settings,
        "choice": qmodel.meta.get("choice", ""),
        "sizes": qmodel.sizes,
        "groups": {name: unit.groups for name, unit in getattr(qmodel, _UNITS).named_children() if hasattr(unit, "groups")},
        "nodes": [_encode_node(node) for node in qmodel.graph.nodes],
        "pytree": None
        if info is None
        else {
            "arguments": info.orig_args,
            "in_spec": pytree.treespec_dumps(info.in_spec),
            "out_spec": None if info.out_spec is None else pytree.treespec_dumps(info.out_spec),
        },
    }


def load(path: str | os.PathLike) -> QuantizedModel:
    """Reads a model that save() wrote. Raises FileNotFoundError, or ValueError for a file that is not one or is damaged.

    A file from elsewhere can run no code of its own: its graph calls ops that are registered with torch, and arithmetic on sizes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"probquant: no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"probquant: {path} is not a safetensors file: {error}") from error
    if "probquant" not in metadata:
        raise ValueError(f"probquant: {path} was not written by probquant.save")
    try:
        header = json.loads(metadata["probquant"])
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {_FORMAT}")
        qmodel = _rebuild(header, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"probquant: {path} is damaged or from another version: {error}") from error
    validate(qmodel)
    return qmodel


def _rebuild(header: dict, tensors: dict[str, torch.Tensor]) -> QuantizedModel:
    root = nn.Module()
    units = nn.Module()
    root.add_module(_UNITS, units)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNITS + "."):
            unit, leaf = name[len(_UNITS) + 1 :].split(".")
            grouped.setdefault(unit, {})[leaf] = tensor
        else:
            set_tensor(root, name, tensor)
    for name, leaves in grouped.items():
        units.add_module(name, make_unit(leaves, header["groups"].get(name)))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in header["nodes"]:
        args, kwargs = _decode(entry["args"], nodes), _decode(entry["kwargs"], nodes)
        node = graph.create_node(entry["op"], _decode_target(entry), args, kwargs, name=_checked_name(entry["name"]))
        nodes[entry["name"]] = node
        node.meta.update({key: entry[key] for key in ("layer", "profile") if key in entry})
    if header["pytree"] is not None:
        p = header["pytree"]
        in_spec, out_spec = (None if p[name] is None else pytree.treespec_loads(p[name]) for name in ("in_spec", "out_spec"))
        arguments = [_checked_name(name) for name in p["arguments"]]
        if in_spec.num_children == 2 and in_spec.child(1).type is dict:  # of keywords
            for name in in_spec.child(1).context:
                _checked_name(name)
        graph._codegen = fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(arguments, in_spec, out_spec))
    qmodel = QuantizedModel(root, graph, units, [LayerInfo(**layer) for layer in header["layers"]], header["settings"], header.get("sizes"))
    qmodel.meta["choice"] = header.get("choice", "")
    return qmodel


def make_unit(leaves: dict[str, torch.Tensor], groups: int | None) -> nn.Module:
    """The module of one int8 layer from its tensors; `groups` is None for an op without weights."""
    if groups is None:
        unit = nn.Module()
    else:
        unit = UnitTensors(leaves["weight"], leaves["weight_scale"], leaves.get("bias"), leaves.get("profile"), groups)
        unit.groups = groups
    for name, tensor in leaves.items():
        if not hasattr(unit, name):
            unit.register_buffer(name, tensor)
    return unit


def set_tensor(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.register_buffer(leaf, tensor)


#: What a saved graph calls beside torch's ops: arithmetic on sizes, and picking one of several results.
_FUNCTIONS = {f"operator:{name}": getattr(operator, name) for name in (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_",
)} | {f"math:{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")}  # fmt: skip
_REACH_FILES = ("op:aten.from_file.default", "op:aten.from_file.out")


def _encode_node(node: fx.Node) -> dict:
    entry = {"op": node.op, "name": node.name, "target": _encode_target(node.target), "args": _encode(node.args), "kwargs": _encode(node.kwargs)}
    entry.update({key: node.meta[key] for key in ("layer", "profile") if key in node.meta})
    return entry


def _encode_target(target) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target.namespace}.{target._opname}.{target._overloadname}"
    for name, function in _FUNCTIONS.items():
        if target is function:
            return name
    raise TypeError(f"probquant: cannot save a graph that calls {target}")


def _decode_target(entry: dict):
    kind, target = entry["op"], entry["target"]
    if kind in ("placeholder", "output"):
        return _checked_name(target)
    if kind == "get_attr" and re.fullmatch(r"[^\\\"\0-\x1f]+", target):
        return target
    if kind == "call_function" and target in _FUNCTIONS:
        return _FUNCTIONS[target]
    if kind == "call_function" and target.startswith("op:") and target not in _REACH_FILES:
        namespace, op, overload = target[len("op:") :].split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise ValueError(f"a graph has no {kind} of {target!r}")


def _checked_name(name: str) -> str:
    """torch.fx writes Python code with the names of a graph, and compiles it."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be a name in a graph")
    return name


_TORCH_VALUES = {str(value): value for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.layout, torch.memory_format))}


def _encode(value):
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return {"value": value}
    if isinstance(value, float):
        return {"float": value.hex()}
    raise TypeError(f"probquant: cannot save a graph argument of type {type(value).__name__}")


def _decode(value: dict, nodes: dict[str, fx.Node]):
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind in ("list", "tuple"):
        items = [_decode(v, nodes) for v in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {_checked_name(k): _decode(v, nodes) for k, v in content.items()}
    if kind == "torch":
        return _TORCH_VALUES[content]
    if kind == "device":
        return torch.device(content)
    if kind == "float":
        return float.fromhex(content)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind of value {kind!r}")
