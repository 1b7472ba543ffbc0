"""Quantization-aware training: an int8 model, trained as it runs.

A Trainable runs the int8 graph itself, each op with the bytes it will have when deployed: rounded weights and outputs, ranges fixed,
exact, or predicted by the surrogate from the layer's input. Beside every op runs its float counterpart, which gradients pass: straight
through the rounding (Bengio et al., arXiv 1308.3432), not at all where a value was clipped. So what is trained is what is deployed, and a
checkpoint after no step at all is the model that training began with.

Batch norms are folded since quantize(); weights keep the scale per output channel they have; ranges get no gradient, but a predicted
range follows its layer's weights, whose laws are taken anew in every step. Parameters are in steps of codes, so that one learning rate fits
channels whose weights differ by orders of magnitude.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from . import surrogates
from ._ops import Activation, Strategy, ops
from .model import QuantizedModel, UnitTensors, validate

_UNITS = "int8_layers."
_LAYERS = (ops.linear.default, ops.conv2d.default)


@dataclasses.dataclass
class _Codes:
    """A tensor of codes, and what they stand for, scale * (q - zero_point), which carries the gradient."""

    q: Tensor
    value: Tensor


@dataclasses.dataclass
class _Weight:
    """A layer's packed weight, and the float one with the same values, which carries the gradient."""

    packed: Tensor
    value: Tensor  # canonical
    bias: Tensor | None
    profile: Tensor | None


class _StraightThrough(torch.autograd.Function):
    """`exact` forward; backward the gradient of `real` wherever `inside`, else 0."""

    @staticmethod
    def forward(ctx, real: Tensor, exact: Tensor, inside: Tensor | None):
        ctx.inside = inside
        return exact.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (gradient if ctx.inside is None else gradient * ctx.inside), None, None


# ----------------------------------------------------------------------------------------------------------------------
# What each op computes in float; `given` holds its arguments by name, codes and weights as their values


def _activated(y: Tensor, given: dict) -> Tensor:
    activation = Activation(given.get("activation", 0))
    if activation is Activation.CLAMP:
        minimum, maximum = given["activation_min"], given["activation_max"]
        return y if (minimum, maximum) == (None, None) else y.clamp(minimum, maximum)
    return {Activation.SILU: F.silu, Activation.GELU: F.gelu, Activation.HARDSWISH: F.hardswish, Activation.SIGMOID: torch.sigmoid}[activation](y)


def _finish_layer(y: Tensor, given: dict) -> Tensor:
    """Residual and activation, in units of the output's profile."""
    profile = given["packed_weight"].profile
    if profile is not None:
        profile = profile.reshape(-1, *[1] * (y.dim() - 2)) if "kernel_size" in given else profile
    if given["residual"] is not None:
        y = y + (given["residual"] if profile is None else given["residual"] * profile)
    y = _activated(y, given)
    return y if profile is None or given["strategy"] == Strategy.NONE else y / profile


def _linear(given: dict) -> Tensor:
    weight = given["packed_weight"]
    return _finish_layer(F.linear(given["x"], weight.value, weight.bias), given)


def _padded(x: Tensor, padding: list[int], value: float = 0.0) -> Tensor:
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
    return F.pad(x, (left, right, top, bottom), value=value) if any((top, bottom, left, right)) else x


def _conv2d(given: dict) -> Tensor:
    weight, x = given["packed_weight"], _padded(given["x"], given["padding"])
    y = F.conv2d(x, weight.value.permute(0, 3, 1, 2), weight.bias, given["stride"], 0, given["dilation"], given["groups"])
    return _finish_layer(y, given)


def _max_pool2d(given: dict) -> Tensor:
    x = _padded(given["x"], given["padding"], -math.inf)
    return F.max_pool2d(x, given["kernel_size"], given["stride"], 0, given["dilation"])


def _avg_pool2d(given: dict) -> Tensor:
    window = given["kernel_size"], given["stride"]
    y = F.avg_pool2d(_padded(given["x"], given["padding"]), *window)
    return y if given["count_include_pad"] else y / F.avg_pool2d(_padded(torch.ones_like(given["x"]), given["padding"]), *window)


