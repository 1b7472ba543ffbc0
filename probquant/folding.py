"""Simplifies a traced float graph without changing what it computes, so that less is left to quantize, and more of it is a layer.

Gone are identities, what depends on parameters alone, batch norms, hardsigmoids and LayerScales behind a layer; a batch norm that stands
alone becomes a layer of one weight per channel, and a layer whose channels go different ways becomes a layer for each.
"""

from __future__ import annotations

import operator
import re
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from .nodes import argument, aten, attribute, layer_name, new_parameter, same_size, shape_of

_IDENTITIES = {aten.dropout.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default}
_LAYERS = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)


def fold(graph_module: fx.GraphModule) -> None:
    """All of it, in place; what nobody reads any more is left to eliminate_dead_code()."""
    _remove_identities(graph_module)
    _fold_constants(graph_module)
    _fold_batch_norms(graph_module)
    _fold_hardsigmoids(graph_module)
    _fold_layer_scales(graph_module)
    _split_layers(graph_module)


def _remove_identities(graph_module: fx.GraphModule) -> None:
    """A view may rely on the copy in front of it, which goes, and on strides that an int8 layer gives otherwise: it becomes a reshape."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and (node.target in _IDENTITIES or _takes_all(node)):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        elif _gives_all(node):
            node.replace_all_uses_with(node.args[1])
            graph_module.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice takes all that there is."""
    if node.target is not aten.slice.Tensor or argument(node, 4, "step", 1) != 1:
        return False
    shape, source = shape_of(node), shape_of(node.args[0])
    return shape is not None and source is not None and all(map(same_size, shape, source))


def _gives_all(node: fx.Node) -> bool:
    """Whether a scatter into a slice overwrites all that there was: what x[:, :width] += y becomes where x is no wider."""
    if node.target is not aten.slice_scatter.default or argument(node, 5, "step", 1) != 1:
        return False
    shape, source = shape_of(node), shape_of(node.args[1])
    return shape is not None and source is not None and all(map(same_size, shape, source))


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """What depends on parameters alone is computed once: normalised weights, joined biases, tables of position biases. So such weights are
    as good as parameters. An expanded tensor would only grow."""
    values: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, fx.Node] = {}  # the largest that a constant was made of, which it is named by
    written = {node.args[0].target for node in graph_module.graph.nodes if _writes(node)}
    for node in list(graph_module.graph.nodes):
        value = None if node.target in written else attribute(graph_module, node)
        if value is not None:
            values[node], parameters[node] = value, node
        elif _is_pure(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            sources = [parameters[source] for source in node.all_input_nodes if source in parameters]
            if sources:
                parameters[node] = max(sources, key=lambda source: values[source].numel())
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, torch.Tensor) or all(user in values for user in node.users):
            continue
        source = parameters.get(node)
        name = node.name if source is None else re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", source.target)
        with torch.no_grad(), graph_module.graph.inserting_before(node):
            folded = new_parameter(graph_module, f"{name}_constant", value.detach().clone(memory_format=torch.contiguous_format), name)
        folded.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(folded)


