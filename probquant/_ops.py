"""Loads torch.ops.probquant and registers its fakes, so that torch.compile and torch.export trace every op.

The schemas stand in csrc/torch/schemas.h; the fakes below give the same shapes, dtypes and strides as the kernels, with
symbolic sizes. They check what a trace can know; the kernels check everything.
"""

from __future__ import annotations

import enum
from pathlib import Path

import torch

from . import _native

#: Registers torch.ops.probquant wherever it is opened (dlopen from C++), without Python.
ops_library = str(Path(_native.__file__).parent / "_torch_ops.so")
torch.ops.load_library(ops_library)
ops = torch.ops.probquant


class Strategy(enum.IntEnum):
    """How a layer's output gets its scale and zero point (csrc/include/probquant/types.h)."""

    NONE = 0
    FIXED = 1
    DYNAMIC = 2
    GAUSSIAN = 3
    GAUSSIAN_CHANNEL = 4
    PROBE = 5
    CHANNEL = 6


class Activation(enum.IntEnum):
    """Function fused behind a layer (csrc/include/probquant/types.h)."""

    CLAMP = 0
    SILU = 1
    GELU = 2
    HARDSWISH = 3
    SIGMOID = 4


_STATS_SAMPLE = 3


def _is_image(x, x_scale) -> bool:
    return x.dim() == 4 and x_scale.dim() == 1


def _codes(like, sizes, image: bool, dtype=torch.uint8):
    y = like.new_empty(sizes, dtype=dtype)
    return y.to(memory_format=torch.channels_last) if image else y


def _outputs(q, leading, channels, channel_stats: bool):
    columns = _STATS_SAMPLE + (2 * channels if channel_stats else 0)
    return (
        q,
        q.new_empty(leading, dtype=torch.float32),
        q.new_empty(leading, dtype=torch.int32),
        q.new_empty([*leading, columns], dtype=torch.int64),
    )


def _check_codes(op, x, x_scale):
    torch._check(x.dtype == torch.uint8, lambda: f"probquant: {op}: x has dtype {x.dtype}, want uint8")
    torch._check(
        1 <= x_scale.dim() < x.dim(),
        lambda: f"probquant: {op}: x_scale has shape {list(x_scale.shape)}, want leading dimensions of x's {list(x.shape)}",
    )


def _pair(value):
    return (value[0], value[-1])


def _padding(value):
    """(top, bottom, left, right)"""
    return tuple(value) if len(value) == 4 else (value[0], value[0], value[-1], value[-1])


