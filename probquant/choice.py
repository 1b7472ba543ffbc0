"""What surrogate="auto" takes for every layer: cheap ranges, as many as leave the network about as good as one with exact ranges.

A layer's loss says little about the network's. So every candidate's noise, measured in calibration, is weighed by what noise in that
tensor is worth at the output (influence.py), and the layers climb from their cheapest candidates in the order of noise saved per
nanosecond. How far they have to climb is measured: the int8 network itself runs on calibration samples, as they are and under each kind of
shift, with widths that were fitted to other samples, and bisection, as if more steps were never worse, finds where it is good enough (Target):
not behind dynamic quantization, exact ranges without profiles, and hardly behind exact ranges with profiles, which are the top of the ladder (no
more is asked for than these reach). Every layer has its profile at every step. Where the output tells nothing (it has no floating-point tensor with
a row per sample, or is all 0), all ranges are exact.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from ._ops import Strategy
from .graph import Unit
from .metrics import joined_outputs, sqnr
from .model import QuantizedModel
from .nodes import fixes_batch
from .shifts import KINDS
from .surrogates import Candidate

_JUDGED_VALUES = 65537  # of each output of a sample, evenly spaced (a prime, so that the spacing follows no row)
_BEHIND = 0.3  # dB that the output's mean SQNR may be behind exact ranges with profiles
_BEHIND_SOMEWHERE = 0.5  # the same of one version alone, and of the lowest samples; these may be behind dynamic quantization's by as much
_LOWEST = 0.05  # of the samples are the lowest
PREDICTOR_SHARE = 0.02  # of the weights' bytes that all predictors may take


@dataclasses.dataclass(frozen=True)
class Cost:
    """Nanoseconds beyond those of a fixed range: of a call, and of each value of the output and of the input, channel of either, multiply-accumulate."""

    call: float = 0.0
    output: float = 0.0
    input: float = 0.0
    out_channel: float = 0.0
    in_channel: float = 0.0
    mac: float = 0.0

    def of(self, outputs: int, inputs: int, out_channels: int, in_channels: int, macs: float) -> float:
        return (
            self.call + self.output * outputs + self.input * inputs + self.out_channel * out_channels + self.in_channel * in_channels + self.mac * macs
        )


#: As benchmarks/costs.py fits them to the convolutions of MobileNetV2 and ResNet-50, on one core with AMX; a law per channel was held for no
#: cheaper per call than one for all. What a prediction takes per call is held for too much: that fit counted what noise made positive alone, and
#: shuffled triples of calls (fixed, gaussian, a second fixed as the control) of MobileNetV2's layers say 120 to 190 ns. With 150 EfficientNet-lite0 and
#: YOLOX-nano reach the same for the same, and SSD-MobileNetV2 climbs to 629 us over fixed ranges instead of 430: auto goes by how costs compare, so
#: that all of them want to be fitted anew at once, on a quiet machine.
COSTS = {
    Strategy.FIXED: Cost(),
    Strategy.GAUSSIAN: Cost(call=315.0),
    Strategy.GAUSSIAN_CHANNEL: Cost(call=315.0, out_channel=11.9),
    Strategy.CHANNEL: Cost(call=315.0, in_channel=3.3),
    Strategy.PROBE: Cost(call=1070.0, output=0.025, out_channel=5.3, mac=0.98e-4),
    Strategy.DYNAMIC: Cost(output=0.139, out_channel=3.9),
}
PATCH_SUMS = Cost(call=755.0, input=0.0039)  # of a gamma beyond 0, as well
CHANNEL_STATS = Cost(call=1340.0, input=0.164, in_channel=22.8)  # of `channel`, as well: paid by the layer that writes the input


def cost(candidate: Candidate, outputs: int, inputs: int, unit: Unit) -> float:
    """What a candidate's range costs, in nanoseconds per sample, beside a fixed one's."""
    sizes = (outputs, inputs, 0, 0, 0.0)
    if unit.is_layer:
        out_channels = unit.weight.shape[0]
        sizes = (outputs, inputs, out_channels, unit.weight.shape[-1] * unit.options["groups"], outputs * unit.weight.numel() / out_channels)
    parts = [COSTS[candidate.strategy], *([PATCH_SUMS] if candidate.gamma else ()), *([CHANNEL_STATS] if candidate.strategy is Strategy.CHANNEL else ())]
    return sum(part.of(*sizes) for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# The ladder


@dataclasses.dataclass
class Option:
    """A candidate of a layer: its noise as a share of the noise at the network's output, its price in ns, and the bytes of its predictor."""

    noise: float
    cost: float
    size: int


