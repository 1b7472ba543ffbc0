"""From a float model to its layers: captures the graph, and finds what one int8 kernel can do.

`trace` gives a functional ATen graph (torch.export), simplified by folding.py; `find_units` groups its nodes into
units: a convolution or linear layer with the residual add and the activation behind it, a LayerNorm with the residual add in front
of it, an attention, or one op without weights. A unit is what becomes one op of torch.ops.probquant, and what reports call a layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import warnings
from typing import Any

import torch
from torch import fx, nn

from . import transformer
from ._ops import Activation
from .folding import fold
from .nodes import argument, aten, attribute, layer_name, same_size, shape_of

_FLOAT_LAYERS = {
    aten.conv1d.default: "conv1d", aten.conv1d.padding: "conv1d", aten.conv3d.default: "conv3d", aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d", aten.conv_transpose2d.input: "conv_transpose2d", aten.conv_transpose3d.input: "conv_transpose3d",
}  # fmt: skip
_LAYER_NORM_ARGUMENTS = (("input", None), ("normalized_shape", None), ("weight", None), ("bias", None), ("eps", 1e-5))
_UPSAMPLES = {
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact2d.default,
}  # fmt: skip
_MAX_SUM = 66_000  # weights per output that the int32 accumulator can hold (csrc/NUMERICS.md)


#: Kinds of units whose output has its input's scale and zero point.
PASSES_THROUGH = ("max_pool2d", "upsample_nearest2d", "flatten")


@dataclasses.dataclass
class Unit:
    """A group of float nodes that one int8 op replaces.

    kind: conv2d, linear, layer_norm, attention, add, mul, concat, activation, max_pool2d, avg_pool2d, adaptive_avg_pool2d,
    upsample_nearest2d or flatten.
    nodes: the float nodes it replaces; `output` is the last of them. inputs: the activations it reads (add, mul, concat and attention
    read several; a layer_norm reads floats, two where it adds them, and then `total` is that sum, if others read it, too).
    residual: the node a layer adds before its activation. options: what the op needs beside tensors.
    """

    name: str
    kind: str
    nodes: list[fx.Node]
    output: fx.Node
    inputs: list[fx.Node]
    anchor: fx.Node
    residual: fx.Node | None = None
    total: fx.Node | None = None
    weight: torch.Tensor | None = None  # float32, canonical: [O, kh, kw, I / groups] or [O, K]
    bias: torch.Tensor | None = None
    output_profile: torch.Tensor | None = None  # float32 [O]: the codes of channel o stand for scale * output_profile[o] * (q - zero point)
    activation: Activation = Activation.CLAMP
    activation_min: float | None = None
    activation_max: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    int8: bool = False
    quantized_output: bool = False  # else a layer writes float32
    sample_dims: int = 1
    reason: str = ""

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies with weights (of these, only conv2d and linear have int8 kernels)."""
        return self.kind in ("conv2d", "linear") or self.kind in _FLOAT_LAYERS.values()

    @property
    def first(self) -> fx.Node:
        """Where the int8 op stands: a LayerNorm that hands a sum on has to be there before the sum's other readers."""
        return self.total or self.output


# ----------------------------------------------------------------------------------------------------------------------
# Capture