def _window_sizes(x, kernel_size, stride, padding, dilation):
    (kh, kw), (sh, sw), (dh, dw), (top, bottom, left, right) = _pair(kernel_size), _pair(stride), _pair(dilation), _padding(padding)
    height = (x.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1
    return height, width


@torch.library.register_fake("probquant::quantize")
def _(x, sample_dims=1, scale=None, zero_point=None, channel_stats=False):
    torch._check(1 <= sample_dims < x.dim(), lambda: f"probquant: quantize: sample_dims {sample_dims}, want 1 to {x.dim() - 1}")
    image = x.dim() == 4 and sample_dims == 1
    channels = x.shape[1] if image else x.shape[-1]
    return _outputs(_codes(x, x.shape, image), x.shape[:sample_dims], channels, channel_stats)


@torch.library.register_fake("probquant::dequantize")
def _(x, x_scale, x_zero_point, dtype=None):
    _check_codes("dequantize", x, x_scale)
    return _codes(x, x.shape, _is_image(x, x_scale), dtype or torch.float32)


@torch.library.register_fake("probquant::moments")
def _(q, sample_dims=1, channel_stats=False):
    channels = q.shape[1] if q.dim() == 4 and sample_dims == 1 else q.shape[-1]
    columns = _STATS_SAMPLE + (2 * channels if channel_stats else 0)
    return q.new_empty([*q.shape[:sample_dims], columns], dtype=torch.int64)


@torch.library.register_fake("probquant::pack_weight")
def _(weight, weight_scale, bias=None, groups=1, output_profile=None):
    torch._check(weight.dim() in (2, 4), lambda: f"probquant: pack_weight: weight has shape {list(weight.shape)}, want 2 or 4 dimensions")
    kernel = tuple(weight.shape[1:3]) if weight.dim() == 4 else (1, 1)
    cuda = weight.device.type == "cuda"  # has a layout of its own
    return weight.new_empty([_native.packed_weight_bytes(weight.shape[0], *kernel, weight.shape[-1], groups, cuda)], dtype=torch.uint8)


def _layer(x, x_scale, sizes, image, strategy, channel_stats):
    if strategy == Strategy.NONE:
        y = _codes(x, sizes, image, torch.float32)
        return y, y.new_empty([0]), y.new_empty([0], dtype=torch.int32), y.new_empty([0], dtype=torch.int64)
    return _outputs(_codes(x, sizes, image), x_scale.shape, sizes[1] if image else sizes[-1], channel_stats)


@torch.library.register_fake("probquant::linear")
def _(
    x, x_scale, x_zero_point, x_stats, packed_weight, out_features,
    residual=None, residual_scale=None, residual_zero_point=None, residual_stats=None,
    activation=0, activation_min=None, activation_max=None, strategy=2, predictor=None, gamma=0, channel_stats=False,
):  # fmt: skip
    _check_codes("linear", x, x_scale)
    return _layer(x, x_scale, [*x.shape[:-1], out_features], False, strategy, channel_stats)


@torch.library.register_fake("probquant::conv2d")
def _(
    x, x_scale, x_zero_point, x_stats, packed_weight, out_channels, kernel_size, stride, padding, dilation, groups,
    residual=None, residual_scale=None, residual_zero_point=None, residual_stats=None,
    activation=0, activation_min=None, activation_max=None, strategy=2, predictor=None, gamma=0, channel_stats=False,
):  # fmt: skip
    _check_codes("conv2d", x, x_scale)
    sizes = [x.shape[0], out_channels, *_window_sizes(x, kernel_size, stride, padding, dilation)]
    return _layer(x, x_scale, sizes, True, strategy, channel_stats)


@torch.library.register_fake("probquant::surrogate_law")
def _(
    x, x_scale, x_zero_point, x_stats, out_channels, kernel_size, stride, padding, dilation, groups,
    residual=None, residual_scale=None, residual_zero_point=None, residual_stats=None, *, strategy, predictor, gamma,
):  # fmt: skip
    depthwise = groups > 1 and x.shape[1] == groups
    laws = out_channels if strategy == Strategy.GAUSSIAN_CHANNEL or (strategy == Strategy.CHANNEL and depthwise) else 1
    return x.new_empty([x.shape[0], laws, 2], dtype=torch.float32)


@torch.library.register_fake("probquant::add")
def _(
    a, a_scale, a_zero_point, a_stats, b, b_scale, b_zero_point, b_stats,
    activation_min=None, activation_max=None, strategy=2, predictor=None, channel_stats=False,
):  # fmt: skip
    _check_codes("add", a, a_scale)
    torch._check(a.dim() == b.dim(), lambda: f"probquant: add: b has shape {list(b.shape)}, want a's {list(a.shape)}")
    image = _is_image(a, a_scale)
    return _outputs(_codes(a, a.shape, image), a_scale.shape, a.shape[1 if image else -1], channel_stats)


@torch.library.register_fake("probquant::mul")
def _(a, a_scale, a_zero_point, a_stats, b, b_scale, b_zero_point, b_stats, strategy=2, predictor=None, channel_stats=False):
    _check_codes("mul", a, a_scale)
    torch._check(a.dim() == b.dim(), lambda: f"probquant: mul: b has shape {list(b.shape)}, want a's {list(a.shape)}, or [N, C, 1, 1]")
    image = _is_image(a, a_scale)
    return _outputs(_codes(a, a.shape, image), a_scale.shape, a.shape[1 if image else -1], channel_stats)


@torch.library.register_fake("probquant::activation")
def _(x, x_scale, x_zero_point, activation, activation_min=None, activation_max=None, strategy=2, predictor=None, channel_stats=False):
    _check_codes("activation", x, x_scale)
    image = _is_image(x, x_scale)
    return _outputs(_codes(x, x.shape, image), x_scale.shape, x.shape[1 if image else -1], channel_stats)


@torch.library.register_fake("probquant::concat")
def _(xs, scales, zero_points, strategy=2, predictor=None, channel_stats=False):
    torch._check(len(xs) > 0, lambda: "probquant: concat: xs is empty")
    image = _is_image(xs[0], scales[0])
    axis = 1 if image else xs[0].dim() - 1
    sizes = list(xs[0].shape)
    sizes[axis] = sum(x.shape[axis] for x in xs)
    return _outputs(_codes(xs[0], sizes, image), scales[0].shape, sizes[axis], channel_stats)


@torch.library.register_fake("probquant::max_pool2d")
def _(x, x_scale, x_zero_point, kernel_size, stride, padding, dilation, channel_stats=False):
    _check_codes("max_pool2d", x, x_scale)
    sizes = [x.shape[0], x.shape[1], *_window_sizes(x, kernel_size, stride, padding, dilation)]
    return _outputs(_codes(x, sizes, True), x_scale.shape, x.shape[1], channel_stats)


@torch.library.register_fake("probquant::avg_pool2d")
def _(
    x, x_scale, x_zero_point, kernel_size, stride, padding, count_include_pad=True, strategy=2, predictor=None, channel_stats=False
):  # fmt: skip
    _check_codes("avg_pool2d", x, x_scale)
    sizes = [x.shape[0], x.shape[1], *_window_sizes(x, kernel_size, stride, padding, [1])]
    return _outputs(_codes(x, sizes, True), x_scale.shape, x.shape[1], channel_stats)


@torch.library.register_fake("probquant::adaptive_avg_pool2d")
def _(x, x_scale, x_zero_point, output_size, strategy=2, predictor=None, channel_stats=False):
    _check_codes("adaptive_avg_pool2d", x, x_scale)
    sizes = [x.shape[0], x.shape[1], *_pair(output_size)]
    return _outputs(_codes(x, sizes, True), x_scale.shape, x.shape[1], channel_stats)


@torch.library.register_fake("probquant::upsample_nearest2d")
def _(x, x_scale, x_zero_point, scale_factor, channel_stats=False):
    _check_codes("upsample_nearest2d", x, x_scale)
    height, width = _pair(scale_factor)
    sizes = [x.shape[0], x.shape[1], x.shape[2] * height, x.shape[3] * width]
    return _outputs(_codes(x, sizes, True), x_scale.shape, x.shape[1], channel_stats)


@torch.library.register_fake("probquant::layer_norm")
def _(
    x, x_scale, x_zero_point, residual, weight, bias, eps=1e-05, keep_sum=False, strategy=2, predictor=None, channel_stats=False
):  # fmt: skip
    total = x.new_empty(x.shape if keep_sum else [0], dtype=torch.float32)
    if strategy == Strategy.NONE:
        return *_layer(x, None, x.shape, False, strategy, channel_stats), total
    return *_outputs(_codes(x, x.shape, False), x.shape[:-1], x.shape[-1], channel_stats), total


@torch.library.register_fake("probquant::attention")
def _(
    query, query_scale, query_zero_point, key, key_scale, key_zero_point, value, value_scale, value_zero_point, heads, scale,
    strategy=2, predictor=None, channel_stats=False,
):  # fmt: skip
    _check_codes("attention", query, query_scale)
    return _outputs(_codes(query, query.shape, False), query_scale.shape, query.shape[-1], channel_stats)
