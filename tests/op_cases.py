"""Random inputs for the ops, and the way between the oracle's numpy arrays and torch's tensors."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from oracle import Codes, Geometry, Layer

from probquant import ops

SIZES = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129]  # around every tile size
BAD_SCALES = [np.nan, np.inf, -np.inf, 0.0, -1.0]
STRATEGIES = {"none": 0, "fixed": 1, "dynamic": 2, "gaussian": 3, "gaussian_channel": 4, "probe": 5, "channel": 6}
LAWS = (oracle.GAUSSIAN, oracle.GAUSSIAN_CHANNEL, oracle.CHANNEL)  # strategies that surrogate_law knows


# ----------------------------------------------------------------------------------------------------------------------
# Random data


def random_codes(rng, shape, wild: bool = False, channel_stats: bool = False) -> Codes:
    """Codes [N, ..., C]; wild: also extreme and invalid scales, zero points outside 0..255."""
    kind = rng.integers(6)
    n = shape[0]
    if kind <= 2:
        q = rng.integers(0, 256, shape)
    elif kind == 3:  # every value equal: sigma is 0
        q = np.broadcast_to(rng.integers(0, 256, (n, *[1] * (len(shape) - 1))), shape)
    elif kind == 4:
        q = rng.integers(0, 2, shape) * 255
    else:
        q = np.clip(np.rint(rng.normal(rng.integers(0, 256), 4, shape)), 0, 255)
    scale = 2.0 ** rng.uniform(-10, 2, n)
    zero_point = rng.choice([0, 255, 128, int(rng.integers(256))], n)
    if wild:
        extreme = rng.random(n)
        scale = np.where(extreme < 0.1, rng.choice([1e-30, 1e-18, 1e18, 3e36], n), scale)
        scale = np.where(extreme > 0.85, rng.choice(BAD_SCALES, n), scale)
        zero_point = np.where(rng.random(n) < 0.2, rng.choice([-7, 300, 2**31 - 1, -(2**31)], n), zero_point)
    q = np.array(q, dtype=np.uint8)
    return Codes(q, scale.astype(np.float32), zero_point.astype(np.int32), oracle.moments(q, channel_stats))


def random_layer(rng, out_channels: int, inputs: int, geometry: Geometry = Geometry(), bias: bool = True) -> Layer:
    shape = (out_channels, *geometry.kernel, inputs)
    kind = rng.integers(5)
    if kind == 0:
        weight = np.full(shape, rng.choice([-127, 127, 0, 3]))
    elif kind == 1:
        weight = rng.choice([-127, 127], shape)
    else:
        weight = rng.integers(-127, 128, shape)
    scale = oracle.f32(2.0 ** rng.uniform(-9, -4, out_channels))
    profile = oracle.f32(2.0 ** rng.uniform(-6, 2, out_channels)) if rng.random() < 0.4 else None
    return Layer(weight.astype(np.int8), scale, oracle.f32(rng.normal(0, 2, out_channels)) if bias else None, geometry, profile)


def random_predictor(rng, strategy: int, layer: Layer, spread: float, wild: bool = False) -> np.ndarray:
    """A predictor for a layer whose outputs have about this standard deviation; wild: also values that make no sense."""
    if strategy == oracle.FIXED:
        predictor = np.array([spread * 2.0 ** rng.uniform(-8, 1), rng.choice([0, 255, 128, int(rng.integers(256))])])
        if wild and rng.random() < 0.3:
            predictor[0] = rng.choice([*BAD_SCALES, 1e-30, 1e30])
        if wild and rng.random() < 0.2:
            predictor[1] = rng.choice([-3, 1000])
        return oracle.f32(predictor)
    if strategy == oracle.PROBE:
        widths = rng.uniform(-0.3, 1.0, 2)
        if wild and rng.random() < 0.3:
            widths[rng.integers(2)] = rng.choice([np.nan, np.inf, -np.inf, -5.0, 1e38, 0.0])
        return oracle.f32(widths)
    if strategy not in LAWS:
        return oracle.f32([])
    weight = (layer.weight.astype(np.float64) * layer.weight_scale[:, None, None, None]).reshape(len(layer.weight), -1)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.astype(np.float64)
    head = [rng.uniform(0.5, 8), rng.uniform(0.5, 8), rng.uniform(-1, 1)]
    if strategy == oracle.GAUSSIAN:
        predictor = np.array([*head, weight.mean(), weight.var(), bias.mean(), bias.var()])
    elif strategy == oracle.GAUSSIAN_CHANNEL:
        predictor = np.concatenate([head, weight.mean(1), weight.var(1), bias])
    elif layer.geometry.groups > 1 and layer.weight.shape[3] == 1:
        predictor = np.concatenate([head, weight.sum(1), (weight**2).sum(1), bias])
    else:
        channels = layer.weight.shape[3] * layer.geometry.groups
        laws = rng.normal(0, 0.1, channels), rng.uniform(0, 0.1, channels)
        predictor = np.concatenate([head, [bias.mean(), bias.var()], rng.uniform(0.2, 3, 2), *laws])
    if wild and rng.random() < 0.3:
        predictor[rng.integers(len(predictor))] = rng.choice([np.nan, np.inf, -np.inf, -5.0, 1e38, 0.0])
    return oracle.f32(predictor)


def spread_of(x: Codes, layer: Layer) -> float:
    """Rough standard deviation of a layer's outputs."""
    weights = np.prod(layer.weight.shape[1:])
    scale = np.median(np.where(oracle.valid_scale(x.scale), x.scale, 1).astype(np.float64)) if len(x.scale) else 1.0
    return float(scale * 80 * 70 * np.median(layer.weight_scale) * np.sqrt(weights))


