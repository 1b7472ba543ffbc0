"""Transformer blocks: finds attention and LayerNorm in a traced graph, however they are spelt.

Attention: projections fused or apart, heads split by view and permute, chunk or unbind, scaled_dot_product_attention or matmul and
softmax, images first or tokens first (nn.MultiheadAttention). Between the projections and the product there is nothing but views,
which move values and change none. So the views are run on tensors of indices, which then tell the row and the column of the
projection that every value of a query, key or value is; whatever the spelling, one form remains, and `rewrite_attention` writes it:

    query, key, value = linear(x) each        [images, tokens, heads * head_dim], a scale per token each
    transpose(unflatten(...)), scaled_dot_product_attention, flatten(transpose(...))        [images, tokens, heads * head_dim]

LayerNorm takes the residual add in front of it along: it reads floats anyway, and hands the sum on in float. So the residual stream
is never rounded, and the layers that write into it (the projection behind attention, the second of the MLP) write float32.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .nodes import aten, argument, attribute, layer_name, new_parameter, shape_of

_VIEWS = {
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.movedim.intlist, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.select.int, aten.slice.Tensor, aten.narrow.default,
}  # fmt: skip
_SPLITS = {aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


#: Last part of the name of a layer that is a part of a fused projection.
ROLES = ("query", "key", "value")


def aliases(name: str) -> list[str]:
    """The names of a layer: its own and, of a part of a fused projection or of another layer (folding.py), the whole one's."""
    whole, _, part = name.rpartition(".")
    return [name, whole] if whole and (part in ROLES or re.fullmatch(r"channels_\d+_\d+", part)) else [name]


class _Mismatch(Exception):
    """Why something is not the attention that an int8 op computes."""


# ----------------------------------------------------------------------------------------------------------------------
# Views, run on indices


class _Sizes(fx.Interpreter):
    """Shapes of all tensors and values of all sizes, for one input."""

    def __init__(self, graph_module: fx.GraphModule, example: tuple):
        super().__init__(graph_module)
        self.values: dict[fx.Node, Any] = {}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            self.run(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example))

    def run_node(self, node):
        result = super().run_node(node)
        self.values[node] = tuple(result.shape) if isinstance(result, torch.Tensor) else result
        return result


@dataclasses.dataclass
class _Layout:
    """A tensor as views of another: index[...] is where in `origin`, flattened, the value lies; times `factor`."""

    origin: fx.Node
    index: torch.Tensor
    factor: float = 1.0

    @property
    def is_reshape(self) -> bool:
        return torch.equal(self.index.flatten(), torch.arange(self.index.numel()))