def trace(model: nn.Module, example: tuple) -> fx.GraphModule:
    """Functional ATen graph of `model` in eval mode with a dynamic batch, simplified (folding.py), attentions in the one form of
    transformer.py.

    The model is left as it is; weights of the result are copies where folding changed them. A model that writes into its inputs
    (x.sub_(mean)) computes the same here, but the graph leaves its caller's tensors alone: calibration runs it on them again and again.
    meta["sizes"] of the result: those that its inputs must have (check_sizes), or None.
    Raises RuntimeError when torch.export cannot capture the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        program, example, any_size = _export(model, example)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph_module = program.run_decompositions({}).module()
    finally:
        for module, training in modes:
            module.training = training
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and not node.users:  # torch.export's guards on input shapes: every batch size is welcome
            graph_module.graph.erase_node(node)
        elif node.target is aten.copy_.default and node.args[0].op == "placeholder":  # behind all reads of the input
            node.replace_all_uses_with(node.args[1])
            graph_module.graph.erase_node(node)
    given = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = [[size if isinstance(size, int) else None for size in x.shape] if isinstance(x, torch.Tensor) else None for x in given]
    graph_module.meta["sizes"] = None if any_size else sizes
    fold(graph_module)
    transformer.rewrite_attention(graph_module, example)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _export(model, example):
    """(program, the example it was traced with, whether images may have other sizes): of any batch size where the model takes any, else of the
    example's."""

    def export(inputs, **options):
        inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)  # torch.export marks what it is given
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, strict=False, **options)

    # torch.export specialises sizes 0 and 1, so a batch that may vary has at least two images.
    several = tuple(torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == 1 else x for x in example)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(x, torch.Tensor) and x.dim() > 0 else None for x in example)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # forward(self, x, *others): torch.export takes the others as one argument
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        dynamic = (*dynamic[:named], dynamic[named:]) if len(dynamic) > named else dynamic
    try:
        program = export(several, dynamic_shapes=dynamic)
    except Exception as dynamic_error:
        try:
            program = export(example)
        except Exception as error:
            raise RuntimeError(f"probquant: torch.export cannot capture {type(model).__name__}: {error}") from error
        warnings.warn(
            f"probquant: {type(model).__name__} fixes its batch size at {example[0].shape[0]}: {str(dynamic_error).splitlines()[0]}", stacklevel=3
        )
        return program, example, False
    _upsample_by_factors(program)
    described = _described(program)
    larger = [x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]) if isinstance(x, torch.Tensor) and x.dim() == 4 else x for x in several]
    log = logging.getLogger("torch._subclasses.fake_tensor")  # would tell of every op that the larger images do not fit
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:  # tracing looks at shapes alone
        other = export(larger, dynamic_shapes=dynamic)
        _upsample_by_factors(other)
        return program, several, described == _described(other)
    except Exception:
        return program, several, False
    finally:
        log.setLevel(level)


def _upsample_by_factors(program) -> None:
    """Upsampling to a multiple of the input's size becomes upsampling by a factor, which does not depend on the size."""
    for node in program.graph.nodes:
        if node.target in _UPSAMPLES:
            factor = _whole_factor(node, shape_of(node.args[0]), shape_of(node))
            if factor:
                node.target = next(op for op in _UPSAMPLES if op._schema.name == node.target._schema.name and op._overloadname == "vec")
                node.args, node.kwargs = (node.args[0], None, [float(part) for part in factor]), {}
    program.graph_module.recompile()


def _described(program) -> tuple:
    """What a program does, with all its constants: of a model that computes with the sizes of its images, it depends on them."""
    constants = [value.tolist() if isinstance(value, torch.Tensor) else value for value in program.constants.values()]
    # a window of _ceil_padding() fits the sizes that it was made for
    return constants, [(node.op, node.target, str(node.args), str(node.kwargs), _is_ceiled(node) and shape_of(node)[2:]) for node in program.graph.nodes]


# ----------------------------------------------------------------------------------------------------------------------
# Units


def _pair(value) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value


def find_units(graph_module: fx.GraphModule) -> list[Unit]:
    """All units of a traced graph in execution order, whether they become int8 or not."""
    units: list[Unit] = []
    taken: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    seen_names: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node in taken:
            continue
        unit = _layer_unit(graph_module, node) or _transformer_unit(graph_module, node) or _weightless_unit(node)
        if unit is None:
            continue
        if unit.is_layer and not unit.reason:
            _absorb_residual(unit, order, taken)
        if unit.kind in ("conv2d", "linear", "add") and not unit.reason:
            _absorb_activation(unit)
        count = seen_names[unit.name] = seen_names.get(unit.name, 0) + 1
        if count > 1:  # a module that is called several times
            unit.name = f"{unit.name}#{count}"
        taken.update(unit.nodes)
        units.append(unit)
    return sorted(units, key=lambda unit: order[unit.output])


