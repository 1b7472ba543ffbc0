"""Channel profiles: a static factor r_c per channel times the scale of each image, x = s_n r_c (q - z_n).

A per-tensor scale wastes codes on channels whose values are small. With a profile every channel fills its codes, at no cost
at run time: the layer that writes the tensor divides by r behind its activation, in the factor it multiplies with anyway
(pack_weight's output_profile), and the layer that reads it has r folded into its weights. That moves difficulty into those
weights, as in SmoothQuant (arXiv 2211.10438). And a channel that reaches its ceiling in few images wastes codes in all others, which matters
where noise in it is worth much at the network's output (influence.py). For a step of (sum_c (m_c / r_c)^k)^(1/k), m_c being the channels' ceilings
and g_c what noise is worth in them, the least noise, step^2 sum_c g_c r_c^2, is at r_c = m_c^(k / (k + 2)) g_c^(-1 / (k + 2)). So r_c = m_c^a / g_c^b,
and both powers are chosen by the noise at the output, with the weights' rounding error counted in, on images that r was not taken from, since few
images over-fit: a factor of its own for every channel, fitted to the same, does worse. Shifted copies of the images count in all of this: noise,
for one, reaches other channels than what it lies on.

A profile has no offset: a channel that varies little, far from 0, spends its codes on its mean (one of EfficientNet-lite0's stem, 2.7 +- 0.04 to 0.2, makes
most of its noise under low contrast). Without the mean, the 0 that the layer behind pads with has no code: every kernel would need a bias by border.

Tensors that are added or pass on share one profile (a variable, here); a concatenation has those of its inputs, one behind the
other. Tensors that concatenations join have their power chosen together: a component.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from ._ops import Activation
from .graph import PASSES_THROUGH, Unit, reads_codes, shape_of
from .influence import Look, channel_axis

_POWERS = [(a, b) for a in (0.0, 0.25, 0.5, 0.75, 1.0) for b in (0.0, 0.0625, 0.125)]
_QUANTILE = 0.95  # of a channel's largest value over the images: one odd image must not set it
_FLOOR = 1.0 / 64  # least factor of a channel, relative to the largest: dead channels stay harmless
_FOLDS = 4  # of the images, each scored with profiles of the others
_CERTAIN = 2.0  # standard errors that a profile must gain
_LINEAR = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "flatten")  # one factor per channel passes through


@dataclasses.dataclass
class Component:
    """Tensors whose profiles belong together.

    tensors: (variable, positions) of every run of channels: channel c of the variable stands for that many features, more
    than one behind a flatten. rounded: those of them that are rounded anew. producers: layers and LayerNorms, with the variable they
    write. consumers: layers, which read one of the tensors.
    """

    tensors: dict[fx.Node, list[tuple[int, int]]]
    rounded: list[fx.Node]
    producers: list[tuple[Unit, int]]
    consumers: list[Unit]
    axes: dict[fx.Node, int]  # where each tensor has its channels

    @property
    def per_image(self) -> bool:
        """Whether an image's values share a scale, as _noise() holds: of tokens' steps, each with its own, only the largest is known, which tells
        little of what a channel that seldom reaches its ceiling gains by finer codes (ViT-S lost 0.2 to 1.3 dB that it was held to gain)."""
        return all(axis == 1 for axis in self.axes.values())

    def profile(self, node: fx.Node, variables: dict[int, torch.Tensor]) -> torch.Tensor:
        """The profile of a tensor, [..., features], from those of the variables, [..., channels]."""
        return torch.cat([variables[v].repeat_interleave(positions, -1) for v, positions in self.tensors[node]], -1)


class _Partition:
    """Disjoint sets of integers."""

    def __init__(self):
        self.parent: list[int] = []

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return self.parent[-1]

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        self.parent[self.root(i)] = self.root(j)


def _scales_freely(unit: Unit) -> bool:
    """Whether its activation commutes with positive factors; a layer's own activation need not, its epilogue divides behind it."""
    return unit.activation is Activation.CLAMP and unit.activation_min in (None, 0.0) and unit.activation_max is None