class _Views:
    def __init__(self, graph_module: fx.GraphModule, sizes: dict[fx.Node, Any]):
        self.graph_module, self.sizes = graph_module, sizes

    def scalar(self, node: fx.Node) -> float | None:
        """What a node multiplies its first argument with; None where it does anything else."""
        if node.op != "call_function" or node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) or node.kwargs:
            return None
        value = node.args[1]
        if isinstance(value, fx.Node):
            constant = attribute(self.graph_module, value)
            value = None if constant is None or constant.numel() != 1 or constant.dim() > 1 else float(constant)
        if not isinstance(value, (int, float)) or value == 0:
            return None
        return float(value) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / value

    @staticmethod
    def is_view(node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        picks = node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in _SPLITS
        return node.target in _VIEWS or node.target in _SPLITS or picks

    def move(self, node: fx.Node, index: Any) -> Any:
        """Runs a view on indices."""
        arguments, named = fx.map_arg((node.args[1:], node.kwargs), lambda n: self.sizes[n])
        return node.target(index, *arguments, **named)

    def positions(self, node: fx.Node) -> torch.Tensor:
        return torch.arange(math.prod(self.sizes[node])).reshape(self.sizes[node])

    def layout(self, node: fx.Node) -> _Layout:
        chain, factor = [], 1.0
        while True:
            scalar = self.scalar(node)
            if scalar is not None:
                factor *= scalar
            elif self.is_view(node):
                chain.append(node)
            else:
                break
            node = node.args[0]
        index = self.positions(node)
        for view in reversed(chain):
            index = self.move(view, index)
        return _Layout(node, index, factor)

    def rows(self, node: fx.Node) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        """(origin, row of the origin for each row of `node`): what views made it from with whole rows; the node itself."""
        found, width = self.layout(node), self.sizes[node][-1]
        index = found.index.reshape(-1, width)
        if found.factor == 1.0 and self.sizes[found.origin][-1] == width and bool((index == index[:, :1] // width * width + torch.arange(width)).all()):
            yield found.origin, index[:, 0] // width
        yield node, torch.arange(len(index))


# ----------------------------------------------------------------------------------------------------------------------
# Attention


@dataclasses.dataclass
class _Projection:
    """Where a query, key or value [groups, tokens, head_dim] comes from; a group is a head of an image."""

    role: str
    linear: fx.Node
    x: fx.Node  # [images, tokens, K]
    image: torch.Tensor  # [groups]
    columns: torch.Tensor  # [groups, head_dim], of the linear layer's output


def rewrite_attention(graph_module: fx.GraphModule, example: tuple) -> None:
    """Brings every attention that one int8 op can compute into the one form; leaves the others, with the reason in meta["reason"]."""
    cores = [node for node in graph_module.graph.nodes if node.op == "call_function" and (node.target is aten.scaled_dot_product_attention.default or node.target in _PRODUCTS)]
    if not cores:
        return
    views = _Views(graph_module, _Sizes(graph_module, example).values)
    for core in cores:
        try:
            operands = _operands(views, core)
            if operands is not None:
                _rewrite(graph_module, views, core, *operands)
        except _Mismatch as reason:
            core.meta["reason"] = str(reason)


def _operands(views: _Views, core: fx.Node) -> tuple[_Layout, _Layout, _Layout, float] | None:
    """(query, key, value, scale) of an attention whose last product is `core`, indices [groups, tokens, head_dim]; None if it is another product."""

    def grouped(layout: _Layout, transposed: bool = False) -> _Layout:
        index = layout.index.mT if transposed else layout.index
        return _Layout(layout.origin, index.reshape(-1, *index.shape[-2:]), layout.factor)

    if core.target is aten.scaled_dot_product_attention.default:
        query, key, value = (views.layout(node) for node in core.args[:3])
        if argument(core, 3, "attn_mask") is not None or argument(core, 5, "is_causal", False):
            raise _Mismatch("attention with a mask or a bias has no int8 kernel")
        if query.index.shape[:-2] != key.index.shape[:-2]:
            raise _Mismatch("attention whose heads share keys has no int8 kernel")
        scale = argument(core, 6, "scale")
        scale = query.index.shape[-1] ** -0.5 if scale is None else scale
    else:
        weights = views.layout(core.args[0])
        softmax = weights.origin
        if softmax.op != "call_function" or softmax.target not in (aten.softmax.int, aten._softmax.default):
            return None
        logits = views.layout(softmax.args[0])
        if logits.origin.op != "call_function" or logits.origin.target not in _PRODUCTS:
            raise _Mismatch("attention with a mask or a bias has no int8 kernel")
        query, key, value = views.layout(logits.origin.args[0]), views.layout(logits.origin.args[1]), views.layout(core.args[1])
        keys = key.index.shape[-1]
        along_keys = softmax.args[1] in (-1, len(views.sizes[softmax]) - 1) and views.sizes[softmax][-1] == keys == weights.index.shape[-1]
        if not (weights.is_reshape and logits.is_reshape and along_keys and weights.factor == 1.0 and query.index.shape[:-2] == key.index.shape[:-2]):
            raise _Mismatch("its attention weights are not those of one softmax over the keys")
        key, scale = grouped(key, transposed=True), logits.factor
    query, key, value = grouped(query), grouped(key), grouped(value)
    scale *= query.factor * key.factor
    if not scale > 0 or value.factor != 1.0 or query.index.shape[2] != value.index.shape[2]:
        raise _Mismatch("its logits have a scale that is not positive, or its values another size than its queries")
    return query, key, value, scale


def _projection(views: _Views, role: str, layout: _Layout) -> _Projection:
    linear, (_, tokens, _) = layout.origin, layout.index.shape
    if linear.target is not aten.linear.default or attribute(views.graph_module, linear.args[1]) is None:
        raise _Mismatch(f"its {role} is not the output of a linear layer")
    width = views.sizes[linear][-1]
    rows, columns = layout.index // width, layout.index % width
    if bool((rows == rows[:, :, :1]).all()) and bool((columns == columns[:, :1]).all()):
        for x, row_of in views.rows(linear.args[0]):
            found = row_of[rows[:, :, 0]]
            if len(views.sizes[x]) == 3 and views.sizes[x][1] == tokens and bool((found % tokens == torch.arange(tokens)).all()):
                return _Projection(role, linear, x, found[:, 0] // tokens, columns[:, 0])
    raise _Mismatch(f"its {role} does not hold the tokens of an image in their order")


def _rewrite(graph_module: fx.GraphModule, views: _Views, core: fx.Node, query: _Layout, key: _Layout, value: _Layout, scale: float) -> None:
    projections = [_projection(views, role, layout) for role, layout in zip(ROLES, (query, key, value), strict=True)]
    image = projections[0].image
    images, (groups, tokens, head_dim) = views.sizes[projections[0].x][0], query.index.shape
    heads = groups // images
    order = image.argsort(stable=True)  # groups by image, then head
    if any(not torch.equal(p.image, image) for p in projections) or not torch.equal(image[order], torch.arange(images).repeat_interleave(heads)):
        raise _Mismatch("its queries, keys and values are not those of the same images")
    for p in projections:
        columns = p.columns[order].reshape(images, heads * head_dim)
        if not bool((columns == columns[0]).all()):
            raise _Mismatch(f"its {p.role} takes other channels in other images")
        p.columns = columns[0]
    wanted = torch.arange(groups * tokens * head_dim).reshape(groups, tokens, head_dim)[order].reshape(images, heads, tokens, head_dim)
    end, projection = _end(views, core, wanted.transpose(1, 2).reshape(images, tokens, heads * head_dim))

    graph = graph_module.graph
    with graph.inserting_before(core):
        parts = [_heads(graph, _project(graph_module, p), heads) for p in projections]
        product = _call(graph, parts[0].meta["val"], aten.scaled_dot_product_attention.default, *parts, scale=scale)
        swapped = _call(graph, product.meta["val"].transpose(1, 2), aten.transpose.int, product, 1, 2)
        joined = _call(graph, projections[0].x.meta["val"].new_empty(swapped.meta["val"].flatten(2).shape), aten.flatten.using_ints, swapped, 2, 3)
        joined.meta["attention"] = module_path(core)
        if projection is not None:
            joined = _call(graph, end.meta["val"], aten.linear.default, joined, *projection.args[1:])
    end.replace_all_uses_with(joined)
    _erase(graph, end)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a node that nobody reads, and what nobody reads then. (Attention's dropout makes it look random: no dead code to torch.)"""
    pending, gone = [node], set()
    while pending:
        node = pending.pop()
        if node in gone or node.users or node.op == "placeholder":
            continue
        pending += node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)


def _end(views: _Views, core: fx.Node, wanted: torch.Tensor) -> tuple[fx.Node, fx.Node | None]:
    """The node that holds the attention's output as [images, tokens, channels], indices `wanted`, and None. Where the tokens come in
    another order, the node behind the next linear layer that has them in theirs, and that layer."""
    node, index, projection = core, views.positions(core), None
    while True:
        if torch.equal(index, wanted):
            return node, projection
        users = list(node.users)
        if len(users) != 1:
            break
        node = users[0]
        if views.is_view(node):
            index = views.move(node, index)
        elif node.target is aten.linear.default and projection is None:  # moves rows as they are
            rows, ordered = index.reshape(-1, index.shape[-1]), wanted.flatten(0, 1)
            if rows.shape != ordered.shape:
                break
            order = torch.zeros(wanted.numel(), dtype=torch.int64)
            order[ordered[:, 0]] = torch.arange(len(ordered))
            order = order[rows[:, 0]].clamp(0, len(ordered) - 1)
            if not torch.equal(ordered[order], rows):
                break
            projection, width = node, views.sizes[node][-1]
            index = (order[:, None] * width + torch.arange(width)).reshape(views.sizes[node])
            wanted = torch.arange(index.numel()).reshape(*wanted.shape[:2], width)
        else:
            break
    raise _Mismatch("its output is not put together as [images, tokens, channels]")


def _project(graph_module: fx.GraphModule, p: _Projection) -> fx.Node:
    """The linear layer of a query, key or value, with its channels in order; a part of the given one."""
    weight, bias = attribute(graph_module, p.linear.args[1]), argument(p.linear, 2, "bias")
    if p.x is p.linear.args[0] and torch.equal(p.columns, torch.arange(len(weight))):
        return p.linear
    name = f"{layer_name(p.linear)}.{p.role}"
    parameters = [new_parameter(graph_module, f"{name}.weight", weight[p.columns], f"{name}.weight")]
    if bias is not None:
        parameters.append(new_parameter(graph_module, f"{name}.bias", attribute(graph_module, bias)[p.columns], f"{name}.bias"))
    value = p.x.meta["val"]
    return _call(graph_module.graph, value.new_empty([*value.shape[:-1], len(p.columns)]), aten.linear.default, p.x, *parameters)


def _heads(graph: fx.Graph, rows: fx.Node, heads: int) -> fx.Node:
    """[images, tokens, channels] as [images, heads, tokens, head_dim]."""
    split = rows.meta["val"].unflatten(2, (heads, -1))
    node = _call(graph, split, aten.unflatten.int, rows, 2, [heads, int(split.shape[3])])
    return _call(graph, split.transpose(1, 2), aten.transpose.int, node, 1, 2)


def _call(graph: fx.Graph, value: torch.Tensor, target, *args, **kwargs) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    return node


def module_path(node: fx.Node) -> str:
    """Of the module whose forward holds the node; its name where that is not known."""
    stack = node.meta.get("nn_module_stack")
    return (list(stack.values())[-1][0] if stack else "") or node.name


@dataclasses.dataclass
class Attention:
    """An attention in the one form: its nodes, the projections that it reads, and what the op needs."""

    name: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    heads: int
    scale: float


def find_attention(output: fx.Node) -> Attention | None:
    """The attention that ends in this node."""
    if "attention" not in output.meta:
        return None
    swapped = output.args[0]
    product = swapped.args[0]
    transposes = list(product.args[:3])
    splits = [node.args[0] for node in transposes]
    shape = shape_of(splits[0])
    nodes = [*splits, *transposes, product, swapped, output]
    return Attention(output.meta["attention"], nodes, [node.args[0] for node in splits], shape[2], product.kwargs["scale"])


# ----------------------------------------------------------------------------------------------------------------------
# LayerNorm


def is_layer_norm(node: fx.Node) -> bool:
    """Whether a node is a LayerNorm over the last dimension alone, of rows."""
    return node.op == "call_function" and node.target is aten.layer_norm.default and len(node.args[1]) == 1 and len(shape_of(node.args[0]) or ()) >= 2


def norm_behind(add: fx.Node) -> fx.Node | None:
    """The LayerNorm that takes a residual add along: the first that reads it."""
    if add.target is not aten.add.Tensor or argument(add, 2, "alpha", 1) != 1:
        return None
    if not all(isinstance(a, fx.Node) and shape_of(a) == shape_of(add) for a in add.args[:2]):
        return None
    return next((user for user in add.users if is_layer_norm(user)), None)