def _layer_unit(graph_module: fx.GraphModule, node: fx.Node) -> Unit | None:
    if node.target is aten.linear.default:
        kind, options = "linear", {}
    elif node.target in (aten.conv2d.default, aten.conv2d.padding):
        kind, options = "conv2d", _conv2d_options(node)
    elif node.target in _FLOAT_LAYERS:
        kind = _FLOAT_LAYERS[node.target]
        return Unit(layer_name(node), kind, [node], node, [node.args[0]], node, reason=f"{kind} has no int8 kernel")
    else:
        return None
    weight, bias = attribute(graph_module, node.args[1]), attribute(graph_module, argument(node, 2, "bias"))
    unit = Unit(layer_name(node), kind, [node], node, [node.args[0]], node, options=options)
    if weight is None or (argument(node, 2, "bias") is not None and bias is None):
        unit.reason = "its weight is computed, not a parameter"
        return unit
    if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
        raise ValueError(f"probquant: weight or bias of layer {unit.name!r} is not finite")
    if math.prod(weight.shape[1:]) >= _MAX_SUM:
        unit.reason = f"{math.prod(weight.shape[1:])} weights per output overflow an int32 sum (limit {_MAX_SUM})"
    if len(shape_of(node.args[0]) or (0, 0)) < 2:
        unit.reason = "its input has no batch dimension"
    if weight.dtype == torch.float64:
        unit.reason = "it computes in float64, int8 layers take float32, float16 and bfloat16"
    unit.weight = (weight.permute(0, 2, 3, 1) if kind == "conv2d" else weight).float().contiguous()
    unit.bias = None if bias is None else bias.float().contiguous()
    if kind == "conv2d":
        _absorb_padding(unit)
    return unit


def _conv2d_options(node: fx.Node) -> dict[str, Any]:
    stride, dilation = (_pair(argument(node, i, name, 1)) for i, name in ((3, "stride"), (5, "dilation")))
    padding = argument(node, 4, "padding", 0)
    kernel = list(node.args[1].meta["val"].shape[2:]) if "val" in node.args[1].meta else None
    if isinstance(padding, str):
        total = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
    else:
        height, width = _pair(padding)
        padding = [height, height, width, width]
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": argument(node, 6, "groups", 1)}


def _absorb_padding(unit: Unit) -> None:
    """A zero padding in front of a convolution becomes its own."""
    pad = unit.inputs[0]
    if pad.op != "call_function" or pad.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return
    constant = pad.target is aten.constant_pad_nd.default or argument(pad, 2, "mode", "constant") == "constant"
    value = argument(pad, 2, "value", 0) if pad.target is aten.constant_pad_nd.default else argument(pad, 3, "value", 0)
    amounts = list(pad.args[1]) + [0] * (4 - len(pad.args[1]))
    if not constant or value or len(amounts) != 4 or min(amounts) < 0:
        return
    left, right, top, bottom = amounts
    unit.options["padding"] = [a + b for a, b in zip(unit.options["padding"], (top, bottom, left, right), strict=True)]
    unit.inputs = [pad.args[0]]
    if len(pad.users) == 1:
        unit.nodes.append(pad)


def _absorb_residual(unit: Unit, order: dict[fx.Node, int], taken: set[fx.Node]) -> None:
    users = list(unit.output.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0] in taken:
        return
    add = users[0]
    if transformer.norm_behind(add):  # it takes the add, and keeps what passes by in float
        return
    if argument(add, 2, "alpha", 1) != 1 or not all(isinstance(a, fx.Node) for a in add.args[:2]):
        return
    other = add.args[1] if add.args[0] is unit.output else add.args[0]
    # With two layers at the add's inputs the later one takes it, so that the other is known by then.
    if other is unit.output or order[other] > order[unit.output] or shape_of(other) != shape_of(add):
        return
    unit.residual = other
    unit.nodes.append(add)
    unit.output = add