def _upsample(given: dict) -> Tensor:
    height, width = given["scale_factor"][0], given["scale_factor"][-1]
    return given["x"].repeat_interleave(height, 2).repeat_interleave(width, 3)


def _norm_input(given: dict) -> Tensor:
    return given["x"] if given["residual"] is None else given["x"] + given["residual"]


def _attention(given: dict) -> Tensor:
    query, key, value = (given[name].unflatten(2, (given["heads"], -1)).transpose(1, 2) for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, scale=given["scale"]).transpose(1, 2).flatten(2)


_FLOAT = {
    ops.quantize.default: lambda given: given["x"],
    ops.linear.default: _linear,
    ops.conv2d.default: _conv2d,
    ops.add.default: lambda given: _activated(given["a"] + given["b"], given),
    ops.mul.default: lambda given: given["a"] * given["b"],
    ops.activation.default: lambda given: _activated(given["x"], given),
    ops.concat.default: lambda given: torch.cat(given["xs"], 1 if given["xs"][0].dim() == 4 and given["scales"][0].dim() == 1 else -1),
    ops.max_pool2d.default: _max_pool2d,
    ops.avg_pool2d.default: _avg_pool2d,
    ops.adaptive_avg_pool2d.default: lambda given: F.adaptive_avg_pool2d(given["x"], given["output_size"]),
    ops.upsample_nearest2d.default: _upsample,
    ops.layer_norm.default: lambda given: F.layer_norm(_norm_input(given), given["x"].shape[-1:], given["weight"], given["bias"], given["eps"]),
    ops.attention.default: _attention,
}


def _map(value, convert: Callable) -> Any:
    return [_map(part, convert) for part in value] if isinstance(value, (list, tuple)) else convert(value)


def _raw(value):
    value = value.q if isinstance(value, _Codes) else value.packed if isinstance(value, _Weight) else value
    return value.detach() if isinstance(value, Tensor) else value


def _run_op(target, args: tuple, kwargs: dict):
    """An op of torch.ops.probquant, with the gradient of its float counterpart."""
    given = {argument.name: argument.default_value for argument in target._schema.arguments if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in target._schema.arguments), args)) | kwargs
    if target is ops.dequantize.default:
        return given["x"].value if given["dtype"] is None else given["x"].value.to(given["dtype"])
    with torch.no_grad():
        y, scale, zero_point, *rest = target(**{name: _map(value, _raw) for name, value in given.items()})
    values = {name: _map(value, lambda part: part.value if isinstance(part, _Codes) else part) for name, value in given.items()}
    real = _FLOAT[target](values)
    if given.get("keep_sum"):
        rest[1] = _StraightThrough.apply(_norm_input(values), rest[1], None)
    if y.dtype != torch.uint8:
        return _StraightThrough.apply(real, y, None), scale, zero_point, *rest
    step, zero = (part.reshape(*part.shape, *[1] * (y.dim() - part.dim())) for part in (scale, zero_point))
    inside = (real >= step * (-0.5 - zero)) & (real <= step * (255.5 - zero))
    return _Codes(y, _StraightThrough.apply(real, ops.dequantize(y, scale, zero_point), inside)), scale, zero_point, *rest


class _Runner(fx.Interpreter):
    """Runs the int8 graph with the weights of a Trainable."""

    def __init__(self, qmodel: QuantizedModel, attributes: dict[str, Any]):
        super().__init__(qmodel)
        self.attributes = attributes  # that stand for the graph's own

    def get_attr(self, target, args, kwargs):
        return self.attributes[target] if target in self.attributes else super().get_attr(target, args, kwargs)

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "probquant":
            return _run_op(target, args, kwargs)
        if target is operator.getitem or not any(isinstance(arg, _Codes) for arg in args):
            return super().call_function(target, args, kwargs)
        q = target(*(_raw(arg) for arg in args), **kwargs)
        if not isinstance(q, Tensor):  # a size
            return q
        return _Codes(q, target(*(arg.value if isinstance(arg, _Codes) else arg for arg in args), **kwargs))


