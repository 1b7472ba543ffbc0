"""Calibration: fits what each layer's strategy needs from a few dozen samples, and measures how well each would do.

Everything streams: a layer keeps tables whose size does not depend on the number of samples, so calibration data of any
length fits in memory, and the result depends on the samples alone, not on how they are batched.

The laws come from torch.ops.probquant.surrogate_law, the code that predicts at run time; what is fitted here are the widths of
the predicted range, rho, the correlation of a residual, and the channel surrogate's factors (csrc/NUMERICS.md, "Prediction").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from . import _native
from ._ops import Activation, Strategy, ops

#: Candidates for alpha and beta: 0.5 to 32 standard deviations, 6 % apart.
WIDTHS = tuple(0.5 * 64 ** (i / 72) for i in range(73))
#: Candidates for a probe's margins, as shares of the range that it saw.
MARGINS = tuple(-0.3 + 0.02 * i for i in range(73))
_BINS = 2048
_VALUES = 32749  # of a sample's outputs that are looked at, evenly spaced (a prime, so that the spacing follows no row), beside their extremes

#: What a range is fitted to; "entropy" is a static range's alone.
CRITERIA = ("mse", "percentile", "minmax", "entropy")


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
    b = _bias(weight, bias)
    if per_channel:
        parts = [w.mean(1), w.var(1, unbiased=False), b]
    else:
        parts = [w.mean()[None], w.var(unbiased=False)[None], b.mean()[None], b.var(unbiased=False)[None]]
    return torch.cat(parts).float()


def channel_laws(weight: torch.Tensor, bias: torch.Tensor | None, groups: int, within: float, between: float) -> torch.Tensor:
    """The law part of a channel predictor of a convolution: [mean_b, var_b, within, between, mean_w[C], square_w[C]].

    mean_w and square_w: an output's weights for one input channel, summed over the taps (and their squares), averaged over all
    outputs. A depthwise convolution's is mean_w[O], square_w[O], bias[O]. `weight` is canonical, as in `weight_laws`.
    """
    w, b = weight.double().flatten(1, 2), _bias(weight, bias)  # [O, taps, I / groups]
    mean, square = w.sum(1), w.pow(2).sum(1)
    if is_depthwise(weight, groups):
        return torch.cat([mean[:, 0], square[:, 0], b]).float()
    mean, square = (part.reshape(groups, -1, w.shape[2]).sum(1).flatten() / len(w) for part in (mean, square))
    factors = torch.tensor([within, between], dtype=torch.float32).double()  # as the predictor holds them: training takes its law anew from there
    return torch.cat([b.mean()[None], factors[1:] * b.var(unbiased=False)[None], factors, mean, square]).float()


def is_depthwise(weight: torch.Tensor, groups: int) -> bool:
    return groups > 1 and weight.shape[-1] == 1


def _bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()


class ChannelFit:
    """The channel surrogate's two factors: true over predicted variance, within the outputs' channels and between them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, groups: int):
        laws = channel_laws(weight, bias, groups, 1.0, 1.0).double()
        taps, channels = weight.shape[1] * weight.shape[2], weight.shape[3] * groups
        self.var_b, mean, self.square = laws[1], laws[4 : 4 + channels], laws[4 + channels :]
        self.spread = (self.square - mean**2 / taps).clamp(min=0)
        self.true, self.predicted = [0.0, 0.0], [0.0, 0.0]

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Float input and output (before a residual and the activation) of the convolution, over their profiles."""
        x, y = x.double().flatten(2), y.double().flatten(2)
        self.true[0] += float(y.var(2, unbiased=False).mean(1).sum())
        self.true[1] += float(y.mean(2).var(1, unbiased=False).sum())
        self.predicted[0] += float((x.var(2, unbiased=False) @ self.square).sum())
        self.predicted[1] += float((x.mean(2) ** 2 @ self.spread + self.var_b).sum())

    def fit(self) -> tuple[float, float]:
        """(within, between)"""
        return tuple(min(max(t / p, 2.0**-10), 2.0**10) if p > 0 else 1.0 for t, p in zip(self.true, self.predicted, strict=True))


def activation_image(lo, hi, activation: Activation, minimum, maximum, profile: torch.Tensor | None = None):
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
        return (lo, hi) if (minimum, maximum) == (None, None) else (lo.clamp(minimum, maximum), hi.clamp(minimum, maximum))
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
    """Cumulative histograms of samples' values: how many lie beyond a bound, and how much squared error clipping there costs.

    counts: [N, bins] of N samples, over [low, high], each [N]. Bounds are [N, ...].
    """

    def __init__(self, counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor):
        self.low, self.width = low, (high - low).clamp(min=1e-30) / counts.shape[1]
        centres = low[:, None] + (torch.arange(counts.shape[1], dtype=torch.float64) + 0.5) * self.width[:, None]
        moments = torch.stack([counts, counts * centres, counts * centres**2]).cumsum(2)
        self.moments = torch.cat([torch.zeros(3, len(counts), 1, dtype=torch.float64), moments], 2)

    def below(self, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, squared error) of the values below each bound when they are clipped to it."""
        count, total, squares = self._up_to(bound, torch.floor)
        return count, (squares - 2 * bound * total + bound**2 * count).clamp(min=0)

    def above(self, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everything = self.moments[:, :, -1].reshape(3, -1, *[1] * (bound.dim() - 1))
        count, total, squares = everything - self._up_to(bound, torch.ceil)
        return count, (squares - 2 * bound * total + bound**2 * count).clamp(min=0)

    def _up_to(self, bound: torch.Tensor, rounding) -> torch.Tensor:
        low, width = (part.reshape(-1, *[1] * (bound.dim() - 1)) for part in (self.low, self.width))
        edge = rounding((bound - low) / width).clamp(0, self.moments.shape[2] - 1).long().flatten(1)
        return self.moments.gather(2, edge.expand(3, -1, -1)).reshape(3, *bound.shape)


def _quantization_error(distribution: _Distribution, occupied: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(squared error, clipped values) for each range, widened to hold 0. `occupied` [N] values are not exactly 0."""
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    clipped_low, error_low = distribution.below(lo)
    clipped_high, error_high = distribution.above(hi)
    rounding = ((hi - lo) / 255.0) ** 2 / 12.0 * occupied.reshape(-1, *[1] * (lo.dim() - 1))
    return rounding + error_low + error_high, clipped_low + clipped_high


class SampleOutputs:
    """Finished float outputs of samples [N, ...]: what any range would do to them."""

    def __init__(self, y: torch.Tensor):
        y = y.reshape(len(y), -1).float()
        low, high = y.amin(1), y.amax(1)
        self.exact = low.double(), high.double()
        high = torch.where(high > low, high, low + 1e-6)
        share = min(1.0, _VALUES / y.shape[1])
        if share < 1.0:
            y = y[:, torch.arange(_VALUES) * y.shape[1] // _VALUES]
        counts = [torch.histc(sample, bins=_BINS, min=lo, max=hi) for sample, lo, hi in zip(y, low.tolist(), high.tolist(), strict=True)]
        counts = torch.stack(counts).double()
        if share < 1.0:  # the extremes count, too, as what they are among all values
            counts[:, [0, -1]] += share
        self.distribution = _Distribution(counts, low.double(), high.double())
        self.occupied = (y != 0).sum(1).double()
        self.power = torch.stack([torch.dot(sample, sample) for sample in y]).double()
        self.count = y.shape[1]

    def cost(self, lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise over signal, clipped values) of ranges [N, ...]."""
        error, clipped = _quantization_error(self.distribution, self.occupied, lo, hi)
        return error / self.power.clamp(min=1e-30).reshape(-1, *[1] * (error.dim() - 1)), clipped


Ranges = tuple[torch.Tensor, torch.Tensor]  # ends of samples' ranges for every pair of candidate widths: [N, W, 1 or W], [N, 1 or W, W]


def law_ranges(laws: torch.Tensor, activation: Activation, minimum: float | None, maximum: float | None, profile: torch.Tensor | None = None) -> Ranges:
    """Ranges that laws [N, L, 2] (mean, standard deviation) give for every pair of WIDTHS. `profile` [O]: they are over it."""
    widths = torch.tensor(WIDTHS, dtype=torch.float64)
    mean, sigma = laws.double().unbind(2)
    lo = (mean[:, :, None] - sigma[:, :, None] * widths).amin(1)
    hi = (mean[:, :, None] + sigma[:, :, None] * widths).amax(1)
    return activation_image(lo[:, :, None], hi[:, None, :], activation, minimum, maximum, profile)


def exact_ranges(outputs: SampleOutputs) -> Ranges:
    lo, hi = outputs.exact
    return lo[:, None, None], hi[:, None, None]


def fixed_law(limit: float) -> torch.Tensor:
    """The law [1, 2] that stands for no prediction: WIDTHS times its deviation are ranges of 1/32 to 2 times `limit`."""
    return torch.tensor([[0.0, limit / 16.0]], dtype=torch.float64)


def probe_ranges(y: torch.Tensor, activation: Activation, minimum: float | None, maximum: float | None, profile: torch.Tensor | None = None) -> Ranges:
    """Ranges that probing the outputs [N, O, H, W] gives for every pair of MARGINS. `profile` [O]: they are over it."""
    y = y.flatten(2)
    rows = torch.cat([y[:, :, begin:end] for begin, end in _native.probe_rows(y.shape[2])], 2).double()
    lo, hi = rows.amin((1, 2))[:, None], rows.amax((1, 2))[:, None]
    margins = torch.tensor(MARGINS, dtype=torch.float64) if rows.shape[2] < y.shape[2] else torch.zeros(len(MARGINS), dtype=torch.float64)
    lo, hi = lo - margins * (hi - lo), hi + margins * (hi - lo)
    least, largest = activation_image(*torch.tensor([-1e30, 1e30], dtype=torch.float64), activation, minimum, maximum, profile)
    return lo.clamp(least, largest)[:, :, None], hi.clamp(least, largest)[:, None, :]


class RangeFit:
    """Noise over signal, and clipped values, of every pair of candidate widths: summed over the samples, and of the worst one.

    Each sample's noise is over its own signal: dark images count as much as bright ones. Widths are fitted to the sum of squares of that, so that
    the samples which a range does worst by count most: an image that it ruins is not made up for by many that it serves a little better.
    Samples are kept in two halves, so that a pair can be judged on samples that it was not fitted to.
    """

    def __init__(self, widths: Sequence[float] = WIDTHS, usual: float = 4.0):
        """usual: the width where the samples do not tell, such as below zero behind a ReLU."""
        self.widths, self.usual = torch.tensor(widths, dtype=torch.float64), usual
        tables = [torch.zeros(2, len(widths), len(widths), dtype=torch.float64) for _ in range(4)]
        self.noise, self.squares, self.worst, self.clipped = tables
        self.samples, self.values = [0, 0], [0, 0]

    def update(self, ranges: Ranges, outputs: SampleOutputs, half: torch.Tensor) -> None:
        """ranges: of the outputs' samples; half [N]: 0 or 1. Ranges that are not finite tell nothing."""
        noise, clipped = outputs.cost(*ranges)
        valid = torch.isfinite(noise.sum((1, 2)))
        for h in (0, 1):
            mine = (valid & (half == h)).nonzero().flatten().tolist()
            for i in mine:
                self.noise[h] += noise[i]
                self.squares[h] += noise[i].square()
                self.clipped[h] += clipped[i]
                torch.maximum(self.worst[h], noise[i], out=self.worst[h])
            self.samples[h] += len(mine)
            self.values[h] += len(mine) * outputs.count

    def fit(self, criterion: str, percentile: float) -> tuple[float, float]:
        """The two widths. `percentile` of the values must not be clipped (criterion "percentile")."""
        best = self._best([0, 1], criterion, percentile)
        return float(self.widths[best // len(self.widths)]), float(self.widths[best % len(self.widths)])

    def fit_without(self, half: int, criterion: str, percentile: float) -> tuple[float, float]:
        """The two widths, fitted to the samples of the other half (to these, if that is empty)."""
        best = self._best_without(half, criterion, percentile)
        return float(self.widths[best // len(self.widths)]), float(self.widths[best % len(self.widths)])

    def _best_without(self, half: int, criterion: str, percentile: float) -> int:
        return self._best([1 - half] if self.samples[1 - half] else [half], criterion, percentile)

    def _best(self, halves: list[int], criterion: str, percentile: float) -> int:
        if criterion == "mse":
            score = self.squares[halves].sum(0)
        else:
            clipped, values = self.clipped[halves].sum(0), sum(self.values[h] for h in halves)
            allowed = 0.0 if criterion == "minmax" else (1.0 - percentile / 100.0) * values
            width = self.widths[:, None] + self.widths[None, :]
            score = torch.where(clipped <= allowed, width, width + 1e6 * (1 + clipped))
        unusual = (self.widths[:, None] - self.usual).abs() + (self.widths[None, :] - self.usual).abs()
        return int(torch.where(score <= score.min(), unusual, math.inf).argmin())

    def judge(self, criterion: str, percentile: float) -> tuple[float, float, float]:
        """(mean, root mean square, worst) noise over signal of the samples, with the widths that fit_without() gives for each half."""
        total, squares, worst, count = 0.0, 0.0, 0.0, sum(self.samples)
        if not count:
            return math.inf, math.inf, math.inf
        for half in (0, 1):
            if self.samples[half]:
                at = self._best_without(half, criterion, percentile)
                total += float(self.noise[half].flatten()[at])
                squares += float(self.squares[half].flatten()[at])
                worst = max(worst, float(self.worst[half].flatten()[at]))
        return total / count, math.sqrt(squares / count), worst


@dataclasses.dataclass
class Candidate:
    """A strategy that a layer may get its range from, and how well it would do."""

    strategy: Strategy
    gamma: int = 0
    fit: RangeFit = dataclasses.field(default_factory=RangeFit)

    @property
    def name(self) -> str:
        return self.strategy.name.lower() + (f" (gamma {self.gamma})" if self.gamma else "")

    @staticmethod
    def of(strategy: Strategy, gamma: int) -> Candidate:
        if strategy is Strategy.PROBE:
            return Candidate(strategy, gamma, RangeFit(MARGINS, 0.1))
        return Candidate(strategy, gamma, RangeFit((0.0,), 0.0) if strategy is Strategy.DYNAMIC else RangeFit())


class StaticFit:
    """Fits one fixed range, as static quantization commonly does, to all values of all samples: a streaming histogram over [-limit, limit] whose limit doubles when a value lies outside."""

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

    def fit(self, criterion: str, percentile: float) -> tuple[float, float]:
        """(lo, hi) of the range: of least squared error ("mse"), the tightest that holds `percentile` % of the values, the one
        whose 256 codes lose the least information ("entropy": Kullback-Leibler divergence, as in TensorRT), or all ("minmax")."""
        if self.values == 0:
            return -1.0, 1.0
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if criterion == "minmax":
            return low, high
        shares = torch.linspace(0.02, 1.0, 99, dtype=torch.float64)
        if criterion == "entropy":
            best = min(shares.tolist(), key=lambda share: self._divergence(low * share, high * share))
            return low * best, high * best
        lo, hi = (low * shares)[:, None], (high * shares)[None, :]
        limit = torch.tensor([self.limit], dtype=torch.float64)
        distribution, occupied = _Distribution(self.counts[None], -limit, limit), torch.tensor([float(self.occupied)])
        error, clipped = (part[0] for part in _quantization_error(distribution, occupied, lo[None], hi[None]))
        if criterion == "mse":
            score = error
        else:
            width = hi - lo
            score = torch.where(clipped <= (1.0 - percentile / 100.0) * self.values, width, (1 + clipped) * (high - low + 1))
        best = int(score.argmin())
        return float(lo[best // len(shares), 0]), float(hi[0, best % len(shares)])

    def _divergence(self, lo: float, hi: float) -> float:
        """Of the values, clipped to [lo, hi], from what 256 codes make of them. Those that are 0 do not count: they have a code of their own, and
        behind a ReLU are a spike that any code but the narrowest would smear over its bins."""
        width = self.limit / _BINS
        first, last = math.floor((lo + self.limit) / width), math.ceil((hi + self.limit) / width)
        counts = self.counts.clone()
        counts[_BINS] -= self.values - self.occupied
        inside = counts[first:last]
        if len(inside) < 256 or not bool(inside.any()):  # with a code for every bin, clipping alone would be told
            return math.inf
        clipped = inside.clone()
        clipped[0] += counts[:first].sum()
        clipped[-1] += counts[last:].sum()
        code = torch.arange(len(inside)) * 256 // len(inside)
        held = (inside > 0).double()
        total, bins = (torch.zeros(256, dtype=torch.float64).index_add_(0, code, part) for part in (inside, held))
        coded = (total / bins.clamp(min=1))[code] * held
        p, q = clipped / clipped.sum(), coded / coded.sum()
        there = p > 0
        return float((p[there] * (p[there] / q[there].clamp(min=1e-12)).log()).sum())


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


def sample_weights(y: torch.Tensor) -> torch.Tensor:
    """float64 [N]: what each sample counts for where the errors of a layer's weights are made good, from the layer's float outputs [N, ...]:
    one over their mean square, so that errors are weighed against the signal they come with, and 0 where there is none. A tenth of the
    samples' median is the least that divides: one flat picture must not decide alone."""
    power = y.double().square().flatten(1).mean(1)
    median = power[power > 0].median() if (power > 0).any() else 1.0
    return torch.where(power > 0, 1.0 / power.clamp(min=max(0.1 * float(median), 1e-30)), 0.0)


class BiasFit:
    """Bias correction: the mean error per output channel that rounding a layer's weights makes, to be added to its bias.

    A layer is linear in its weights, so the mean error is the weights' rounding errors times the mean input behind each of
    them: what is kept is that mean, [C, kh, kw] or [K]. It is not zero for any input that passed a ReLU. Samples count by sample_weights():
    a shift under which activations grow tenfold must not set what all others get.
    """

    def __init__(self, weight_shape: Sequence[int], options: dict):
        """weight_shape: canonical [O, kh, kw, I / groups] or [O, K]. options: of a conv2d unit."""
        self.kernel = tuple(weight_shape[1:3]) if len(weight_shape) == 4 else None
        self.options = options
        self.total, self.count = 0.0, 0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """x: the layer's float input [N, ...]; weights: sample_weights() of its output."""
        x = torch.tensordot(weights, x.double(), 1)
        if self.kernel is None:
            x = x.reshape(-1, x.shape[-1])
            self.total = self.total + x.sum(0)
            self.count += float(weights.sum()) * len(x)
            return
        top, bottom, left, right = self.options["padding"]
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        (sh, sw), (dh, dw), (kh, kw) = self.options["stride"], self.options["dilation"], self.kernel
        height, width = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1, (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
        taps = [
            x[:, ky * dh : ky * dh + sh * (height - 1) + 1 : sh, kx * dw : kx * dw + sw * (width - 1) + 1 : sw].sum((1, 2))
            for ky in range(kh)
            for kx in range(kw)
        ]
        self.total = self.total + torch.stack(taps, 1).reshape(-1, kh, kw)
        self.count += float(weights.sum()) * height * width

    def fit(self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, profile: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [O], for the float weight and its int8 codes and scale; profile [C]: what the weight's inputs are divided by."""
        rounding = weight.double() - codes.double() * scale.double().reshape(-1, *[1] * (weight.dim() - 1))
        if self.count == 0:
            return torch.zeros(len(weight))
        mean = self.total / self.count
        if profile is not None:
            mean = mean / profile.double().reshape(-1, *[1] * (mean.dim() - 1))
        if self.kernel is None:
            return (rounding @ mean).float()
        groups = self.options["groups"]
        mean = mean.reshape(groups, -1, *self.kernel).permute(0, 2, 3, 1).repeat_interleave(len(weight) // groups, 0)
        return (rounding * mean).sum((1, 2, 3)).float()


def conv2d_law(codes: Sequence, out_channels: int, options: dict, residual: Sequence, strategy: Strategy, predictor: torch.Tensor, gamma: int) -> torch.Tensor:
    """Laws [N, L, 2] of a convolution of `codes`, what ops.quantize returns; `residual` likewise, or empty."""
    geometry = (options[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups"))
    return ops.surrogate_law(*codes, out_channels, *geometry, *residual, strategy=strategy, predictor=predictor, gamma=gamma)


def rows_as_image(x: torch.Tensor, sample_dims: int) -> torch.Tensor:
    """[samples..., rows..., K] as the image [samples, K, 1, rows] that a linear layer's law is taken of."""
    samples = math.prod(x.shape[:sample_dims])
    return x.reshape(samples, -1, x.shape[-1]).permute(0, 2, 1).unsqueeze(2)