def find_components(units: list[Unit]) -> list[Component]:
    """Components of int8 tensors that can have profiles: layers write them, and nothing but layers multiplies or bends them."""
    int8 = [unit for unit in units if unit.int8]
    by_output = {unit.output: unit for unit in int8 if unit.quantized_output}
    inside = {node for unit in int8 for node in unit.nodes}
    variables, related = _Partition(), _Partition()  # equal profiles; powers chosen together
    widths: list[int] = []
    runs: dict[fx.Node, list[tuple[int, int]]] = {}
    barred: set[int] = set()

    def new(width: int) -> int:
        widths.append(width)
        related.new()
        return variables.new()

    def bar(node: fx.Node) -> None:
        barred.update(v for v, _ in runs.get(node, ()))

    def equal(a: fx.Node, b: fx.Node) -> None:
        if a not in runs or b not in runs:
            bar(a), bar(b)
            return
        if [(widths[v], p) for v, p in runs[a]] != [(widths[v], p) for v, p in runs[b]]:
            bar(a), bar(b)
        for (v, _), (w, _) in zip(runs[a], runs[b], strict=False):
            related.join(v, w)
            if widths[v] == widths[w]:
                variables.join(v, w)

    weights: dict[int, int] = {}
    for unit in int8:
        if unit.is_layer:
            weights[id(unit.anchor.args[1])] = weights.get(id(unit.anchor.args[1]), 0) + 1
    for unit in int8:
        output, source = unit.output, unit.inputs[0]
        if unit.is_layer:
            shared = weights[id(unit.anchor.args[1])] > 1
            if shared or (source in by_output and not reads_codes(unit, by_output[source])):
                bar(source)
            if output in by_output:
                runs[output] = [(new(unit.weight.shape[0]), 1)]
                if shared:
                    bar(output)
            if unit.residual is not None:
                equal(unit.residual, output)
            continue
        if unit.kind == "layer_norm":  # divides by the profile behind its own scale and shift; reads floats
            for node in unit.inputs:
                bar(node)
            if output in by_output:
                runs[output] = [(new(shape_of(output)[-1]), 1)]
            continue
        if output not in by_output:
            for node in unit.inputs:
                bar(node)
            continue
        if unit.kind == "attention":  # the channels of queries and keys meet each other; the values' pass through
            query, key, value = unit.inputs
            bar(query), bar(key)
            if value in runs:
                runs[output] = runs[value]
            continue
        if unit.kind == "add" and _scales_freely(unit):
            equal(*unit.inputs)
            runs[output] = runs.get(source) or [(new(1), 1)]
        elif unit.kind == "concat" and all(node in runs for node in unit.inputs):
            runs[output] = [run for node in unit.inputs for run in runs[node]]
            for v, _ in runs[output]:
                related.join(v, runs[output][0][0])
        elif unit.kind == "mul" and source in runs:  # the second factor has none
            runs[output] = list(runs[source])
            bar(unit.inputs[1])
        elif (unit.kind in _LINEAR or (unit.kind == "activation" and _scales_freely(unit))) and source in runs:
            before, after = shape_of(source), shape_of(output)
            positions = after[-1] // before[1] if len(after) == 2 and len(before) == 4 else 1
            runs[output] = [(v, p * positions) for v, p in runs[source]]
        else:  # what bends or mixes channels
            for node in unit.inputs:
                bar(node)
    for node in runs:
        if any(user not in inside for user in node.users):  # read as floats
            bar(node)

    closed = {related.root(v) for v in barred}
    components: dict[int, Component] = {}
    for node, segments in runs.items():
        key = related.root(segments[0][0])
        if key not in closed:
            component = components.setdefault(key, Component({}, [], [], [], {}))
            component.tensors[node] = [(variables.root(v), p) for v, p in segments]
            unit = by_output[node]
            component.axes[node] = channel_axis(node, unit)
            if unit.kind not in PASSES_THROUGH:
                component.rounded.append(node)
            if unit.is_layer or unit.kind == "layer_norm":
                component.producers.append((unit, variables.root(segments[0][0])))
    for unit in int8:
        if unit.is_layer and unit.inputs[0] in runs:
            component = components.get(related.root(runs[unit.inputs[0]][0][0]))
            if component is not None:
                component.consumers.append(unit)
    return [component for component in components.values() if component.consumers]