@dataclasses.dataclass
class Step:
    """From one of a layer's options to a better one: what of the output's noise it saves per nanosecond."""

    layer: int
    option: int
    slope: float


def ladder(layers: Sequence[Sequence[Option]], exact: Sequence[int], budget: float) -> tuple[list[int], list[Step]]:
    """(the cheapest option of each layer; steps from there, the most rewarding first, to the exact ranges of all).

    Along the lower convex hull of a layer's options each step is worth less than the one before, so any beginning of the list is the
    least noise for its cost. A step that takes the predictors beyond `budget` bytes is left out.
    """
    cheapest = [min(range(len(options)), key=lambda i: (options[i].cost, options[i].noise)) for options in layers]
    steps = []
    for number, options in enumerate(layers):
        at = cheapest[number]
        while better := [i for i, option in enumerate(options) if option.noise < options[at].noise and option.cost > options[at].cost]:
            slopes = {i: (options[at].noise - options[i].noise) / (options[i].cost - options[at].cost) for i in better}
            at = max(better, key=slopes.__getitem__)
            steps.append(Step(number, at, slopes[at]))
        if at != exact[number]:
            steps.append(Step(number, exact[number], min(0.0, options[at].noise - options[exact[number]].noise)))
    steps.sort(key=lambda step: -step.slope)
    now, used, kept = list(cheapest), sum(layers[number][i].size for number, i in enumerate(cheapest)), []
    for step in steps:
        grown = used + layers[step.layer][step.option].size - layers[step.layer][now[step.layer]].size
        if grown <= max(budget, used):
            kept.append(step)
            now[step.layer], used = step.option, grown
    return cheapest, kept


def climb(cheapest: Sequence[int], steps: Sequence[Step], count: int) -> list[int]:
    """Each layer's option after the first `count` steps."""
    chosen = list(cheapest)
    for step in steps[:count]:
        chosen[step.layer] = step.option
    return chosen


def fewest(good: Callable[[int], bool], most: int) -> int:
    """Where `good` begins between 0 and `most`, which is good without asking: by bisection, after a try of 0."""
    if most == 0 or good(0):
        return 0
    bad, enough = 0, most
    while enough - bad > 1:
        count = (enough + bad) // 2
        bad, enough = (bad, count) if good(count) else (count, enough)
    return enough


# ----------------------------------------------------------------------------------------------------------------------
# The network's output


class Trial(fx.Interpreter):
    """An int8 model whose layers take other ranges from call to call."""

    def __init__(self, qmodel: QuantizedModel, channel_layers: set[str]):
        """channel_layers: the names of those that may read channel stats."""
        super().__init__(qmodel)
        self.producers = {node.args[3].args[0] for node in qmodel.graph.nodes if node.meta.get("layer") in channel_layers}
        self.ranges: dict[str, dict] = {}

    def with_ranges(self, ranges: dict[str, dict]) -> Trial:
        """ranges: by name of the layer, the keyword arguments of its op that say where its range comes from."""
        self.ranges = ranges
        return self

    def __call__(self, *inputs):
        return self.run(*inputs)

    def run_node(self, node: fx.Node):
        given = self.ranges.get(node.meta.get("layer"))
        if given is None and node not in self.producers:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        kwargs = {**kwargs, **(given or {})}
        if node in self.producers:
            kwargs["channel_stats"] = True
        return node.target(*args, **kwargs)