def _activation_of(node: fx.Node) -> tuple[Activation, float | None, float | None] | None:
    """(kind, minimum, maximum) of an activation node."""
    if node.op != "call_function":
        return None
    target = node.target
    if target is aten.relu.default:
        return Activation.CLAMP, 0.0, None
    if target is aten.relu6.default:
        return Activation.CLAMP, 0.0, 6.0
    if target in (aten.hardtanh.default, aten.clamp.default):
        default = (-1.0, 1.0) if target is aten.hardtanh.default else (None, None)
        bounds = [argument(node, i + 1, name, default[i]) for i, name in enumerate(("min_val", "max_val") if default[0] else ("min", "max"))]
        if all(b is None or isinstance(b, (int, float)) for b in bounds) and bounds != [None, None]:
            return Activation.CLAMP, *(None if b is None else float(b) for b in bounds)
        return None
    if target is aten.gelu.default:
        return (Activation.GELU, None, None) if argument(node, 1, "approximate", "none") == "none" else None
    kind = {aten.silu.default: Activation.SILU, aten.hardswish.default: Activation.HARDSWISH, aten.sigmoid.default: Activation.SIGMOID}.get(target)
    return None if kind is None else (kind, None, None)


def _silu_product(node: fx.Node) -> list[fx.Node] | None:
    """[sigmoid, mul] when the only users of `node` are x * sigmoid(x)."""
    users = list(node.users)
    for sigmoid, product in (users, users[::-1]) if len(users) == 2 else ():
        if sigmoid.target is aten.sigmoid.default and product.target is aten.mul.Tensor and set(product.args) == {node, sigmoid} and len(sigmoid.users) == 1:
            return [sigmoid, product]
    return None


def _absorb_activation(unit: Unit) -> None:
    product = _silu_product(unit.output)
    users = list(unit.output.users)
    if product:
        found, nodes = (Activation.SILU, None, None), product
    elif len(users) == 1 and _activation_of(users[0]):
        found, nodes = _activation_of(users[0]), users
    else:
        return
    if found[0] is not Activation.CLAMP and (unit.residual is not None or unit.kind == "add"):
        return  # a curved activation acts in float before the one rounding, a residual after the scaling: not fused
    unit.activation, unit.activation_min, unit.activation_max = found
    unit.nodes.extend(nodes)
    unit.output = nodes[-1]


def _transformer_unit(graph_module: fx.GraphModule, node: fx.Node) -> Unit | None:
    attention = transformer.find_attention(node)
    if attention is not None:
        options = {"heads": attention.heads, "scale": attention.scale}
        return Unit(attention.name, "attention", attention.nodes, node, attention.inputs, node, options=options)
    if "reason" in node.meta:
        return Unit(transformer.module_path(node), "attention", [node], node, [], node, reason=node.meta["reason"])
    if not transformer.is_layer_norm(node):
        return None
    source, _, weight, bias, eps = (argument(node, i, name, default) for i, (name, default) in enumerate(_LAYER_NORM_ARGUMENTS))
    options = {"eps": eps, "scale": attribute(graph_module, weight), "shift": attribute(graph_module, bias)}
    if (options["scale"] is None) != (weight is None) or (options["shift"] is None) != (bias is None):  # computed ones
        return None
    unit = Unit(layer_name(node, weight), "layer_norm", [node], node, [source], node, options=options)
    if transformer.norm_behind(source) is node:
        unit.nodes, unit.inputs = [source, node], list(source.args[:2])
        unit.total = source if len(source.users) > 1 else None
    return unit