# ----------------------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """The float weight behind one int8 layer, in steps of its codes, where it begins; its bias, in steps of 1/127 of the layer's largest."""

    def __init__(self, unit: UnitTensors, strategy: Strategy):
        super().__init__()
        self.strategy, self.groups = strategy, unit.groups
        self.register_buffer("scale", unit.weight_scale.clone())
        self.register_buffer("profile", unit.profile)
        self.register_buffer("predictor", getattr(unit, "predictor", None))
        self.weight = nn.Parameter(unit.weight.float())
        self.bias = None if unit.bias is None else nn.Parameter(torch.zeros_like(unit.bias))
        if unit.bias is not None:
            self.register_buffer("first_bias", unit.bias.clone())
            self.register_buffer("bias_step", (unit.bias.abs().max() / 127).clamp(min=float(self.scale.min())))

    @staticmethod
    def per_channel(weight: Tensor, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (weight.dim() - 1))

    def codes(self) -> Tensor:
        """int8, canonical."""
        return self.weight.detach().round().clamp(-127, 127).to(torch.int8)

    def real_bias(self) -> Tensor | None:
        return None if self.bias is None else self.first_bias + self.bias * self.bias_step

    def leaves(self) -> dict[str, Tensor]:
        """What the int8 layer's tensors are with these weights."""
        result = {"weight": self.codes(), "bias": None if self.bias is None else self.real_bias().detach()}
        result["packed_weight"] = ops.pack_weight(result["weight"], self.scale, result["bias"], self.groups, self.profile)
        if self.predictor is not None:
            result["predictor"] = self._predictor(result["weight"], result["bias"])
        return {name: tensor for name, tensor in result.items() if tensor is not None}

    def _predictor(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        """The predictor with its widths, rho and factors as they are, and the laws of the new weights."""
        scale = self.scale if self.profile is None else self.scale / self.profile
        bias = bias if bias is None or self.profile is None else bias / self.profile
        weight, head = codes.float() * self.per_channel(codes, scale), self.predictor[:3]
        if self.strategy is Strategy.CHANNEL:
            factors = (1.0, 1.0) if surrogates.is_depthwise(weight, self.groups) else self.predictor[5:7].tolist()
            return torch.cat([head, surrogates.channel_laws(weight, bias, self.groups, *factors)])
        if self.strategy in (Strategy.GAUSSIAN, Strategy.GAUSSIAN_CHANNEL):
            return torch.cat([head, surrogates.weight_laws(weight, bias, self.strategy is Strategy.GAUSSIAN_CHANNEL)])
        return self.predictor  # a probe's margins

    def current(self) -> dict[str, Any]:
        """What the graph reads in this step."""
        leaves = self.leaves()
        rounded = _StraightThrough.apply(self.weight, leaves["weight"].float(), self.weight.detach().abs() <= 127.5)
        value = rounded * self.per_channel(self.weight, self.scale)
        return leaves | {"packed_weight": _Weight(leaves["packed_weight"], value, self.real_bias(), self.profile)}


class Trainable(nn.Module):
    """An int8 model with gradients: called like `qmodel`, with the same outputs (to the bit, until it is trained).

    qmodel: from quantize() or load(), of any strategy; it is left as it is. Parameters are float32: the weights behind the int8 layers
    (canonical, [O, kh, kw, I / groups] or [O, K]) in steps of their codes, and what is added to the biases, in steps of 1/127 of the
    layer's largest. A module that is called several times has weights for every call. Float layers and norms are not trained.
    Any loop, optimizer and loss does (``train`` is a plain one); convert() gives the int8 model back.

    Raises TypeError for what is not a QuantizedModel, ValueError for one with an op that has no gradient here.
    """

    def __init__(self, qmodel: QuantizedModel):
        super().__init__()
        if not isinstance(qmodel, QuantizedModel):
            raise TypeError(f"probquant: Trainable wants a QuantizedModel, got {type(qmodel).__name__}")
        called = [node for node in qmodel.graph.nodes if getattr(node.target, "namespace", "") == "probquant"]
        unknown = {node.target._opname for node in called if node.target not in _FLOAT and node.target is not ops.dequantize.default}
        if unknown:
            raise ValueError(f"probquant: Trainable has no gradient for {', '.join(sorted(unknown))}; want layers, adds, norms, attention, activations and pools")
        self._int8 = [copy.deepcopy(qmodel)]  # in a list: its tensors are no parameters
        self.layers = nn.ModuleDict()
        for node in called:
            if node.target in _LAYERS:
                packed = dict(zip((a.name for a in node.target._schema.arguments), node.args))["packed_weight"]
                name = packed.target.split(".")[1]
                if name not in self.layers:
                    unit = getattr(self._int8[0], _UNITS.rstrip(".")).get_submodule(name)
                    self.layers[name] = _Layer(unit, Strategy(node.kwargs.get("strategy", Strategy.DYNAMIC)))

    def _apply(self, fn, recurse=True):
        self._int8[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *inputs):
        attributes: dict[str, Any] = {}
        for name, layer in self.layers.items():
            attributes |= {f"{_UNITS}{name}.{leaf}": value for leaf, value in layer.current().items()}
        return _Runner(self._int8[0], attributes).run(*inputs)

    def convert(self) -> QuantizedModel:
        """The int8 model with the trained weights, which this one's outputs are of. Shares of clipped values, which were
        measured before, are not known of it (LayerInfo.clipped is None)."""
        qmodel = copy.deepcopy(self._int8[0])
        for name, layer in self.layers.items():
            unit = getattr(qmodel, _UNITS.rstrip(".")).get_submodule(name)
            for leaf, value in layer.leaves().items():
                setattr(unit, leaf, value)
        qmodel.meta["layers"] = [dataclasses.replace(layer, clipped=None) for layer in qmodel.layers]
        validate(qmodel)
        return qmodel


def train(
    trainable: nn.Module, batches: Iterable, loss: Callable[[Any, Any], Tensor], *,
    epochs: int = 2, learning_rate: float = 0.01, seed: int = 0, progress: bool = True,
) -> list[float]:  # fmt: skip
    """Trains in place with Adam and a cosine that ends at 0; returns the mean loss of every epoch. Works on a float model, too.

    batches: iterated once per epoch and with a length, a DataLoader or a list: (inputs, target), inputs a tensor or a tuple of
        the model's arguments. loss: of (output, target), a scalar tensor; for distillation the targets are a float model's outputs.
    learning_rate: of the first step, in steps of codes, which is what a weight then moves. A weight starts on a code and changes it after
        half a step: half the learning rate times the number of batches in all epochs is how far it can get, and should be about 1.
    seed: of torch's generator, which a shuffling DataLoader draws from; the state before is put back.

    Raises ValueError for no batches, bad numbers, or a loss that is not finite.
    """
    steps = len(batches)
    if steps == 0:
        raise ValueError("probquant: batches is empty, want at least one (inputs, target)")
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(f"probquant: epochs is {epochs} and learning_rate {learning_rate}, want at least 1 and a rate > 0")
    optimizer = torch.optim.Adam(trainable.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    means = []
    with torch.random.fork_rng(), tqdm(desc="training", total=epochs * steps, unit=" steps", disable=not progress) as bar:
        torch.manual_seed(seed)
        for _ in range(epochs):
            total = 0.0
            for inputs, target in batches:
                optimizer.zero_grad(set_to_none=True)
                value = loss(trainable(*inputs) if isinstance(inputs, (tuple, list)) else trainable(inputs), target)
                number = float(value.detach())
                if not math.isfinite(number):
                    raise ValueError(f"probquant: the loss is {number} in epoch {len(means) + 1}, want a finite one; a lower learning_rate may help")
                value.backward()
                optimizer.step()
                schedule.step()
                total += number
                bar.update()
                bar.set_postfix(loss=f"{number:.4g}")
            means.append(total / steps)
    return means
