"""An independent computation of csrc/NUMERICS.md: numpy integers, and libm's fmaf where the text says fma.

Written from the text; shares no code with the library. Activations are numpy arrays with the channels last: images
[N, H, W, C], rows of a linear layer [N, 1, rows, K]; scale and zero point [N], stats [N, columns].
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import math
from typing import NamedTuple

import numpy as np

NONE, FIXED, DYNAMIC, GAUSSIAN, GAUSSIAN_CHANNEL, PROBE, CHANNEL = range(7)
CLAMP, SILU, GELU, HARDSWISH, SIGMOID = range(5)
ARGMIN = {SILU: -1.2784645, GELU: -0.7517916, HARDSWISH: -1.5}
SMALLEST_SCALE = np.float32(2.0**-60)
INFINITY = np.float32(np.inf)


class Codes(NamedTuple):
    """A quantized activation."""

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    stats: np.ndarray


def quiet(function):
    """Overflow and NaN are answers here, not accidents."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return wrapper


# ----------------------------------------------------------------------------------------------------------------------
# float32


def f32(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


_fmaf = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").fmaf
_fmaf.argtypes, _fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
_libm_fma = np.frompyfunc(_fmaf, 3, 1)


def libm_fma(a, b, c) -> np.ndarray:
    """a * b + c with one rounding."""
    return f32(_libm_fma(f32(a), f32(b), f32(c)))


@quiet
def odd_fma(a, b, c) -> np.ndarray:
    """The same, faster: the product is exact in float64; the sum is rounded to odd there, so rounding it again is harmless."""
    product, c = f32(a).astype(np.float64) * f32(b).astype(np.float64), f32(c).astype(np.float64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return (bits + inexact * np.where((error > 0) == (total > 0), 1, -1)).view(np.float64).astype(np.float32)


def fma(a, b, c) -> np.ndarray:
    return libm_fma(a, b, c) if max(np.size(a), np.size(b), np.size(c)) <= 2048 else odd_fma(a, b, c)


def minimum(a, b) -> np.ndarray:
    """The second operand wins when one is NaN."""
    a, b = np.broadcast_arrays(f32(a), f32(b))
    return np.where(a < b, a, b)


def maximum(a, b) -> np.ndarray:
    a, b = np.broadcast_arrays(f32(a), f32(b))
    return np.where(a > b, a, b)


def clamp(t, lo, hi) -> np.ndarray:
    return minimum(maximum(t, lo), hi)


def bounds(lo, hi) -> tuple[np.float32, np.float32]:
    """activation_min and activation_max; None is infinite."""
    return (-INFINITY if lo is None else np.float32(lo)), (INFINITY if hi is None else np.float32(hi))


def exact_range(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of every sample (dimension 0); NaNs are passed over; infinite where nothing is left."""
    y = y.reshape(len(y), math.prod(y.shape[1:]))
    return np.fmin.reduce(y, axis=1, initial=INFINITY), np.fmax.reduce(y, axis=1, initial=-INFINITY)


def per_sample(values, like: np.ndarray) -> np.ndarray:
    return np.asarray(values).reshape(-1, *[1] * (like.ndim - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Activation functions


@quiet
def exp(x) -> np.ndarray:
    x = clamp(x, -87, 87)
    n = np.rint(x * np.float32(1.4426950408889634))
    r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x))
    p = f32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, coefficient)
    return (fma(p, r * r, r) + np.float32(1)) * np.ldexp(np.float32(1), n.astype(np.int32))


@quiet
def gelu(x) -> np.ndarray:
    a = clamp(x, -5, 5)
    w, p = fma(a, a, -12.5), f32(-1.04934380e-15)
    for coefficient in (
        3.58216772e-14, -4.87572547e-13, 8.08780820e-12, -2.16874199e-10, 4.48719595e-09, -7.72570701e-08,
        1.28198008e-06, -2.06829100e-05, 3.29798233e-04, -5.62385423e-03, 1.41363665e-01,
    ):  # fmt: skip
        p = fma(p, w, coefficient)
    return f32(x) * (a * p + np.float32(0.5))


@quiet
def sigmoid(x) -> np.ndarray:
    return np.float32(1) / (np.float32(1) + exp(-f32(x)))


@quiet
def activate(kind: int, x) -> np.ndarray:
    x = f32(x)
    if kind == SILU:
        return x * sigmoid(x)
    if kind == GELU:
        return gelu(x)
    if kind == HARDSWISH:
        return x * (clamp(x + np.float32(3), 0, 6) * np.float32(0.16666667))
    return sigmoid(x) if kind == SIGMOID else x


def activation_range(kind: int, lo, hi, activation_min, activation_max) -> tuple[np.ndarray, np.ndarray]:
    """Image of the ranges [lo, hi] under an activation."""
    if kind == CLAMP:
        return clamp(lo, activation_min, activation_max), clamp(hi, activation_min, activation_max)
    at_lo, at_hi = activate(kind, lo), activate(kind, hi)
    image_lo = minimum(at_lo, at_hi)
    if kind in ARGMIN:
        holds = (lo < np.float32(ARGMIN[kind])) & (np.float32(ARGMIN[kind]) < hi)
        image_lo = np.where(holds, activate(kind, ARGMIN[kind]), image_lo)
    return image_lo, maximum(at_lo, at_hi)


def activation_bounds(kind: int, activation_min, activation_max) -> tuple[np.float32, np.float32]:
    """Image of all numbers under an activation."""
    if kind == CLAMP:
        return activation_min, activation_max
    return (np.float32(0), np.float32(1)) if kind == SIGMOID else (activate(kind, ARGMIN[kind]), INFINITY)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters, the one rounding, stats


def valid_scale(scale) -> np.ndarray:
    return (f32(scale) > 0) & np.isfinite(f32(scale))


def clamped_zero_point(zero_point) -> np.ndarray:
    return np.clip(np.asarray(zero_point, dtype=np.int64), 0, 255)


@quiet
def parameters(lo, hi) -> tuple[np.ndarray, np.ndarray]:
    """Scale (NaN: invalid) and zero point of ranges."""
    finite = np.isfinite(lo) & np.isfinite(hi)
    lo, hi = minimum(lo, 0), maximum(hi, 0)
    scale = maximum((hi - lo) / np.float32(255), SMALLEST_SCALE)
    good = finite & valid_scale(scale)
    zero_point = clamp(np.rint(-lo / scale), 0, 255)
    return np.where(good, scale, np.float32(np.nan)), np.where(good, zero_point, 0).astype(np.int64)


def fixed_parameters(predictor, samples: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(samples, predictor[0], dtype=np.float32), np.full(samples, clamped_zero_point(int(predictor[1])))


@quiet
def round_to_codes(t, zero_point) -> tuple[np.ndarray, np.ndarray]:
    """(codes, clipped) of t, in units of the scale and relative to the zero point."""
    t, z = f32(t), f32(zero_point)
    lo, hi = -z, np.float32(255) - z
    q = np.rint(clamp(t, lo, hi)).astype(np.int64) + np.asarray(zero_point, dtype=np.int64)
    rounded = np.rint(t)
    return q, ~((rounded >= lo) & (rounded <= hi))


def moments(q: np.ndarray, channel_stats: bool = False) -> np.ndarray:
    """Stats of codes [samples, ..., channels] that clip nothing."""
    q = q.astype(np.int64).reshape(len(q), math.prod(q.shape[1:-1]), q.shape[-1])
    columns = [q.sum((1, 2))[:, None], (q * q).sum((1, 2))[:, None], np.zeros((len(q), 1), dtype=np.int64)]
    return np.concatenate([*columns, *([q.sum(1), (q * q).sum(1)] if channel_stats else [])], 1)


def output(q, clipped, scale, zero_point, valid, channel_stats: bool) -> Codes:
    """Finishes an output: an invalid sample has scale NaN, zero point 0, codes 0, sums 0 and a clip count of -1."""
    q = np.where(per_sample(valid, q), q, 0)
    stats = moments(q, channel_stats)
    stats[:, 2] = np.where(valid, clipped.reshape(len(q), math.prod(q.shape[1:])).sum(1), -1)
    return Codes(q.astype(np.uint8), np.where(valid, f32(scale), np.float32(np.nan)), np.where(valid, zero_point, 0).astype(np.int32), stats)


def inverse(scale, like) -> np.ndarray:
    return per_sample(np.float32(1) / f32(scale), like)


def centred(x: Codes) -> np.ndarray:
    """q - z"""
    return x.q.astype(np.int64) - per_sample(clamped_zero_point(x.zero_point), x.q)


def nan_where_invalid(scale) -> np.ndarray:
    return np.where(valid_scale(scale), f32(scale), np.float32(np.nan))


# ----------------------------------------------------------------------------------------------------------------------
# Quantize and dequantize


@quiet
def quantize(x: np.ndarray, scale=None, zero_point=None, channel_stats: bool = False) -> Codes:
    """x: float32 [samples, ..., channels]; scale and zero_point: one value each, or None for the exact range."""
    values = x.reshape(len(x), math.prod(x.shape[1:]))
    if scale is None:
        lo, hi = (values.min(1), values.max(1)) if values.size else (np.zeros(len(x)), np.zeros(len(x)))
        s, z = parameters(f32(lo), f32(hi))
        s = np.where(np.isfinite(values).all(1), s, np.float32(np.nan))
    else:
        s, z = np.full(len(x), scale, dtype=np.float32), np.full(len(x), clamped_zero_point(zero_point))
    q, clipped = round_to_codes(x * inverse(s, x), per_sample(z, x))
    return output(q, clipped, s, z, valid_scale(s), channel_stats)


def to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Half to even, as uint16; every NaN is 0x7fc0."""
    bits = f32(x).view(np.uint32).astype(np.uint64)
    kept, rest = bits >> 16, bits & 0xFFFF
    kept += (rest > 0x8000) | ((rest == 0x8000) & (kept & 1 == 1))
    return np.where(np.isnan(x), 0x7FC0, kept).astype(np.uint16)


@quiet
def dequantize(x: Codes) -> np.ndarray:
    """float32; narrow it with astype(float16) or to_bfloat16_bits."""
    return per_sample(nan_where_invalid(x.scale), x.q) * f32(centred(x))


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class Geometry(NamedTuple):
    """Of a convolution or pooling window; padding is (top, bottom, left, right)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        padded = height + self.padding[0] + self.padding[1], width + self.padding[2] + self.padding[3]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        return tuple((p - span) // s + 1 for p, span, s in zip(padded, spans, self.stride))

    def fields(self, x: np.ndarray, fill: int = 0) -> np.ndarray:
        """Receptive fields [N, OH, OW, kh, kw, C] of x [N, H, W, C], whose padding is `fill`."""
        top, bottom, left, right = self.padding
        (height, width), (oh, ow) = x.shape[1:3], self.out_size(*x.shape[1:3])
        padded = np.full((len(x), height + top + bottom, width + left + right, x.shape[3]), fill, dtype=x.dtype)
        padded[:, top : top + height, left : left + width] = x
        rows = (np.arange(oh) * self.stride[0])[:, None] + (np.arange(self.kernel[0]) * self.dilation[0])[None]
        columns = (np.arange(ow) * self.stride[1])[:, None] + (np.arange(self.kernel[1]) * self.dilation[1])[None]
        return padded[:, rows[:, None, :, None], columns[None, :, None, :]]


class Layer(NamedTuple):
    """A weight int8 [O, kh, kw, I / groups], its scale [O], a bias [O] or None, the geometry, and the output's profile [O] or None."""

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None
    geometry: Geometry
    profile: np.ndarray | None = None


def accumulators(x: Codes, layer: Layer) -> np.ndarray:
    """sum_k (q_k - z_x) w_ok, int64 [N, OH, OW, O]; fails where int32 would overflow."""
    fields, groups, out_channels = layer.geometry.fields(centred(x)), layer.geometry.groups, len(layer.weight)
    n, oh, ow, kh, kw, channels = fields.shape
    terms = kh * kw * channels // groups
    fields = fields.reshape(n * oh * ow, kh * kw, groups, channels // groups).transpose(2, 0, 1, 3).reshape(groups, n * oh * ow, terms)
    weight = layer.weight.astype(np.int64).reshape(groups, out_channels // groups, terms)
    acc = np.matmul(fields, weight.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(n, oh, ow, out_channels)
    assert acc.size == 0 or np.abs(acc).max() < 2**31
    return acc


@quiet
def field_moments(x: Codes, layer: Layer, gamma: int, per_group: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1, S2 and V1, float32 [N, groups] (one group for all unless per_group)."""
    s = per_sample(nan_where_invalid(x.scale), np.zeros((1, 1)))
    values, z = math.prod(x.q.shape[1:]), clamped_zero_point(x.zero_point)
    if gamma == 0:
        k = float(math.prod(layer.weight.shape[1:]))
        total, squares = x.stats[:, 0], x.stats[:, 1]
        mean = (total - values * z).astype(np.float64) / values
        square = (squares - 2 * z * total + values * z * z).astype(np.float64) / values
        parts = [(k * part)[:, None] for part in (mean, square, np.maximum(square - mean * mean, 0.0))]
    else:
        fields, groups = layer.geometry.fields(centred(x))[:, ::gamma, ::gamma], layer.geometry.groups
        n, oh, ow, kh, kw, channels = fields.shape
        fields = fields.reshape(n, oh * ow, kh * kw, groups, channels // groups)
        t1, t2 = fields.sum((2, 4)), (fields * fields).sum((2, 4))  # [n, positions, groups]
        if not per_group:
            t1, t2 = (part.reshape(n, oh * ow * groups, 1) for part in (t1, t2))
        count = float(t1.shape[1])
        mean, square, of_squared = (part.sum(1).astype(np.float64) / count for part in (t1, t2, t1 * t1))
        parts = [mean, square, np.maximum(of_squared - mean * mean, 0.0)]
    return s * f32(parts[0]), (s * s) * f32(parts[1]), (s * s) * f32(parts[2])


@quiet
def law_of_stats(x: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a tensor, float32 [N]."""
    one = Layer(np.zeros((1, 1, 1, 1), dtype=np.int8), f32([1]), None, Geometry())
    mean, _, variance = field_moments(x, one, 0, False)
    return mean[:, 0], variance[:, 0]


@quiet
def add_laws(mean_a, variance_a, mean_b, variance_b, rho) -> tuple[np.ndarray, np.ndarray]:
    variance = fma(np.float32(2) * np.float32(rho), np.sqrt(variance_a * variance_b), variance_a + variance_b)
    return mean_a + mean_b, maximum(variance, 0)


def interleaved_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis in eight interleaved sums, each in order, which are then added in halves."""
    lanes = [np.zeros(terms.shape[:-1]) for _ in range(8)]
    for c in range(terms.shape[-1]):
        lanes[c % 8] = lanes[c % 8] + terms[..., c]
    for half in (4, 2, 1):
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


@quiet
def channel_law(x: Codes, layer: Layer, predictor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of strategy channel, without the residual: float32 [N, 1], or [N, O] of a depthwise layer."""
    channels, groups, out_channels = x.q.shape[-1], layer.geometry.groups, len(layer.weight)
    n, z = math.prod(x.q.shape[1:-1]), clamped_zero_point(x.zero_point)[:, None]
    total, squares = x.stats[:, 3 : 3 + channels], x.stats[:, 3 + channels :]
    t1 = (total - n * z).astype(np.float64)
    t2 = (squares - 2 * z * total + n * z * z).astype(np.float64)
    variance = np.maximum(float(n) * t2 - t1 * t1, 0.0)
    s = nan_where_invalid(x.scale)[:, None]
    if groups > 1 and channels == groups:
        mean_w, square_w, bias = predictor[3:].reshape(3, out_channels)
        t1, variance = (np.repeat(part, out_channels // groups, 1) for part in (t1, variance))
        return fma(mean_w, s * f32(t1 / n), bias), square_w * ((s * s) * f32(variance / (float(n) * n)))
    mean_b, var_b, within, between = predictor[3:7]
    mean_w, square_w = predictor[7:].reshape(2, channels).astype(np.float64)
    spread = square_w - mean_w * mean_w * (1.0 / math.prod(layer.geometry.kernel))
    spread = np.where(spread > 0, spread, 0.0)
    sums = [interleaved_sum(part)[:, None] for part in (mean_w * t1, square_w * variance, spread * (t1 * t1))]
    inner, outer = ((s * s) * f32(part / (float(n) * n)) for part in sums[1:])
    return fma(s, f32(sums[0] / n), mean_b), fma(within, inner, fma(between, outer, var_b))


@quiet
def gaussian_laws(x: Codes, layer: Layer, strategy: int, predictor: np.ndarray, gamma: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the gaussian strategies, without the residual: float32 [N, L]."""
    out_channels, groups = len(layer.weight), layer.geometry.groups
    s1, s2, v1 = field_moments(x, layer, gamma, strategy == GAUSSIAN_CHANNEL)
    if strategy == GAUSSIAN_CHANNEL:
        mean_w, var_w, mean_b = predictor[3:].reshape(3, out_channels)
        var_b = np.float32(0)
        if s1.shape[1] == groups:
            s1, s2, v1 = (np.repeat(part, out_channels // groups, 1) for part in (s1, s2, v1))
    else:
        mean_w, var_w, mean_b, var_b = (predictor[3 + i] for i in range(4))
    mean = fma(mean_w, s1, mean_b)
    return mean, fma(mean_w * mean_w, v1, fma(var_w, s2, var_b))


@quiet
def law(x: Codes, layer: Layer, residual: Codes | None, strategy: int, predictor: np.ndarray, gamma: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the layer's pre-activations, float32 [N, L]."""
    mean, variance = channel_law(x, layer, predictor) if strategy == CHANNEL else gaussian_laws(x, layer, strategy, predictor, gamma)
    if residual is not None:
        mean_r, variance_r = (part[:, None] for part in law_of_stats(residual))
        mean, variance = add_laws(mean, variance, mean_r, variance_r, predictor[2])
    return mean, variance


@quiet
def surrogate_law(x: Codes, layer: Layer, residual: Codes | None, strategy: int, predictor: np.ndarray, gamma: int) -> np.ndarray:
    """Mean and standard deviation [N, L, 2]; NaN for an invalid sample."""
    mean, variance = law(x, layer, residual, strategy, predictor, gamma)
    valid = valid_scale(x.scale) & (True if residual is None else valid_scale(residual.scale))
    return np.where(valid[:, None, None], np.stack([mean, np.sqrt(variance)], 2), np.float32(np.nan))


@quiet
def law_range(mean, variance, predictor) -> tuple[np.ndarray, np.ndarray]:
    """mean - alpha sigma, mean + beta sigma, joined over the laws; NaN where one of them is not finite."""
    sigma = np.sqrt(variance)
    lo, hi = fma(-predictor[0], sigma, mean), fma(predictor[1], sigma, mean)
    finite = (np.isfinite(lo) & np.isfinite(hi)).all(1)
    return np.where(finite, lo.min(1), np.float32(np.nan)), np.where(finite, hi.max(1), np.float32(np.nan))


def probed_rows(rows: int) -> np.ndarray:
    """The positions of a sample, of `rows`, that a probe computes first."""
    if rows < 64:
        return np.arange(rows)
    segments = max(2, math.ceil(rows / 256))
    found = []
    for i in range(segments):
        begin, end = rows * i // segments, rows * (i + 1) // segments
        first = begin + ((i + 1) * 2654435769 % 2**32 * (end - begin - 15) >> 32)
        found.append(np.arange(first, first + 16))
    return np.concatenate(found)


@quiet
def probe_range(y: np.ndarray, image, predictor) -> tuple[np.ndarray, np.ndarray]:
    """Range of the probed rows of y [N, OH, OW, O], widened within `image` unless they are all; NaN where it is not finite."""
    n, oh, ow, channels = y.shape
    probed = probed_rows(oh * ow)
    lo, hi = exact_range(y.reshape(n, oh * ow, channels)[:, probed])
    if len(probed) == oh * ow:
        return lo, hi
    width = hi - lo
    lo, hi = fma(-predictor[0], width, lo), fma(predictor[1], width, hi)
    finite = np.isfinite(lo) & np.isfinite(hi)
    return np.where(finite, clamp(lo, *image), np.float32(np.nan)), clamp(hi, *image)


@quiet
def layer(
    x: Codes, weights: Layer, residual: Codes | None = None, activation: int = CLAMP, activation_min=None, activation_max=None,
    strategy: int = DYNAMIC, predictor=None, gamma: int = 0, channel_stats: bool = False,
) -> Codes | np.ndarray:  # fmt: skip
    """conv2d and linear; strategy NONE gives float32."""
    acc = accumulators(x, weights)
    amin, amax = bounds(activation_min, activation_max)
    profile = f32(np.ones(acc.shape[-1])) if weights.profile is None else f32(weights.profile)
    over_profile = np.float32(1) / profile
    scale = weights.weight_scale * over_profile
    bias = f32(np.zeros(acc.shape[-1])) if weights.bias is None else f32(weights.bias) * over_profile
    image = activation_bounds(activation, amin, amax)
    valid = valid_scale(x.scale) & (True if residual is None else valid_scale(residual.scale))
    s_x = per_sample(nan_where_invalid(x.scale), acc)

    bounds_over_profile = [bound * (over_profile.max() if away else over_profile.min()) for bound, away in zip(image, (image[0] < 0, image[1] > 0))]

    def pre_activation(i):
        """Over the profile, in units of a scale whose inverse is i."""
        t = fma(f32(acc), (s_x * i) * scale, i * bias)
        return t if residual is None else fma(f32(centred(residual)), per_sample(nan_where_invalid(residual.scale), acc) * i, t)

    def finished(i):
        if activation == CLAMP:
            return clamp(pre_activation(i), (amin * i) * over_profile, (amax * i) * over_profile)
        return activate(activation, pre_activation(np.float32(1)) * profile) * (i * over_profile)

    def seen():
        y = finished(np.float32(1))
        return np.where(per_sample(valid, y), y, np.float32(np.nan))

    if strategy == NONE:
        y = pre_activation(np.float32(1)) * profile
        y = clamp(y, amin, amax) if activation == CLAMP else activate(activation, y)
        return np.where(per_sample(valid, y), y, np.float32(np.nan))

    if strategy == FIXED:
        s, z = fixed_parameters(predictor, len(x.q))
    elif strategy == DYNAMIC:
        s, z = parameters(*exact_range(seen()))
    elif strategy == PROBE:
        s, z = parameters(*probe_range(seen(), bounds_over_profile, predictor))
    else:
        lo, hi = law_range(*law(x, weights, residual, strategy, predictor, gamma), predictor)
        finite = np.isfinite(lo) & np.isfinite(hi)
        lo, hi = (clamp(part, *bounds_over_profile) for part in (lo, hi)) if (over_profile != 1).any() else activation_range(activation, lo, hi, amin, amax)
        s, z = parameters(np.where(finite, lo, np.float32(np.nan)), hi)
    valid = valid & valid_scale(s)
    q, clipped = round_to_codes(finished(inverse(s, acc)), per_sample(z, acc))
    return output(q, clipped, s, z, valid, channel_stats)


# ----------------------------------------------------------------------------------------------------------------------
# Ops without weights


@quiet
def add(
    a: Codes, b: Codes, activation_min=None, activation_max=None, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False
) -> Codes:  # fmt: skip
    amin, amax = bounds(activation_min, activation_max)
    valid = valid_scale(a.scale) & valid_scale(b.scale)
    s_a, s_b = per_sample(nan_where_invalid(a.scale), a.q), per_sample(nan_where_invalid(b.scale), b.q)
    if strategy == FIXED:
        s, z = fixed_parameters(predictor, len(a.q))
    elif a.q[:1].size == 0:
        s, z = parameters(np.zeros(len(a.q)), np.zeros(len(a.q)))
    elif strategy == DYNAMIC:
        s, z = parameters(*exact_range(clamp(fma(f32(centred(b)), s_b, f32(centred(a)) * s_a), amin, amax)))
    else:
        mean, variance = add_laws(*law_of_stats(a), *law_of_stats(b), predictor[2])
        lo, hi = law_range(mean[:, None], variance[:, None], predictor)
        finite = np.isfinite(lo) & np.isfinite(hi)
        z_a, z_b = clamped_zero_point(a.zero_point), clamped_zero_point(b.zero_point)
        smallest, largest = (fma(f32(code - z_b), s_b.ravel(), f32(code - z_a) * s_a.ravel()) for code in (0, 255))
        lo, hi = clamp(lo, smallest, largest), clamp(hi, smallest, largest)
        s, z = parameters(np.where(finite, clamp(lo, amin, amax), np.float32(np.nan)), clamp(hi, amin, amax))
    valid = valid & valid_scale(s)
    i = inverse(s, a.q)
    t = clamp(fma(f32(centred(b)), s_b * i, f32(centred(a)) * (s_a * i)), amin * i, amax * i)
    q, clipped = round_to_codes(t, per_sample(z, a.q))
    return output(q, clipped, s, z, valid, channel_stats)


@quiet
def mul(a: Codes, b: Codes, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False) -> Codes:
    """b as a, or [N, 1, 1, C]."""
    valid = valid_scale(a.scale) & valid_scale(b.scale)
    both = np.where(valid, f32(a.scale) * f32(b.scale), np.float32(np.nan))
    valid &= valid_scale(both)
    products = centred(a) * centred(b)
    if strategy == FIXED:
        s, z = fixed_parameters(predictor, len(a.q))
    elif a.q[:1].size == 0:
        s, z = parameters(np.zeros(len(a.q)), np.zeros(len(a.q)))
    elif strategy == DYNAMIC:
        s, z = parameters(*(f32(end) * both for end in (products.min((1, 2, 3)), products.max((1, 2, 3)))))
    else:
        (m_a, v_a), (m_b, v_b) = law_of_stats(a), law_of_stats(b)
        variance = fma(v_a, v_b, fma(m_a * m_a, v_b, (m_b * m_b) * v_a))
        lo, hi = law_range((m_a * m_b)[:, None], variance[:, None], predictor)
        ends = np.stack([(i - clamped_zero_point(a.zero_point)) * (j - clamped_zero_point(b.zero_point)) for i in (0, 255) for j in (0, 255)])
        finite = np.isfinite(lo) & np.isfinite(hi)
        least, largest = f32(ends.min(0)) * both, f32(ends.max(0)) * both
        s, z = parameters(np.where(finite, clamp(lo, least, largest), np.float32(np.nan)), clamp(hi, least, largest))
    valid = valid & valid_scale(s)
    t = clamp(f32(products) * (per_sample(both, a.q) * inverse(s, a.q)), np.float32(-np.inf), np.float32(np.inf))
    q, clipped = round_to_codes(t, per_sample(z, a.q))
    return output(q, clipped, s, z, valid, channel_stats)


@quiet
def activation(
    x: Codes, kind: int, activation_min=None, activation_max=None, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False
) -> Codes:  # fmt: skip
    amin, amax = bounds(activation_min, activation_max)

    def f(v):
        return clamp(v, amin, amax) if kind == CLAMP else activate(kind, v)

    s_x = per_sample(nan_where_invalid(x.scale), x.q)
    y = f(s_x * f32(centred(x)))
    if strategy == FIXED:
        s, z = fixed_parameters(predictor, len(x.q))
    elif strategy == DYNAMIC and x.q[:1].size > 0:
        s, z = parameters(*exact_range(y))
    else:
        s, z = parameters(*exact_range(f(s_x.reshape(-1, 1) * f32(np.arange(256) - clamped_zero_point(x.zero_point)[:, None]))))
    q, clipped = round_to_codes(y * inverse(s, x.q), per_sample(z, x.q))
    return output(q, clipped, s, z, valid_scale(x.scale) & valid_scale(s), channel_stats)


@quiet
def concat(xs: list[Codes], strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False) -> Codes:
    zero_points = np.stack([clamped_zero_point(x.zero_point) for x in xs])
    scales = np.stack([nan_where_invalid(x.scale) for x in xs])
    valid = valid_scale(scales).all(0)
    if strategy == FIXED:
        s, z = fixed_parameters(predictor, len(xs[0].q))
    else:
        s, z = parameters((scales * f32(0 - zero_points)).min(0), (scales * f32(255 - zero_points)).max(0))
        equal = (scales == scales[0]).all(0) & (zero_points == zero_points[0]).all(0)
        s, z = np.where(equal, scales[0], s), np.where(equal, zero_points[0], z)
    parts = []
    for x, scale in zip(xs, scales):
        parts.append(round_to_codes((per_sample(scale, x.q) * f32(centred(x))) * inverse(s, x.q), per_sample(z, x.q)))
    q, clipped = (np.concatenate(part, -1) for part in zip(*parts))
    return output(q, clipped, s, z, valid & valid_scale(s), channel_stats)


def max_pool2d(x: Codes, geometry: Geometry, channel_stats: bool = False) -> Codes:
    """A window that holds nothing but padding gives the smallest code."""
    q = geometry.fields(x.q.astype(np.int64), fill=-1).max((3, 4)).clip(0)
    return output(q, np.zeros(q.shape, dtype=bool), x.scale, clamped_zero_point(x.zero_point), valid_scale(x.scale), channel_stats)


def upsample_nearest2d(x: Codes, factor: tuple[int, int], channel_stats: bool = False) -> Codes:
    q = x.q.astype(np.int64).repeat(factor[0], 1).repeat(factor[1], 2)
    return output(q, np.zeros(q.shape, dtype=bool), x.scale, clamped_zero_point(x.zero_point), valid_scale(x.scale), channel_stats)


@quiet
def average(x: Codes, acc: np.ndarray, divisor: np.ndarray, strategy: int, predictor, channel_stats: bool) -> Codes:
    """acc: sums of q - z [N, OH, OW, C]; divisor [OH, OW]."""
    share = (np.float32(1) / f32(divisor))[None, :, :, None]
    s_x = per_sample(nan_where_invalid(x.scale), acc)
    s, z = fixed_parameters(predictor, len(acc)) if strategy == FIXED else parameters(*exact_range(fma(f32(acc), s_x * share, 0)))
    q, clipped = round_to_codes(fma(f32(acc), (s_x * inverse(s, acc)) * share, 0), per_sample(z, acc))
    return output(q, clipped, s, z, valid_scale(x.scale) & valid_scale(s), channel_stats)


def avg_pool2d(
    x: Codes, geometry: Geometry, count_include_pad: bool = True, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False
) -> Codes:  # fmt: skip
    top, bottom, left, right = geometry.padding
    height, width = x.q.shape[1:3]
    oh, ow = geometry.out_size(height, width)
    divisor = np.empty((oh, ow), dtype=np.int64)
    for oy in range(oh):
        for ox in range(ow):  # as torch: the window is cut to the padded input first, then to the input
            y0, x0 = oy * geometry.stride[0] - top, ox * geometry.stride[1] - left
            y1, x1 = min(y0 + geometry.kernel[0], height + bottom), min(x0 + geometry.kernel[1], width + right)
            inside = (min(y1, height) - max(y0, 0)) * (min(x1, width) - max(x0, 0))
            divisor[oy, ox] = (y1 - y0) * (x1 - x0) if count_include_pad else inside
    return average(x, geometry.fields(centred(x)).sum((3, 4)), divisor, strategy, predictor, channel_stats)


def adaptive_avg_pool2d(x: Codes, size: tuple[int, int], strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False) -> Codes:
    values = centred(x)
    edges = [[(i * n // out, -(-(i + 1) * n // out)) for i in range(out)] for n, out in zip(values.shape[1:3], size)]
    acc = np.stack([np.stack([values[:, y0:y1, x0:x1].sum((1, 2)) for x0, x1 in edges[1]], 1) for y0, y1 in edges[0]], 1)
    divisor = np.array([[(y1 - y0) * (x1 - x0) for x0, x1 in edges[1]] for y0, y1 in edges[0]])
    return average(x, acc, divisor, strategy, predictor, channel_stats)


# ----------------------------------------------------------------------------------------------------------------------
# Transformers: rows [N, C], one scale each


@quiet
def sum_in_lanes(x: np.ndarray, squares: bool = False) -> np.ndarray:
    """Sum over the last dimension: value i is added to lane i % 32, then the lanes are joined by halves."""
    lanes = np.zeros((*x.shape[:-1], 32), dtype=np.float32)
    for begin in range(0, x.shape[-1], 32):
        part = x[..., begin : begin + 32]
        some = lanes[..., : part.shape[-1]]
        some[...] = fma(part, part, some) if squares else some + part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def quantize_rows(y: np.ndarray, valid: np.ndarray, strategy: int, predictor, channel_stats: bool) -> Codes:
    """Every row with its exact range, or all with the fixed one; rows that are not valid become invalid samples."""
    if strategy == FIXED:
        scale, zero_point = fixed_parameters(predictor, 1)
        codes = quantize(y, scale[0], zero_point[0], channel_stats)
    else:
        codes = quantize(y, channel_stats=channel_stats)
    valid = valid & valid_scale(codes.scale)
    stats = np.where(valid[:, None], codes.stats, np.eye(1, codes.stats.shape[1], 2, dtype=np.int64) * -1)
    return Codes(
        np.where(valid[:, None], codes.q, np.uint8(0)), np.where(valid, codes.scale, np.float32(np.nan)), np.where(valid, codes.zero_point, np.int32(0)), stats
    )


@quiet
def layer_norm(
    x: Codes | np.ndarray, residual, weight, bias, eps: float, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False
) -> tuple[Codes | np.ndarray, np.ndarray]:  # fmt: skip
    """(output, x + residual)"""
    residual = np.float32(0) if residual is None else residual
    if isinstance(x, Codes):
        valid, n = valid_scale(x.scale), x.q.shape[1]
        total = fma(f32(centred(x)), per_sample(nan_where_invalid(x.scale), x.q), residual)
    else:
        valid, n = np.ones(len(x), dtype=bool), x.shape[1]
        total = x + residual
    mean = sum_in_lanes(total) / np.float32(n)
    centre = total - mean[:, None]
    factor = np.float32(1) / np.sqrt(sum_in_lanes(centre, squares=True) / np.float32(n) + np.float32(eps))
    y = fma(centre * factor[:, None], 1 if weight is None else weight, 0 if bias is None else bias)
    return (y if strategy == NONE else quantize_rows(y, valid, strategy, predictor, channel_stats)), total


@quiet
def attention(
    query: Codes, key: Codes, value: Codes, batch: int, heads: int, scale: float, strategy: int = DYNAMIC, predictor=None, channel_stats: bool = False
) -> Codes:  # fmt: skip
    """query [batch * queries, C]; key and value [batch * keys, C]."""

    def per_head(x: Codes) -> tuple[np.ndarray, np.ndarray]:
        """Centred codes [batch, heads, tokens, dim] and scales [batch, 1, tokens]."""
        values = centred(x).reshape(batch, -1, heads, x.q.shape[1] // heads).transpose(0, 2, 1, 3)
        return values, nan_where_invalid(x.scale).reshape(batch, 1, -1)

    (q, q_scale), (k, k_scale), (v, v_scale) = (per_head(x) for x in (query, key, value))
    t = f32(q @ k.transpose(0, 1, 3, 2)) * k_scale[:, :, None]
    e = exp((t - t.max(-1, keepdims=True)) * (q_scale * np.float32(scale))[..., None])
    w = e * v_scale[:, :, None]
    most = w.max(-1, keepdims=True)
    codes = np.rint(clamp(w * (np.float32(255) / most), 0, 255)).astype(np.int64)
    y = f32(codes @ v) * (most / np.float32(255) / sum_in_lanes(e)[..., None])
    tokens = valid_scale(key.scale).reshape(batch, -1).all(1) & valid_scale(value.scale).reshape(batch, -1).all(1)
    valid = valid_scale(query.scale) & np.repeat(tokens, q.shape[2])
    return quantize_rows(y.transpose(0, 2, 1, 3).reshape(query.q.shape), valid, strategy, predictor, channel_stats)
