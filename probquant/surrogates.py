"""Calibration: fits what each layer's strategy needs from a few dozen samples.

Everything streams: a layer keeps one table whose size does not depend on the number of samples, so calibration data of
any length fits in memory, and the result depends on the samples alone, not on how they are batched.

The laws come from torch.ops.probquant.surrogate_law, the code that predicts at run time; only alpha and beta, the widths
of the predicted range, and rho, the correlation of a residual, are fitted here (csrc/NUMERICS.md, "Prediction").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._ops import Activation, Strategy, ops

#: Candidates for alpha and beta: 0.5 to 32 standard deviations, 6 % apart.
WIDTHS = tuple(0.5 * 64 ** (i / 72) for i in range(73))
_BINS = 2048

CRITERIA = ("mse", "coverage", "minmax")


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 weight in [-127, 127] and its float32 scale per output channel (dim 0)."""
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())))
    scale = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
    codes = torch.round(weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).clamp(-127, 127)
    return codes.to(torch.int8), scale


def weight_laws(weight: torch.Tensor, bias: torch.Tensor | None, per_channel: bool) -> torch.Tensor:
    """The law part of a gaussian predictor: [mean_w, var_w, mean_b, var_b], or mean_w[O], var_w[O], bias[O] per channel.

    `weight` is what the kernel multiplies with, that is the dequantized int8 weight.
    """
    w = weight.double().reshape(weight.shape[0], -1)
    b = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    if per_channel:
        parts = [w.mean(1), w.var(1, unbiased=False), b]
    else:
        parts = [w.mean()[None], w.var(unbiased=False)[None], b.mean()[None], b.var(unbiased=False)[None]]
    return torch.cat(parts).float()


def _activation_image(lo, hi, activation: Activation, minimum, maximum, profile: torch.Tensor | None = None):
    """Image of [lo, hi] under an activation: what core/numerics.h's activation_range does, on float64 tensors."""
    if profile is not None:  # cut to the image of all numbers, over the profile
        least, largest = {
            Activation.CLAMP: (minimum, maximum),
            Activation.SILU: (-0.2784645, None),
            Activation.GELU: (-0.1700408, None),
            Activation.HARDSWISH: (-0.375, None),
            Activation.SIGMOID: (0.0, 1.0),
        }[activation]
        away, near = 1.0 / float(profile.min()), 1.0 / float(profile.max())
        bounds = (-math.inf if least is None else least, math.inf if largest is None else largest)
        least, largest = bounds[0] * (away if bounds[0] < 0 else near), bounds[1] * (away if bounds[1] > 0 else near)
        return lo.clamp(least, largest), hi.clamp(least, largest)
    if activation is Activation.CLAMP:
        return (bound.clamp(minimum, maximum) if (minimum, maximum) != (None, None) else bound for bound in (lo, hi))
    lo, hi = torch.broadcast_tensors(lo, hi)
    function, argmin = {
        Activation.SILU: (torch.nn.functional.silu, -1.2784645),
        Activation.GELU: (torch.nn.functional.gelu, -0.7517916),
        Activation.HARDSWISH: (torch.nn.functional.hardswish, -1.5),
        Activation.SIGMOID: (torch.sigmoid, None),
    }[activation]
    at_lo, at_hi = function(lo), function(hi)
    image_lo = torch.minimum(at_lo, at_hi)
    if argmin is not None:
        dips = (lo < argmin) & (hi > argmin)
        image_lo = torch.where(dips, function(torch.full_like(lo, argmin)), image_lo)
    return image_lo, torch.maximum(at_lo, at_hi)


class _Distribution:
    """Cumulative histogram of a sample's values: how many lie beyond a bound, and how much squared error clipping there costs."""

    def __init__(self, counts: torch.Tensor, low: float, high: float):
        self.low, self.width = low, max(high - low, 1e-30) / len(counts)
        centres = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * self.width
        self.moments = torch.cat([torch.zeros(3, 1, dtype=torch.float64), torch.stack([counts, counts * centres, counts * centres**2]).cumsum(1)], 1)

    def below(self, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, squared error) of the values below each bound when they are clipped to it."""
        edge = ((bound - self.low) / self.width).floor().clamp(0, self.moments.shape[1] - 1).long()
        count, total, squares = self.moments[:, edge]
        return count, (squares - 2 * bound * total + bound**2 * count).clamp(min=0)

    def above(self, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        edge = ((bound - self.low) / self.width).ceil().clamp(0, self.moments.shape[1] - 1).long()
        count, total, squares = self.moments[:, -1:].reshape(3, *[1] * bound.dim()) - self.moments[:, edge]
        return count, (squares - 2 * bound * total + bound**2 * count).clamp(min=0)


def _distribution(y: torch.Tensor) -> _Distribution:
    low, high = float(y.min()), float(y.max())
    counts = torch.histc(y.float(), bins=_BINS, min=low, max=high if high > low else low + 1e-6).double()
    return _Distribution(counts, low, high)


def _quantization_error(distribution: _Distribution, occupied: float, lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(squared error, clipped values) for each range, widened to hold 0. `occupied` values are not exactly 0."""
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    clipped_low, error_low = distribution.below(lo)
    clipped_high, error_high = distribution.above(hi)
    rounding = ((hi - lo) / 255.0) ** 2 / 12.0 * occupied
    return rounding + error_low + error_high, clipped_low + clipped_high