# ----------------------------------------------------------------------------------------------------------------------
# numpy <-> torch


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element behind an aligned address."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    result = storage[1:].as_strided(t.shape, t.stride())
    return result.copy_(t)


def image(x: Codes) -> tuple[torch.Tensor, ...]:
    """The four tensors of an image batch, logical NCHW in channels_last memory."""
    values = torch.from_numpy(x.q).permute(0, 3, 1, 2)
    q = torch.empty(values.shape, dtype=torch.uint8, memory_format=torch.channels_last).copy_(values)
    return q, torch.from_numpy(x.scale), torch.from_numpy(x.zero_point), torch.from_numpy(x.stats)


def rows(x: Codes, leading: list[int], shape: list[int]) -> tuple[torch.Tensor, ...]:
    """The four tensors of rows [..., K] with a scale of shape `leading`."""
    tensors = (torch.from_numpy(part) for part in x)
    sizes = (shape, leading, leading, [*leading, x.stats.shape[-1]])
    return tuple(t.reshape(size) for t, size in zip(tensors, sizes))


def from_image(outputs) -> Codes:
    q, *rest = outputs
    return Codes(q.permute(0, 2, 3, 1).numpy(), *(part.numpy() for part in rest))


def from_rows(outputs, like: Codes) -> Codes:
    """Outputs with the oracle's shapes [N, 1, rows, K]."""
    return Codes(*(part.numpy().reshape(want.shape) if part.numel() == want.size else part.numpy() for part, want in zip(outputs, like)))


def packed(layer: Layer) -> torch.Tensor:
    weight = layer.weight if layer.geometry.kernel != (1, 1) else layer.weight.reshape(len(layer.weight), -1)
    bias, profile = (None if part is None else torch.from_numpy(part) for part in (layer.bias, layer.profile))
    return ops.pack_weight(torch.from_numpy(weight), torch.from_numpy(layer.weight_scale), bias, layer.geometry.groups, profile)


def geometry_arguments(geometry: Geometry) -> tuple:
    """kernel_size, stride, padding, dilation as the ops take them."""
    return list(geometry.kernel), list(geometry.stride), list(geometry.padding), list(geometry.dilation)


def predictor_tensor(predictor) -> torch.Tensor | None:
    return None if predictor is None or len(predictor) == 0 else torch.from_numpy(oracle.f32(predictor))


def run_conv2d(x: Codes, layer: Layer, residual: Codes | None = None, predictor=None, weight: torch.Tensor | None = None, **options):
    """torch.ops.probquant.conv2d on the oracle's arguments."""
    arguments = (*image(x), packed(layer) if weight is None else weight, len(layer.weight), *geometry_arguments(layer.geometry), layer.geometry.groups)
    outputs = ops.conv2d(*arguments, *(() if residual is None else image(residual)), predictor=predictor_tensor(predictor), **options)
    return outputs[0].permute(0, 2, 3, 1).numpy() if options.get("strategy") == 0 else from_image(outputs)


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


def assert_same_array(actual, expected, what: str) -> None:
    """Tolerance 0; NaNs are equal to each other. Names the first coordinate that differs."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, want {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, want {expected.dtype}"
    if actual.dtype == np.float32:
        differs = (actual.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(actual) & np.isnan(expected))
    else:
        differs = actual != expected
    if differs.any():
        at = tuple(int(i) for i in np.argwhere(differs)[0])
        raise AssertionError(f"{what}: {differs.sum()} of {differs.size} differ, first at {at}: got {actual[at]!r}, want {expected[at]!r}")


def assert_same(actual, expected, what: str) -> None:
    """Both Codes, or both float arrays."""
    if not isinstance(expected, Codes):
        return assert_same_array(np.ascontiguousarray(actual), np.ascontiguousarray(expected), what)
    for name in ("scale", "zero_point", "q", "stats"):  # in this order: a wrong scale explains wrong codes
        assert_same_array(np.ascontiguousarray(getattr(actual, name)), np.ascontiguousarray(getattr(expected, name)), f"{what}: {name}")
