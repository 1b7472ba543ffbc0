"""Channel profiles: a static factor r_c per channel times the scale of each image, x = s_n r_c (q - z_n).

A per-tensor scale wastes codes on channels whose values are small. With a profile every channel fills its codes, at no cost
at run time: r is folded into the weights of the layers before (divided by r) and behind (multiplied by r), so the network
computes the same function and every kernel stays as it is. Folding moves difficulty into the weights behind, as in
SmoothQuant (arXiv 2211.10438): the power of r is chosen with their rounding error counted in.

Tensors that are added, pooled or passed on share one profile: they form a group.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from .graph import Unit, reads_codes

_POWERS = (0.0, 0.25, 0.5)
_QUANTILE = 0.95  # of a channel's largest value over the images: one odd image must not set it
_SHRINKAGE = 8  # a profile of n images gets n / (n + 8) of its power: few images over-fit
_FLOOR = 1.0 / 64  # least factor of a channel, relative to the largest: dead channels stay harmless


@dataclasses.dataclass
class Group:
    """Tensors with one profile: who writes them, who multiplies them with weights."""

    outputs: list[fx.Node]
    producers: list[Unit]
    consumers: list[Unit]


class _Observation:
    """Of one tensor, per channel: the largest magnitude in every image, and the mean square."""

    def __init__(self):
        self.largest: list[torch.Tensor] = []
        self.squares, self.count = 0.0, 0

    def update(self, x: torch.Tensor) -> None:
        x = x.float()
        flat = x.flatten(2) if x.dim() == 4 else x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)  # [N, C, positions]
        self.largest.extend(flat.abs().amax(2))
        self.squares = self.squares + flat.double().pow(2).sum((0, 2))
        self.count += flat.shape[0] * flat.shape[2]

    def mean_square(self) -> torch.Tensor:
        return self.squares / max(self.count, 1)

    def ceiling(self) -> torch.Tensor:
        return torch.stack(self.largest).quantile(_QUANTILE, dim=0)


def find_groups(units: list[Unit]) -> list[Group]:
    """Groups of int8 tensors that can have a profile: all their writers are layers that scale freely, all their readers layers."""
    int8 = [unit for unit in units if unit.int8]
    by_output = {unit.output: unit for unit in int8 if unit.quantized_output}
    inside = {node for unit in int8 for node in unit.nodes}
    parent = {node: node for node in by_output}

    def root(node):
        while parent[node] is not node:
            node = parent[node]
        return node

    barred: set[fx.Node] = set()  # roots may move: checked at the end
    weights: dict[int, int] = {}
    for unit in int8:
        if unit.is_layer:
            weights[id(unit.anchor.args[1])] = weights.get(id(unit.anchor.args[1]), 0) + 1
    for unit in int8:
        joined = [unit.residual] if unit.residual is not None else [] if unit.is_layer else list(unit.inputs)
        scales_freely = unit.activation.name == "CLAMP" and unit.activation_min in (None, 0.0) and unit.activation_max is None
        if unit.kind in ("concat", "activation") or not scales_freely or (unit.kind == "flatten" and tuple(unit.inputs[0].meta["val"].shape[2:]) != (1, 1)):
            barred.update(n for n in (*joined, unit.output) if n in parent)
        if unit.output in parent:
            for node in joined:
                parent[root(node)] = root(unit.output)
    for node in parent:
        in_float = any(unit.is_layer and node in unit.inputs and not reads_codes(unit, by_output[node]) for unit in int8)
        if in_float or any(user not in inside for user in node.users):
            barred.add(node)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in parent:
        members.setdefault(root(node), []).append(node)
    closed = {root(node) for node in barred}
    groups = []
    for key, outputs in members.items():
        if key in closed:
            continue
        producers = [by_output[node] for node in outputs if by_output[node].is_layer]
        consumers = [unit for unit in int8 if unit.is_layer and unit.inputs[0] in outputs]
        shared = any(weights[id(unit.anchor.args[1])] > 1 for unit in (*producers, *consumers))
        if producers and consumers and not shared:
            groups.append(Group(outputs, producers, consumers))
    return groups


def input_factors(unit: Unit, profile: torch.Tensor) -> torch.Tensor:
    """`profile` [C] as a factor of the canonical weight [O, ..., I / groups]: row o holds the inputs of its group."""
    weight, groups = unit.weight, unit.options.get("groups", 1)
    rows = profile.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # [O, I / groups]
    return rows.reshape(weight.shape[0], *[1] * (weight.dim() - 2), weight.shape[-1])


def _noise(consumer: Unit, profile: torch.Tensor, step: float, mean_square: torch.Tensor) -> float:
    """Noise of a consumer's output over its signal: from rounding its input (step * profile per channel) and its weights."""
    weight = consumer.weight.double()
    factors = input_factors(consumer, profile)
    folded = (weight * factors).reshape(len(weight), -1)
    scale = (folded.abs().amax(1, keepdim=True) / 127.0).clamp(min=1e-30)
    rounding = ((torch.round(folded / scale) * scale - folded).reshape(weight.shape) / factors).pow(2)
    power = input_factors(consumer, mean_square)
    signal = (weight.pow(2) * power).sum()
    from_input = (weight * factors).pow(2).sum() * step**2 / 12.0
    return float((from_input + (rounding * power).sum()) / signal.clamp(min=1e-30))


