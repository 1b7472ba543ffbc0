"""Reading the nodes of a traced graph: arguments, shapes, parameters, names."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def attribute(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(node.target)(graph_module)
    return value.detach() if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen node, given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def shape_of(node: fx.Node) -> tuple | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def same_size(a, b) -> bool:
    """Of two sizes that may be symbolic: compared without a guard."""
    return str(a) == str(b)


def check_sizes(what: str, inputs, sizes: list[list[int | None] | None] | None) -> None:
    """Raises ValueError unless a graph's inputs have the sizes it computes with; None: any."""
    if not all(isinstance(x, torch.Tensor) for x in inputs):
        inputs = pytree.tree_leaves(inputs)
    for i, (x, wanted) in enumerate(zip(inputs, sizes or (), strict=False)):
        if wanted is None or not isinstance(x, torch.Tensor):
            continue
        if len(x.shape) != len(wanted) or any(size != want and want is not None for size, want in zip(x.shape, wanted, strict=True)):
            text = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(f"probquant: {what} has shape {list(x.shape)} for input {i}, want [{text}]: the model computes with the sizes it was captured with")


def fixes_batch(graph: fx.Graph) -> bool:
    """Whether the graph of a model runs on as many samples as it was traced with, and no others."""
    return isinstance(shape_of(next(node for node in graph.nodes if node.op == "placeholder"))[0], int)


def layer_name(node: fx.Node, weight: Any = None) -> str:
    """The module path of a layer, from its weight's name (`weight`, or the second argument); the node's name where there is none."""
    if weight is None and len(node.args) > 1:
        weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        path = weight.meta.get("parameter", weight.target)
        return path.rsplit(".", 1)[0] if "." in path else path
    return node.name


def new_parameter(graph_module: fx.GraphModule, name: str, value: torch.Tensor, parameter: str) -> fx.Node:
    """A get_attr node, at the graph's insertion point, for a tensor that was made of the parameter `parameter`."""
    name = name.replace(".", "_")
    while hasattr(graph_module, name):
        name += "_"
    graph_module.register_buffer(name, value)
    node = graph_module.graph.create_node("get_attr", name)
    node.meta["parameter"] = parameter
    return node