def _weightless_unit(node: fx.Node) -> Unit | None:
    target, shape = node.target, shape_of(node)
    inputs = [node.args[0]] if node.args else []
    if shape is None or not inputs:
        return None

    def unit(kind, unit_inputs=inputs, **options):
        return Unit(node.name, kind, [node], node, list(unit_inputs), node, options=options)

    if target is aten.add.Tensor:
        if not all(isinstance(a, fx.Node) and shape_of(a) == shape for a in node.args[:2]) or argument(node, 2, "alpha", 1) != 1:
            return None
        if transformer.norm_behind(node):
            return None
        return unit("add", node.args[:2])
    if target is aten.mul.Tensor:
        factors = _factors(node, shape)
        return unit("mul", factors) if factors else None
    if target is aten.cat.default:
        dim = argument(node, 1, "dim", 0)
        channel_dim = 1 if len(shape) == 4 else len(shape) - 1
        return unit("concat", node.args[0]) if dim % len(shape) == channel_dim else None
    found = _activation_of(node)
    if found:
        result = unit("activation")
        result.activation, result.activation_min, result.activation_max = found
        return result
    source = shape_of(inputs[0]) if isinstance(inputs[0], fx.Node) else None
    if source is None:
        return None
    if target is aten.max_pool2d.default and len(source) == 4:
        kernel, stride, padding = _window(node)
        dilation = _pair(argument(node, 4, "dilation", 1))
        padding = _ceil_padding(source, kernel, stride, padding, dilation) if _is_ceiled(node) else padding
        return unit("max_pool2d", kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
    if target is aten.avg_pool2d.default and len(source) == 4:
        if argument(node, 4, "ceil_mode", False) or argument(node, 6, "divisor_override") is not None:
            return None
        kernel, stride, padding = _window(node)
        return unit("avg_pool2d", kernel_size=kernel, stride=stride, padding=padding, count_include_pad=argument(node, 5, "count_include_pad", True))
    if target is aten.adaptive_avg_pool2d.default and len(source) == 4:
        return unit("adaptive_avg_pool2d", output_size=list(shape[2:]), flatten=False)
    if target is aten.mean.dim and len(source) == 4 and sorted(d % 4 for d in node.args[1]) == [2, 3]:
        return unit("adaptive_avg_pool2d", output_size=[1, 1], flatten=not argument(node, 2, "keepdim", False))
    if target in _UPSAMPLES and len(source) == 4:
        factor = _whole_factor(node, source, shape)
        return unit("upsample_nearest2d", scale_factor=factor) if factor else None
    if target in (aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dims):
        if len(shape) == 2 and len(source) > 2 and same_size(shape[0], source[0]):
            return unit("flatten")
    return None


def _factors(node: fx.Node, shape: tuple) -> list[fx.Node] | None:
    """[a, b] of a product of two tensors of the same shape, or of images with one value b per channel; None for another one."""
    if not all(isinstance(a, fx.Node) and shape_of(a) is not None for a in node.args[:2]):
        return None
    a, b = node.args[:2]
    if shape_of(a) != shape:
        a, b = b, a
    if shape_of(a) != shape or len(shape) < 2:
        return None
    other = shape_of(b)
    per_channel = len(shape) == len(other) == 4 and same_size(other[0], shape[0]) and other[1:] == (shape[1], 1, 1)
    return [a, b] if other == shape or per_channel else None


def _whole_factor(node: fx.Node, source: tuple, shape: tuple) -> list[int] | None:
    """[height, width] by which a nearest upsampling repeats every pixel; None if it does something else."""
    sizes, outs = list(map(int, source[2:])), list(map(int, shape[2:]))
    if any(out % size for out, size in zip(outs, sizes, strict=True)):
        return None
    height, width = (out // size for out, size in zip(outs, sizes, strict=True))
    pixels = torch.arange(math.prod(sizes), dtype=torch.float32).reshape(1, 1, *sizes)
    repeated = pixels.repeat_interleave(height, 2).repeat_interleave(width, 3)
    # torch finds the source pixel in float32 arithmetic, which misses some: take its word, not the factor's
    return [height, width] if torch.equal(node.target(pixels, *node.args[1:], **node.kwargs), repeated) else None


def _window(node: fx.Node) -> tuple[list[int], list[int], list[int]]:
    kernel = _pair(node.args[1])
    stride = _pair(argument(node, 2, "stride", None) or kernel)
    height, width = _pair(argument(node, 3, "padding", 0))
    return kernel, stride, [height, height, width, width]


def _is_ceiled(node: fx.Node) -> bool:
    return node.target is aten.max_pool2d.default and argument(node, 5, "ceil_mode", False)


def _ceil_padding(source, kernel, stride, padding, dilation) -> list[int]:
    """Padding below and to the right that gives a floor-mode window the size torch's ceil_mode has."""
    result = list(padding)
    for axis in range(2):
        size, before = int(source[2 + axis]), padding[2 * axis]
        span = dilation[axis] * (kernel[axis] - 1) + 1
        out = -(-(size + 2 * before - span) // stride[axis]) + 1
        if (out - 1) * stride[axis] >= size + before:  # the last window must start inside the input or its padding before it
            out -= 1
        result[2 * axis + 1] = max((out - 1) * stride[axis] + span - size - before, 0)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# What becomes int8


def reads_codes(layer: Unit, source: Unit) -> bool:
    """Whether a layer can read the codes `source` writes: a 4-d tensor is an image to a convolution, rows to a linear layer."""
    return len(shape_of(source.output)) != 4 or (source.sample_dims == 1) == (layer.kind == "conv2d")


def _takes_codes(reader: Unit, source: Unit) -> bool:
    """Whether an int8 unit reads the codes that `source` writes."""
    if source.output is reader.residual:
        return True
    if source.output not in reader.inputs or reader.kind == "layer_norm":
        return False
    return not reader.is_layer or reads_codes(reader, source)


def choose_int8(units: list[Unit], selected) -> None:
    """Marks the units that become int8. `selected(name)` says whether the user wants a layer quantized.

    Layers are int8 wherever they can be. An op without weights is int8 when its inputs are there in 8 bits and somebody
    reads its output in 8 bits; else it would only add roundings. A LayerNorm reads floats, and writes floats unless all of its readers
    want 8 bits: it runs as an op next to any int8 layer.
    """
    producers = {unit.output: unit for unit in units}
    possible: set[fx.Node] = set()  # outputs that can be had in 8 bits
    for unit in units:
        if unit.is_layer:
            if not unit.reason and not selected(unit.name):
                unit.reason = "excluded by the caller"
            if unit.reason:
                continue
            source = producers.get(unit.inputs[0])
            rank = len(shape_of(unit.inputs[0]))
            reads = unit.inputs[0] in possible and reads_codes(unit, source)
            unit.sample_dims = 1 if unit.kind == "conv2d" else source.sample_dims if reads else rank - 1
            if unit.residual is not None and not (unit.residual in possible and producers[unit.residual].sample_dims == unit.sample_dims):
                _release_residual(unit)
            possible.add(unit.output)
        elif unit.reason:
            continue
        elif unit.kind == "layer_norm":
            unit.sample_dims = len(shape_of(unit.output)) - 1
            possible.add(unit.output)
        elif all(i in possible for i in unit.inputs):
            dims = {producers[i].sample_dims for i in unit.inputs}
            if len(dims) > 1:
                unit.reason = "its inputs are quantized per image and per token"
                continue
            unit.sample_dims = dims.pop()
            images_only = unit.kind == "flatten" or (unit.kind not in ("add", "mul", "activation") and len(shape_of(unit.inputs[0])) == 4)
            if images_only and unit.sample_dims != 1:
                unit.reason = "its input is quantized per token"
                continue
            if unit.kind == "attention" and unit.sample_dims != 2:
                unit.reason = "its input is not quantized per token"
                continue
            possible.add(unit.output)
        else:
            unit.reason = "its input is float"
    for unit in reversed(units):
        if unit.reason:
            continue
        readers = [u for u in units if u.int8 and _takes_codes(u, unit)]
        unit.quantized_output = bool(readers)
        unit.int8 = unit.is_layer or unit.quantized_output
        if unit.kind == "layer_norm":
            inside = {node for u in readers for node in u.nodes}
            unit.int8 = unit.int8 or any(i in possible for i in unit.inputs)
            unit.quantized_output = all(user in inside for user in unit.output.users)
        if not unit.int8:
            unit.reason = "nobody reads its output in 8 bits"


def _release_residual(unit: Unit) -> None:
    """The residual stays float: the layer ends at its own output again, the add and what follows stay float ops."""
    unit.nodes = [n for n in unit.nodes if n is unit.anchor or n.target in (aten.pad.default, aten.constant_pad_nd.default)]
    unit.output, unit.residual = unit.anchor, None
    unit.activation, unit.activation_min, unit.activation_max = Activation.CLAMP, None, None