class GaussianFit:
    """Fits alpha and beta of one layer: the pair with the least quantization error, or the tightest that covers enough.

    Keeps the error and the clipped count of every candidate pair, summed over the samples; each sample's error is divided
    by its power, so that dark images count as much as bright ones.
    """

    def __init__(self, activation: Activation, minimum: float | None, maximum: float | None, profile: torch.Tensor | None = None):
        """`profile` [O]: laws and outputs are over it."""
        self.activation = (activation, minimum, maximum, profile)
        widths = torch.tensor(WIDTHS, dtype=torch.float64)
        self.widths = widths
        self.error = torch.zeros(len(widths), len(widths), dtype=torch.float64)
        self.clipped = torch.zeros_like(self.error)
        self.values = 0

    def update(self, law: torch.Tensor, y: torch.Tensor) -> None:
        """One sample: its law [L, 2] (mean, standard deviation), and its finished float output."""
        if not bool(torch.isfinite(law).all()) or y.numel() == 0:
            return
        mean, sigma = law.double().unbind(1)
        lo = (mean[:, None] - sigma[:, None] * self.widths).amin(0)
        hi = (mean[:, None] + sigma[:, None] * self.widths).amax(0)
        lo, hi = _activation_image(lo[:, None], hi[None, :], *self.activation)
        y = y.reshape(-1)
        power = float(torch.dot(y, y))
        error, clipped = _quantization_error(_distribution(y), float((y != 0).sum()), lo, hi)
        self.error += error / max(power, 1e-30)
        self.clipped += clipped.expand_as(error)
        self.values += y.numel()

    def fit(self, criterion: str, coverage: float) -> tuple[float, float]:
        """(alpha, beta). `coverage` is the share of values that must not be clipped (criterion "coverage")."""
        if self.values == 0:
            return 8.0, 8.0
        if criterion == "mse":
            score = self.error
        else:
            allowed = 0.0 if criterion == "minmax" else (1.0 - coverage) * self.values
            width = self.widths[:, None] + self.widths[None, :]
            fits = self.clipped <= allowed
            score = torch.where(fits, width, width + 1e6 * (1 + self.clipped))
        best = int(score.argmin())
        return float(self.widths[best // len(self.widths)]), float(self.widths[best % len(self.widths)])


class StaticFit:
    """Fits one fixed range: a streaming histogram over [-limit, limit] whose limit doubles when a value lies outside."""

    def __init__(self):
        self.limit = 2.0**-20
        self.counts = torch.zeros(2 * _BINS, dtype=torch.float64)
        self.low, self.high, self.values, self.occupied = math.inf, -math.inf, 0, 0

    def update(self, y: torch.Tensor) -> None:
        y = y.reshape(-1).float()
        if y.numel() == 0 or not bool(torch.isfinite(y).all()):
            return
        low, high = float(y.min()), float(y.max())
        while max(-low, high) > self.limit:
            pairs = self.counts.reshape(-1, 2).sum(1)
            quarter = torch.zeros(_BINS // 2, dtype=torch.float64)
            self.counts, self.limit = torch.cat([quarter, pairs, quarter]), self.limit * 2
        self.counts += torch.histc(y, bins=2 * _BINS, min=-self.limit, max=self.limit).double()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += y.numel()
        self.occupied += int((y != 0).sum())

    def fit(self, criterion: str, coverage: float) -> tuple[float, float]:
        """(lo, hi) of the range."""
        if self.values == 0:
            return -1.0, 1.0
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if criterion == "minmax":
            return low, high
        shares = torch.linspace(0.02, 1.0, 99, dtype=torch.float64)
        lo, hi = (low * shares)[:, None], (high * shares)[None, :]
        error, clipped = _quantization_error(_Distribution(self.counts, -self.limit, self.limit), self.occupied, lo, hi)
        if criterion == "mse":
            score = error
        else:
            width = hi - lo
            score = torch.where(clipped <= (1.0 - coverage) * self.values, width, (1 + clipped) * (high - low + 1))
        best = int(score.argmin())
        return float(lo[best // len(shares), 0]), float(hi[0, best % len(shares)])


def static_predictor(lo: float, hi: float) -> torch.Tensor:
    """[scale, zero_point] of a fixed range."""
    scale = max((max(hi, 0.0) - min(lo, 0.0)) / 255.0, 2.0**-60)
    return torch.tensor([scale, min(max(round(-min(lo, 0.0) / scale), 0), 255)], dtype=torch.float32)


class CorrelationFit:
    """Correlation of a layer's own output with the residual that is added to it."""

    def __init__(self):
        self.sums = [0.0] * 3

    def update(self, y: torch.Tensor, residual: torch.Tensor) -> None:
        y, residual = y.double().flatten(1), residual.double().flatten(1)
        y, residual = y - y.mean(1, keepdim=True), residual - residual.mean(1, keepdim=True)
        for i, product in enumerate((y * residual, y * y, residual * residual)):
            self.sums[i] += float(product.sum())

    def fit(self) -> float:
        covariance, a, b = self.sums
        return max(-1.0, min(1.0, covariance / math.sqrt(a * b))) if a > 0 and b > 0 else 0.0


class BiasFit:
    """Bias correction: the mean error per output channel that rounding a layer's weights makes, to be added to its bias.

    A layer is linear in its weights, so the mean error is the weights' rounding errors times the mean input behind each of
    them: what is kept is that mean, [C, kh, kw] or [K]. It is not zero for any input that passed a ReLU.
    """

    def __init__(self, weight_shape: Sequence[int], options: dict):
        """weight_shape: canonical [O, kh, kw, I / groups] or [O, K]. options: of a conv2d unit."""
        self.kernel = tuple(weight_shape[1:3]) if len(weight_shape) == 4 else None
        self.options = options
        self.total, self.count = 0.0, 0

    def update(self, x: torch.Tensor) -> None:
        """x: the layer's float input."""
        if self.kernel is None:
            self.total = self.total + x.flatten(0, -2).sum(0, dtype=torch.float64)
            self.count += x.shape[:-1].numel()
            return
        top, bottom, left, right = self.options["padding"]
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        (sh, sw), (dh, dw), (kh, kw) = self.options["stride"], self.options["dilation"], self.kernel
        height, width = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        taps = [
            x[:, :, ky * dh : ky * dh + sh * (height - 1) + 1 : sh, kx * dw : kx * dw + sw * (width - 1) + 1 : sw].sum((2, 3)).sum(0, dtype=torch.float64)
            for ky in range(kh)
            for kx in range(kw)
        ]
        self.total = self.total + torch.stack(taps, 1).reshape(-1, kh, kw)
        self.count += x.shape[0] * height * width

    def fit(self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float32 [O], for the float weight and its int8 codes and scale."""
        rounding = weight.double() - codes.double() * scale.double().reshape(-1, *[1] * (weight.dim() - 1))
        if self.count == 0:
            return torch.zeros(len(weight))
        mean = self.total / self.count
        if self.kernel is None:
            return (rounding @ mean).float()
        groups = self.options["groups"]
        mean = mean.reshape(groups, -1, *self.kernel).permute(0, 2, 3, 1).repeat_interleave(len(weight) // groups, 0)
        return (rounding * mean).sum((1, 2, 3)).float()


def conv2d_law(x: torch.Tensor, out_channels: int, options: dict, residual, strategy: Strategy, predictor: torch.Tensor, gamma: int) -> torch.Tensor:
    """Laws [N, L, 2] of a convolution whose float input is `x` [N, C, H, W]; `residual` is float or None."""
    codes = ops.quantize(x)
    residual_codes = ops.quantize(residual.to(memory_format=torch.channels_last)) if residual is not None else (None,) * 4
    kernel = options["kernel_size"]
    return ops.surrogate_law(
        *codes, out_channels, kernel, options["stride"], options["padding"], options["dilation"], options["groups"], *residual_codes,
        strategy=strategy, predictor=predictor, gamma=gamma,
    )  # fmt: skip


def rows_as_image(x: torch.Tensor, sample_dims: int) -> torch.Tensor:
    """[samples..., rows..., K] as the image [samples, K, 1, rows] that a linear layer's law is taken of."""
    samples = math.prod(x.shape[:sample_dims])
    return x.reshape(samples, -1, x.shape[-1]).permute(0, 2, 1).unsqueeze(2)