def _writes(node: fx.Node) -> bool:
    """Whether a node changes a buffer of the model."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"


def _is_pure(node: fx.Node) -> bool:
    """Whether a node gives the same values for the same arguments, and takes memory for them already."""
    if node.op != "call_function" or node.target is aten.expand.default:
        return False
    return node.target is operator.getitem or (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _is_first_output(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0


def _fold_batch_norms(graph_module: fx.GraphModule) -> None:
    """y = (layer(x) - mean) / sqrt(var + eps) * weight + bias becomes one layer, computed in float64. Behind anything else but the network's
    input it becomes a depthwise convolution of one weight per channel: an int8 layer, which takes the activation along."""
    graph = graph_module.graph
    for norm in list(graph.nodes):
        if norm.op != "call_function" or norm.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        source, *parameters, _momentum, eps = norm.args
        scale, shift, mean, variance = (attribute(graph_module, p) for p in parameters)
        if mean is None or variance is None or not all(_is_first_output(user) for user in norm.users):
            continue
        factor = (variance.double() + eps).rsqrt() * (scale.double() if scale is not None else 1.0)
        offset = (shift.double() if shift is not None else 0.0) - mean.double() * factor
        parts = _weight_and_bias(graph_module, source) if len(source.users) == 1 else None
        rank = len(shape_of(source) or ())
        if parts is not None and (rank == 2) == (source.target is aten.linear.default):  # a norm's channels are dimension 1
            weight, bias = parts
            folded = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
            _replace_parameters(graph_module, source, folded, offset if bias is None else offset + bias.double() * factor, "folded")
            result = source
        elif source.op != "placeholder" and rank == 4:
            named = next(p for p in parameters if isinstance(p, fx.Node))
            with graph.inserting_before(norm):
                weight, bias = (
                    new_parameter(graph_module, f"{named.target}_{what}", value.to(source.meta["val"].dtype), named.target)
                    for what, value in (("factor", factor.reshape(-1, 1, 1, 1)), ("offset", offset))
                )
                result = graph.call_function(aten.conv2d.default, (source, weight, bias, [1, 1], [0, 0], [1, 1], len(factor)))
            result.meta["val"], weight.meta["val"] = source.meta["val"], attribute(graph_module, weight)
        else:
            continue
        for user in list(norm.users):
            user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(norm)


def _weight_and_bias(graph_module: fx.GraphModule, node: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Of a layer whose weight and bias are parameters; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in _LAYERS:
        return None
    bias = argument(node, 2, "bias")
    weight, value = attribute(graph_module, node.args[1]), attribute(graph_module, bias)
    return None if weight is None or (bias is not None and value is None) else (weight, value)


def _fold_hardsigmoids(graph_module: fx.GraphModule) -> None:
    """hardsigmoid(layer(x)) = clamp(layer(x) / 6 + 0.5, 0, 1): the slope goes into the layer's weights, what is left is a clamp."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.hardsigmoid.default:
            continue
        layer = node.args[0]
        parts = _weight_and_bias(graph_module, layer)
        if parts is None or len(layer.users) != 1:
            continue
        weight, bias = parts
        offset = (torch.zeros(len(weight)) if bias is None else bias.double()) / 6 + 0.5
        _replace_parameters(graph_module, layer, weight.double() / 6, offset, "hardsigmoid")
        with graph.inserting_after(node):
            clamp = graph.call_function(aten.clamp.default, (layer, 0.0, 1.0))
        clamp.meta = dict(node.meta)
        node.replace_all_uses_with(clamp)
        graph.erase_node(node)


def _fold_layer_scales(graph_module: fx.GraphModule) -> None:
    """(x w + b) * scale, a parameter per output channel, becomes one layer: the LayerScale of arXiv 2103.17239, also behind the permute of
    arXiv 2201.03545, where channels come last in a block and first between blocks."""
    for product in list(graph_module.graph.nodes):
        if product.op != "call_function" or product.target is not aten.mul.Tensor:
            continue
        for factors, parameter in (product.args[:2], product.args[1::-1]):
            permute = factors if isinstance(factors, fx.Node) and factors.target is aten.permute.default else None
            layer = factors if permute is None else permute.args[0]
            scale, parts = attribute(graph_module, parameter), _weight_and_bias(graph_module, layer)
            if scale is None or parts is None or len(layer.users) != 1 or len(factors.users) != 1 or shape_of(product) != shape_of(factors):
                continue
            weight, bias = parts
            rank = len(shape_of(layer))
            channels = rank - 1 if layer.target is aten.linear.default else rank - 3  # an image may lack its batch dimension
            if permute is not None:
                channels = [dim % rank for dim in permute.args[1]].index(channels)
            at = channels - rank  # from the end, as scale may have fewer dimensions
            if scale.numel() != len(weight) or scale.dim() < -at or scale.shape[at] != len(weight):
                continue
            factor = scale.double().flatten()
            folded = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
            _replace_parameters(graph_module, layer, folded, None if bias is None else bias.double() * factor, "layer_scale")
            product.replace_all_uses_with(factors)
            graph_module.graph.erase_node(product)
            break


