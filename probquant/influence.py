"""What calibration samples look like inside a network, and what noise in each of its tensors is worth at the network's output.

White noise of variance v on every value of a tensor adds v sum_jk J_jk^2 to the power of the output's error, J being the derivative of all
outputs by the tensor. With independent standard normal u, E (J^T u)_k^2 = sum_j J_jk^2: one backward pass with a random u estimates it
for every tensor of the network at once (Hutchinson's estimator of a trace, Commun. Stat. Simul. 19, 1990).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import fx

from .graph import Unit, shape_of
from .metrics import float_outputs
from .nodes import fixes_batch
from .shifts import KINDS

_WEIGHED_CHUNKS = 3  # whose samples, as they are and shifted, go backwards, too
_PART = 2  # samples that do so at once: autograd keeps every activation of theirs


@dataclasses.dataclass
class Seen:
    """Of one tensor, per sample and channel, float64 [samples, channels]: extremes, mean, mean square, the number of values and of those
    that are not zero, and `gain`: the power at the output of noise of power 1 on each of the latter (zeros have a code of their own);
    `common_gain`: of an error of 1 that all values of the channel share."""

    least: torch.Tensor
    largest: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    values: torch.Tensor
    occupied: torch.Tensor
    gain: torch.Tensor
    common_gain: torch.Tensor

    def step(self, profile: torch.Tensor | float = 1.0) -> torch.Tensor:
        """[samples]: the step of each sample's codes when they hold its exact range over the profile."""
        return ((self.largest / profile).amax(1).clamp(min=0) - (self.least / profile).amin(1).clamp(max=0)) / 255.0

    def rounding(self, profile: torch.Tensor | float = 1.0) -> torch.Tensor:
        """[samples]: noise at the output from rounding the tensor to codes that hold its exact range over the profile."""
        return self.step(profile).square() / 12.0 * (self.gain * profile**2).sum(1)

    def price(self, profile: torch.Tensor | float = 1.0) -> torch.Tensor:
        """[samples]: noise at the output per noise over signal of the tensor's codes."""
        power = (self.values * self.square / profile**2).sum(1)
        return power / self.occupied.sum(1).clamp(min=1) * (self.gain * profile**2).sum(1)