class Judges:
    """Calibration samples with the float network's outputs on them, as they are and under every kind of shift."""

    NAMES = ("clean", "contrast", "dark", "bright", "noise")

    def __init__(self, graph_module: fx.GraphModule, chunks: Sequence[tuple], shifted: Callable[[tuple, int], list[tuple]]):
        self.chunks, self.shifted, self.whole = chunks, shifted, fixes_batch(graph_module.graph)
        self.wanted = list(self._outputs(lambda half: graph_module))

    def _outputs(self, model: Callable[[int], Callable]) -> Iterator[tuple[list[int], int, torch.Tensor]]:
        """(numbers of samples, how often their shift has moved on, their outputs [samples, values]): of every chunk, as it is (-1) and with
        every sample shifted in every way, one half after the other."""
        number = 0
        for chunk in self.chunks:
            numbers = number + torch.arange(chunk[0].shape[0])
            halves = numbers // KINDS % 2
            for shift in range(-1, KINDS):
                for inputs in (chunk,) if shift < 0 else self.shifted(chunk, number + shift):
                    for half in halves.unique().tolist():
                        mine = halves == half
                        part = inputs if self.whole else tuple(x[mine] if isinstance(x, torch.Tensor) and x.dim() and len(x) == len(mine) else x for x in inputs)
                        with torch.no_grad():
                            outputs = joined_outputs(model(half)(*part), part[0].shape[0], _JUDGED_VALUES)
                        yield numbers[mine].tolist(), shift, outputs[mine] if self.whole else outputs
            number += len(numbers)

    def decibels(self, model: Callable[[int], Callable]) -> torch.Tensor:
        """SQNR of the output, [versions in the order of NAMES, samples]. model(half): what runs on the samples of that half (see RangeFit)."""
        found: list[dict[int, torch.Tensor]] = [{} for _ in range(1 + KINDS)]
        for (numbers, shift, wanted), (_, _, outputs) in zip(self.wanted, self._outputs(model), strict=True):
            for number, value in zip(numbers, sqnr(wanted, outputs), strict=True):
                found[0 if shift < 0 else 1 + (number + shift) % KINDS][number] = value
        return torch.stack([torch.stack([values[number] for number in sorted(values)]) for values in found if values])


def means(decibels: torch.Tensor) -> list[float]:
    """Of each version; those whose outputs are all 0, or nothing that depends on the sample, are left out: nothing can be told."""
    return [float(values.nanmean()) for values in decibels if not values.isnan().all()]


def lowest(decibels: torch.Tensor) -> float:
    """Mean of the lowest twentieth of all samples of all versions."""
    values = decibels[~decibels.isnan()].sort().values
    return float(values[: max(1, round(_LOWEST * len(values)))].mean())


@dataclasses.dataclass
class Target:
    """SQNR that a network must reach: the means of all versions together and of each, and of the lowest few samples."""

    together: float
    each: list[float]
    lowest: float

    @staticmethod
    def of(profiled: torch.Tensor, dynamic: torch.Tensor) -> Target:
        """From the SQNR with exact ranges, with profiles and without. The former is the top of the ladder: no more is asked for.

        Where no profile gains, both are the same and nothing is allowed below it: the mean would be let go for time. A standard error of
        the paired difference would let ResNet-20 stop at 30 of 32 steps, for 29 us over fixed ranges instead of 31, and up to 0.2 dB less.
        """

        def wanted(a: float, b: float, behind: float) -> float:
            return min(a, max(a - behind, b))

        pairs = list(zip(means(profiled), means(dynamic), strict=True))
        if not pairs:  # an output that tells nothing: nothing is good enough
            return Target(math.inf, [], math.inf)
        return Target(
            wanted(*(statistics.fmean(part) for part in zip(*pairs, strict=True)), _BEHIND),
            [wanted(a, b, _BEHIND_SOMEWHERE) for a, b in pairs],
            wanted(lowest(profiled), lowest(dynamic) - _BEHIND_SOMEWHERE, _BEHIND_SOMEWHERE),
        )

    def reached(self, decibels: torch.Tensor) -> bool:
        ours = means(decibels)
        return bool(self.each) and (
            statistics.fmean(ours) >= self.together and all(a >= b for a, b in zip(ours, self.each, strict=True)) and lowest(decibels) >= self.lowest
        )


def better(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` has the higher SQNR on the whole: the samples as they are count as much as all shifted ones together."""
    gain = (a - b).nan_to_num(nan=0.0)
    return float(gain[0].mean() + (gain[1:].mean() if len(gain) > 1 else gain[0].mean())) > 0


def told(dynamic: torch.Tensor, profiled: torch.Tensor, reached: torch.Tensor, count: int, steps: int, nanoseconds: float) -> str:
    """What auto found, in a line."""

    def row(decibels: torch.Tensor) -> str:
        return " / ".join(f"{mean:.1f}" for mean in means(decibels))

    names = " / ".join(name for name, values in zip(Judges.NAMES, reached, strict=False) if not values.isnan().all())
    if not names:
        return "auto: exact ranges everywhere: no floating-point output has a row per sample that is not 0, so there was nothing to judge by"
    return (
        f"auto: {count} of {steps} steps up from the cheapest ranges, about {nanoseconds / 1e3:.0f} us per sample over fixed ones; output SQNR on calibration samples "
        f"({names}): {row(reached)} dB; exact ranges everywhere {row(profiled)}, without profiles {row(dynamic)}"
    )