def input_factors(unit: Unit, profile: torch.Tensor) -> torch.Tensor:
    """`profile` [C] as a factor of the canonical weight [O, ..., I / groups]: row o holds the inputs of its group."""
    weight, groups = unit.weight, unit.options.get("groups", 1)
    rows = profile.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # [O, I / groups]
    return rows.reshape(weight.shape[0], *[1] * (weight.dim() - 2), weight.shape[-1])


def _noise(component: Component, look: Look, variables: dict[int, torch.Tensor], samples: torch.Tensor) -> torch.Tensor:
    """[of the samples]: noise at the network's output from rounding the tensors and the weights that read them, with these profiles."""
    total = torch.zeros(int(samples.sum()), dtype=torch.float64)
    for node in component.rounded:
        total += look.seen[node].rounding(component.profile(node, variables))[samples]
    for unit in component.consumers:
        total += look.weight_noise(unit, input_factors(unit, component.profile(unit.inputs[0], variables)), samples)
    return total


def _ceilings(component: Component, look: Look, samples: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each variable's channels reach in almost all of the samples, as a share of each sample's largest: the scale is its own."""
    reached = {node: torch.maximum(look.seen[node].largest, -look.seen[node].least)[samples] for node in component.tensors}
    largest = torch.stack([part.amax(1) for part in reached.values()]).amax(0).clamp(min=1e-30)
    result: dict[int, torch.Tensor] = {}
    for node, segments in component.tensors.items():
        shares = (reached[node] / largest[:, None]).quantile(_QUANTILE, dim=0)
        for part, (v, positions) in zip(shares.split([_width(component, v) * p for v, p in segments]), segments, strict=True):
            part = part.reshape(-1, positions).amax(1)
            result[v] = torch.maximum(result[v], part) if v in result else part
    highest = max(float(part.max()) for part in result.values())
    return {v: (part / max(highest, 1e-30)).clamp(min=_FLOOR) for v, part in result.items()}


def _worths(component: Component, look: Look, samples: torch.Tensor, usual: torch.Tensor) -> dict[int, torch.Tensor]:
    """What noise of a share of each sample's largest value is worth in each variable's channels at the network's output: mean of the samples, each
    over its usual noise, relative to the mean channel. usual [weighed samples]: noise without profiles."""
    result: dict[int, torch.Tensor] = {}
    mine = samples[look.weighed]
    for node in component.rounded:
        seen = look.seen[node]
        largest = torch.maximum(seen.largest, -seen.least)[samples & look.weighed].amax(1, keepdim=True)
        worth = (seen.gain[samples & look.weighed] * largest.square() / usual[mine, None]).mean(0)
        segments = component.tensors[node]
        for part, (v, positions) in zip(worth.split([_width(component, v) * p for v, p in segments]), segments, strict=True):
            result[v] = result.get(v, 0.0) + part.reshape(-1, positions).sum(1)
    mean = sum(float(part.sum()) for part in result.values()) / sum(len(part) for part in result.values())
    return {v: (part / max(mean, 1e-30)).clamp(min=_FLOOR) for v, part in result.items()}


def _factors(ceilings: dict[int, torch.Tensor], worths: dict[int, torch.Tensor], powers: tuple[float, float]) -> dict[int, torch.Tensor]:
    return {v: part ** powers[0] / worths[v] ** powers[1] for v, part in ceilings.items()}


def _width(component: Component, variable: int) -> int:
    return next(_channels(unit) for unit, v in component.producers if v == variable)


def _channels(unit: Unit) -> int:
    return unit.weight.shape[0] if unit.is_layer else shape_of(unit.output)[-1]


def usual_noise(components: list[Component], look: Look) -> torch.Tensor:
    """[weighed samples]: noise at the network's output without profiles, which noise with them is measured in."""
    none = [{v: torch.ones(_width(component, v), dtype=torch.float64) for _, v in component.producers} for component in components]
    total = torch.zeros(int(look.weighed.sum()), dtype=torch.float64)
    return sum((_noise(component, look, variables, look.weighed) for component, variables in zip(components, none, strict=True)), total).clamp(min=1e-30)


def choose_powers(components: list[Component], look: Look, usual: torch.Tensor) -> list[tuple[float, float]]:
    """For every component the powers of its ceilings and worths that leave the network's output the least noise, on samples that these were not
    taken from: each sample's over what it has without profiles (usual, of usual_noise()), each kind of shift as much as the others and the samples
    as they are. A power of the worths loses under none of them. 0 where the gain may be chance: below twice its standard error."""
    folds = min(_FOLDS, len(look.source.unique()))
    if folds < 2 or not components:
        return [_POWERS[0]] * len(components)
    shares = torch.zeros(len(components), len(_POWERS), len(usual), dtype=torch.float64)
    for fold in range(folds):
        held_out = look.source % folds == fold
        judged, mine = held_out & look.weighed, held_out[look.weighed]
        for c, component in enumerate(components):
            ceilings, worths = _ceilings(component, look, ~held_out), _worths(component, look, ~held_out, usual)
            for p, powers in enumerate(_POWERS):
                if powers[1] == 0.0 or component.per_image:
                    shares[c, p, mine] = _noise(component, look, _factors(ceilings, worths, powers), judged) / usual[mine]
                else:
                    shares[c, p, mine] = torch.inf
    version = look.version[look.weighed]
    counts = version.bincount()
    weights = 1.0 / (counts[version] * (counts > 0).sum())  # which sum to 1
    best = _least(shares, weights, version)
    gains = shares[:, 0] - shares[torch.arange(len(components)), best]
    gain = (gains * weights).sum(1, keepdim=True)
    sources = look.source[look.weighed]
    spread = torch.zeros(len(components), int(sources.max()) + 1, dtype=torch.float64).index_add_(1, sources, (gains - gain) * weights)
    error = spread.square().sum(1).sqrt()  # a sample and its shifted copies are not independent: they count together
    return [_POWERS[p] if certain else _POWERS[0] for p, certain in zip(best.tolist(), (gain[:, 0] > _CERTAIN * error).tolist(), strict=True)]


def _least(shares: torch.Tensor, weights: torch.Tensor, version: torch.Tensor) -> torch.Tensor:
    """[components]: which of _POWERS has the least weighted share [components, powers, samples]. What makes up for losses under one kind of shift
    by gains under another is passed over in favour of ceilings alone."""
    means = (shares * weights).sum(2)
    alone = torch.tensor([powers[1] == 0.0 for powers in _POWERS])
    usual = means.masked_fill(~alone, torch.inf).argmin(1)
    for kind in version.unique():
        of_kind = shares[:, :, version == kind].mean(2)
        means = means.masked_fill(of_kind > of_kind.gather(1, usual[:, None]), torch.inf)
    return means.argmin(1)


def apply_profiles(components: list[Component], powers: list[tuple[float, float]], look: Look, usual: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    """Gives the layers around each component its profile: producers get their `output_profile`, consumers have it folded into their
    weights. Returns the profile of every tensor that has one, float32, shaped to divide the tensor. The float graph stays as it is."""
    result: dict[fx.Node, torch.Tensor] = {}
    everything = torch.ones_like(look.clean)
    for component, chosen in zip(components, powers, strict=True):
        if chosen == _POWERS[0]:
            continue
        variables = _factors(_ceilings(component, look, everything), _worths(component, look, everything, usual), chosen)
        variables = {v: part.float() for v, part in variables.items()}
        for unit, variable in component.producers:
            unit.output_profile = variables[variable]
        for unit in component.consumers:
            unit.weight = unit.weight * input_factors(unit, component.profile(unit.inputs[0], variables))
        for node in component.tensors:
            profile = component.profile(node, variables)
            result[node] = profile.reshape(-1, 1, 1) if component.axes[node] == 1 else profile
    return result