@dataclasses.dataclass
class Look:
    """What look() found. source [samples]: the number of the calibration sample that each is, or is a shifted copy of; version: 0 as it
    was, 1 + its kind of shift; weighed: whether more than the extremes is known (all else is 0). seen: by node of the float graph."""

    source: torch.Tensor
    version: torch.Tensor
    weighed: torch.Tensor
    seen: dict[fx.Node, Seen]

    @property
    def clean(self) -> torch.Tensor:
        return self.version == 0

    def weight_noise(self, unit: Unit, factors: torch.Tensor | float, samples: torch.Tensor) -> torch.Tensor:
        """[samples]: noise at the output from rounding a layer's weights, which are multiplied by `factors` for it and divided again.

        Bias correction removes their mean error, but for what a sample's mean input is off that of all: which, unlike the rest of
        the inputs, that are held for independent, adds up over channels, taps and positions.
        """
        weight, groups = unit.weight.double(), unit.options.get("groups", 1)
        folded = (weight * factors).reshape(len(weight), -1)
        scale = (folded.abs().amax(1, keepdim=True) / 127.0).clamp(min=1e-30)
        error = ((torch.round(folded / scale) * scale - folded).reshape(weight.shape) / factors).reshape(groups, len(weight) // groups, -1, weight.shape[-1])
        x, y = self.seen[unit.inputs[0]], self.seen[unit.anchor]
        mean, square = x.mean[samples], x.square[samples]

        def through(matrix: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:  # [g, O / g, I / g], [samples, I] -> [samples, O]
            return torch.einsum("ngi,goi->ngo", inputs.reshape(len(inputs), groups, -1), matrix).reshape(len(inputs), -1)

        variance = through(error.square().sum(2), (square - mean.square()).clamp(min=0))
        shift = through(error.sum(2), mean - x.mean[self.clean & self.weighed].mean(0))
        return (variance * y.gain[samples] + shift.square() * y.common_gain[samples]).sum(1)


def channel_axis(node: fx.Node, unit: Unit) -> int:
    """Where a tensor that `unit` reads or writes has its channels."""
    return 1 if len(shape_of(node)) == 4 and unit.sample_dims == 1 else -1


def look(graph_module: fx.GraphModule, axes: dict[fx.Node, int], weighed_only: set[fx.Node], chunks: Iterable[tuple], shifted: Callable[[tuple, int], list[tuple]]) -> Look:
    """Runs the float graph on chunks of samples and on shifted copies of them (shifted(chunk, number of its first sample)); the first few chunks
    alone are weighed. axes: what is looked at, and where it has its channels; weighed_only: of these, what is asked for nothing but its gain."""
    parts: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in axes}
    source, version, weighed = [], [], []
    number, whole = 0, fixes_batch(graph_module.graph)
    for i, chunk in enumerate(chunks):
        images, weigh = chunk[0].shape[0], i < _WEIGHED_CHUNKS
        for inputs in (chunk, *shifted(chunk, number)):
            step = _PART if weigh and not whole else images
            for begin in range(0, images, step):
                part = tuple(x[begin : begin + step] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == images else x for x in inputs)
                with torch.inference_mode(False), torch.set_grad_enabled(weigh):
                    _Looker(graph_module, axes, weighed_only, parts).look(part, number + begin if weigh else None)
            source += range(number, number + images)
            version += [0 if inputs is chunk else 1 + sample % KINDS for sample in range(number, number + images)]
            weighed += [weigh] * images
        number += images
    seen = {node: Seen(*(part.double() for part in torch.cat(found, 1))) for node, found in parts.items()}
    return Look(torch.tensor(source), torch.tensor(version), torch.tensor(weighed), seen)


class _Looker(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, axes: dict[fx.Node, int], weighed_only: set[fx.Node], parts: dict[fx.Node, list[torch.Tensor]]):
        super().__init__(graph_module)
        self.axes, self.weighed_only, self.parts = axes, weighed_only, parts
        self.leaves: list[torch.Tensor] = []
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def look(self, inputs: tuple, number: int | None) -> None:
        """number: of the first sample, which its random numbers depend on; None: not backwards."""
        try:
            self._look(inputs, number)
        finally:  # a tensor holds its hook and the hook this object, which holds tensors: a circle through C++, which Python's collector does not see
            for hook in self.hooks:
                hook.remove()
            self.leaves.clear()
            self.env.clear()

    def _look(self, inputs: tuple, number: int | None) -> None:
        self.images = inputs[0].shape[0]
        outputs = float_outputs(self.run(*map(_differentiable, inputs)), self.images)
        if number is None:
            return
        outputs = [output for output in outputs if output.requires_grad]
        if outputs:
            generators = [torch.Generator().manual_seed(number + i) for i in range(self.images)]  # a sample's vector depends on the sample alone
            random = [torch.stack([torch.randn(y.shape, generator=generator) for y, generator in zip(output, generators, strict=True)]) for output in outputs]
            torch.autograd.backward(outputs, random, inputs=self.leaves)
            return
        for found in self.parts.values():  # nothing to differentiate: every tensor's noise over its signal counts the same
            _, _, _, square, values, occupied, gain, common = found[-1]
            gain.copy_((occupied > 0) / (values * square).sum(1, keepdim=True).clamp(min=1e-30))
            common.copy_(values * gain)

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        return _differentiable(value.detach()) if isinstance(value, torch.Tensor) else value  # parameters need no gradients

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node not in self.axes:
            return value
        if torch.is_grad_enabled() and not value.requires_grad:
            value = value.detach().requires_grad_()
            self.leaves.append(value)
        channels, whole = self._by_channel(node, value.detach()), node not in self.weighed_only
        found = torch.zeros(len(dataclasses.fields(Seen)), *channels.shape[:2])
        self.parts[node].append(found)
        if whole:
            found[0], found[1] = channels.amin(2), channels.amax(2)
        if not torch.is_grad_enabled():
            return value
        occupied = channels != 0 if whole else None
        if whole:
            found[2] = channels.mean(2)
            found[3] = torch.linalg.vector_norm(channels, dim=2).square() / max(channels.shape[2], 1)
            found[4], found[5] = channels.shape[2], occupied.sum(2)

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)  # of a root or a logarithm at 0: one such value would be the price of every layer before it
            channels = self._by_channel(node, gradient)
            found[6] = torch.linalg.vector_norm(channels * occupied if whole else channels, dim=2).square()
            found[7] = channels.sum(2).square()
            return gradient

        self.hooks.append(value.register_hook(hook))
        return value

    def _by_channel(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """[images, channels, values]; what an image has may be several rows, of frames or windows"""
        value = value.float() if self.axes[node] != 1 else value.float().movedim(1, -1)
        return value.reshape(self.images, -1, value.shape[-1]).transpose(1, 2)


def _differentiable(x):
    """The same, for autograd to use: what inference_mode made cannot be."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