def _replace_parameters(
    graph_module: fx.GraphModule, layer: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, how: str, name: str | None = None
) -> None:
    """Gives a layer another weight and bias, of its weight's dtype; reports go on naming it by the parameter it had, or by `name`."""
    original = layer.args[1]
    parameter, dtype = original.meta.get("parameter", original.target), attribute(graph_module, original).dtype
    if name is not None:
        parameter = f"{name}.weight"
    with graph_module.graph.inserting_before(layer):
        nodes = [
            value if value is None else new_parameter(graph_module, f"{original.target}_{how}{suffix}", value.to(dtype), parameter)
            for suffix, value in (("", weight), ("_bias", bias))
        ]
    nodes[0].meta["val"] = attribute(graph_module, nodes[0])
    layer.args = (layer.args[0], *nodes, *layer.args[3:])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}


# ----------------------------------------------------------------------------------------------------------------------
# Layers whose channels go different ways

_ELEMENTWISE = {
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.silu.default, aten.gelu.default, aten.hardswish.default,
    aten.sigmoid.default,
}  # fmt: skip
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default)
_FEWEST = 8  # channels of a layer that is worth a call of its own
_MOST_PARTS = 4  # layers that read the input once each


def _split_layers(graph_module: fx.GraphModule) -> None:
    """split(f(conv(x))) along the channels, f elementwise, becomes f(conv(x)) for each part: every part has its own range, and nothing is
    copied. The layers read x once each. Parts that overlap would be computed twice: they stay."""
    for node in list(graph_module.graph.nodes):
        parts = _channel_parts(node)
        widths = [end - start for start, end in parts]
        if len(parts) < 2 or min(widths) < _FEWEST or sum(widths) > shape_of(node)[1] or len(parts) > _MOST_PARTS:
            continue
        chain = [node]
        while chain[-1].target in _ELEMENTWISE and isinstance(chain[-1].args[0], fx.Node) and len(chain[-1].args[0].users) == 1:
            chain.append(chain[-1].args[0])
        layer = chain.pop()
        if layer.target is aten.linear.default or _weight_and_bias(graph_module, layer) is None or argument(layer, 6, "groups", 1) != 1:
            continue
        part = layer
        for (start, end), readers in parts.items():
            part = _part_of_layer(graph_module, layer, start, end, after=part)
            for step in reversed(chain):
                with graph_module.graph.inserting_after(part):
                    copied = graph_module.graph.node_copy(step, lambda n, step=step, part=part: part if n is step.args[0] else n)
                copied.meta["val"] = part.meta["val"]
                part = copied
            for reader in readers:
                reader.replace_all_uses_with(part)


def _channel_parts(node: fx.Node) -> dict[tuple[int, int], list[fx.Node]]:
    """(first channel, behind the last): who gives it, where all readers of `node`, an image, take some of its channels alone; else nothing."""
    shape = shape_of(node)
    parts: dict[tuple[int, int], list[fx.Node]] = {}
    if node.op != "call_function" or shape is None or len(shape) != 4:
        return {}
    for user in node.users:
        if user.target is aten.slice.Tensor and user.args[0] is node and argument(user, 1, "dim", 0) % 4 == 1 and argument(user, 4, "step", 1) == 1:
            start = argument(user, 2, "start", None) or 0
            start = max(0, start + shape[1]) if start < 0 else start
            parts.setdefault((start, start + shape_of(user)[1]), []).append(user)
        elif user.target in _SPLITS and argument(user, 2, "dim", 0) % 4 == 1:
            ends = list(accumulate(part.shape[1] for part in user.meta["val"]))
            for item in user.users:
                end = ends[item.args[1]]
                parts.setdefault((end - item.meta["val"].shape[1], end), []).append(item)
        else:
            return {}
    return parts


def _part_of_layer(graph_module: fx.GraphModule, layer: fx.Node, start: int, end: int, after: fx.Node) -> fx.Node:
    """The layer that gives channels start to end of a layer, behind a node."""
    weight, bias = _weight_and_bias(graph_module, layer)
    part_name = f"channels_{start}_{end}"
    with graph_module.graph.inserting_after(after):
        part = graph_module.graph.node_copy(layer)
    part.meta["val"] = layer.meta["val"][:, start:end]
    _replace_parameters(graph_module, part, weight[start:end], None if bias is None else bias[start:end], part_name, f"{layer_name(layer)}.{part_name}")
    return part