def choose_profile(group: Group, observations: dict[fx.Node, _Observation]) -> torch.Tensor:
    """float64 [C]: the ceiling of each channel to the power that leaves the consumers the least noise; largest entry 1."""
    ceiling = torch.stack([observations[node].ceiling().double() for node in group.outputs]).amax(0)
    ceiling = (ceiling / ceiling.max().clamp(min=1e-30)).clamp(min=_FLOOR)
    largest = torch.stack([torch.stack(observations[node].largest).amax(0).double() for node in group.outputs]).amax(0)
    best, best_noise = torch.ones_like(ceiling), float("inf")
    images = len(observations[group.outputs[0]].largest)
    for power in _POWERS:
        profile = ceiling ** (power * images / (images + _SHRINKAGE))
        step = 2.0 * float((largest / profile).max()) / 255.0
        noise = sum(_noise(unit, profile, step, observations[unit.inputs[0]].mean_square()) for unit in group.consumers)
        if noise < best_noise:
            best, best_noise = profile, noise
    return best


def apply_profiles(graph_module: fx.GraphModule, units: list[Unit], batches) -> dict[fx.Node, torch.Tensor]:
    """Folds a profile into the layers around every group; `batches` are tuples of the model's inputs.

    The float graph computes the same function afterwards, with tensors divided by their profile. Returns the profile
    (float32 [C]) of every tensor that has one.
    """
    groups = find_groups(units)
    observations = {node: _Observation() for group in groups for node in group.outputs}

    class Observer(fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node in observations:
                observations[node].update(result)
            return result

    if not groups:
        return {}
    with torch.no_grad():
        for inputs in batches:
            Observer(graph_module).run(*inputs)
    result: dict[fx.Node, torch.Tensor] = {}
    for group in groups:
        profile = choose_profile(group, observations)
        if bool((profile == 1.0).all()):
            continue
        for unit in group.producers:
            unit.weight = (unit.weight.double() / profile.reshape(-1, *[1] * (unit.weight.dim() - 1))).float()
            unit.bias = None if unit.bias is None else (unit.bias.double() / profile).float()
        for unit in group.consumers:
            unit.weight = (unit.weight.double() * input_factors(unit, profile)).float()
        result.update({node: profile.float() for node in group.outputs})
    for unit in {id(u): u for g in groups for u in (*g.producers, *g.consumers)}.values():
        _rewire(graph_module, unit)
    graph_module.recompile()
    return result


def _rewire(graph_module: fx.GraphModule, unit: Unit) -> None:
    """Lets the float graph's layer read the unit's weight and bias."""
    weight = unit.weight.permute(0, 3, 1, 2).contiguous() if unit.kind == "conv2d" else unit.weight
    arguments = list(unit.anchor.args)
    for position, (leaf, value) in enumerate((("weight", weight), ("bias", unit.bias)), start=1):
        if value is None:
            continue
        name = f"profiled_{unit.anchor.name}_{leaf}"
        graph_module.register_buffer(name, value)
        with graph_module.graph.inserting_before(unit.anchor):
            node = graph_module.graph.get_attr(name)
        node.meta["val"] = value
        arguments[position] = node
    unit.anchor.args = tuple(arguments)
