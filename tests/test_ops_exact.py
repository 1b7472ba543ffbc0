"""Every op equals an independent computation (oracle.py) in every byte, over swept shapes and the edges of NUMERICS.md."""

import math

import numpy as np
import op_cases as cases
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import SIZES, STRATEGIES, assert_same, assert_same_array, from_image, from_rows, image, misaligned, packed, predictor_tensor, rows, run_conv2d
from oracle import Codes, Geometry, Layer

from probquant import _native, ops

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ACTIVATIONS = {"identity": {}, "relu": {"activation_min": 0.0}, "relu6": {"activation_min": 0.0, "activation_max": 6.0}, "clamp": {"activation_min": -1.5, "activation_max": 0.75}, "above_zero": {"activation_min": 0.5, "activation_max": 3.0}, "silu": {"activation": 1}, "gelu": {"activation": 2}, "hardswish": {"activation": 3}, "sigmoid": {"activation": 4}}  # fmt: skip
BOUNDS = [name for name, options in ACTIVATIONS.items() if "activation" not in options]
RANGES = ["fixed", "dynamic", "gaussian"]  # of ops without weights


def sweep(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


seeds = st.integers(0, 2**32 - 1)
flags = st.booleans()
batches = st.sampled_from([1, 1, 2, 3, 0])
rarely = st.sampled_from([False, False, True])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# The oracle itself


def test_fast_fma_is_libms():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**32, 60_000, dtype=np.uint32).view(np.float32) for _ in range(2))
    near = oracle.f32(rng.normal(0, 1, (3, 60_000)))
    ties = oracle.f32(rng.integers(-(2**23), 2**23, (2, 60_000)) | 1)  # products that end halfway between two floats
    addend = oracle.f32(ties[0] * ties[1] * -(2.0 ** rng.integers(-30, 2, 60_000)))
    for x, y, z in ((a, b, a[::-1]), near, (ties[0], ties[1], addend), (ties[0], ties[1], np.zeros_like(addend))):
        with np.errstate(all="ignore"):
            assert_same_array(oracle.odd_fma(x, y, z), oracle.libm_fma(x, y, z), "fma")


@sweep(40)
@given(geometry=st.deferred(lambda: geometries), height=st.integers(1, 9), width=st.integers(1, 9), seed=seeds)
def test_oracle_convolves_like_torch(geometry, height, width, seed):
    rng, groups = np.random.default_rng(seed), geometry.groups
    height, width = fitting(geometry, height, width)
    x = cases.random_codes(rng, (2, height, width, 2 * groups))
    layer = cases.random_layer(rng, 3 * groups, 2, geometry)
    top, bottom, left, right = geometry.padding
    values = torch.from_numpy(oracle.centred(x)).permute(0, 3, 1, 2).double()
    values = torch.nn.functional.pad(values, (left, right, top, bottom))
    weight = torch.from_numpy(layer.weight).permute(0, 3, 1, 2).double()
    wanted = torch.nn.functional.conv2d(values, weight, None, geometry.stride, 0, geometry.dilation, groups)
    assert_same_array(oracle.accumulators(x, layer), wanted.permute(0, 2, 3, 1).long().numpy(), "accumulators")


def test_activation_functions_are_close_to_the_true_ones():
    x = torch.linspace(-12, 12, 4001)
    wide = torch.linspace(-87, 87, 4001)
    truth = torch.exp(wide.double())
    assert float(((torch.from_numpy(oracle.exp(wide.numpy())).double() - truth) / truth).abs().max()) < 2 * 2.0**-23
    functions = {1: torch.nn.functional.silu, 2: torch.nn.functional.gelu, 3: torch.nn.functional.hardswish, 4: torch.sigmoid}
    for kind, function in functions.items():
        error = (torch.from_numpy(oracle.activate(kind, x.numpy())).double() - function(x.double())).abs() / (1 + x.abs())
        assert float(error.max()) < 1e-6, kind
    far = np.float32([5, 5.1, 88, 1e30])
    assert np.array_equal(oracle.gelu(far), far) and not oracle.gelu(-far).any()


# ----------------------------------------------------------------------------------------------------------------------
# Quantize, dequantize, moments


def float_values(rng, shape, kind):
    x = rng.normal(rng.choice([0, 0, 5]), 10.0 ** rng.integers(-3, 3), shape)
    if kind == "constant":
        x = np.full(shape, rng.choice([0.0, -0.0, 3.5, -2.0]))
    elif kind == "one sign":
        x = np.abs(x) * rng.choice([-1, 1])
    elif kind == "extreme":
        x = x * rng.choice([1e-38, 1e35, 1e-30])
    elif kind == "not finite" and x.size:
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return torch.from_numpy(oracle.f32(np.clip(x, -3e38, 3e38)) if kind != "not finite" else oracle.f32(x))


@pytest.mark.parametrize("dtype", FLOATS)
@sweep(60)
@given(
    batch=batches, sizes=st.tuples(*[st.integers(1, 7)] * 2), channels=st.sampled_from(SIZES), given_range=rarely, channel_stats=flags, seed=seeds,
    kind=st.sampled_from(["normal", "normal", "constant", "one sign", "extreme", "not finite"]),
    memory=st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded", "misaligned"]),
)  # fmt: skip
def test_quantize_image(dtype, batch, sizes, channels, given_range, channel_stats, seed, kind, memory):
    rng, (height, width) = np.random.default_rng(seed), sizes
    x = float_values(rng, (batch, channels, height, width), kind).to(FLOATS[dtype])
    if memory == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif memory == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif memory == "sliced":
        x = torch.cat([x, x, x], 3)[:, :, :, 1::2]
    elif memory == "expanded":
        x = x[:, :1, :, :1].expand(-1, channels, -1, 3)
    elif memory == "misaligned":
        x = misaligned(x)
    scale, zero_point = float(rng.choice([0.01, 1.0, 1e-30, np.nan, 0.0])), int(rng.choice([0, 255, 128, -5, 300]))
    tensors = (torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)) if given_range else ()
    actual = ops.quantize(x, 1, *tensors, channel_stats=channel_stats)
    values = np.ascontiguousarray(x.float().permute(0, 2, 3, 1).numpy())
    expected = oracle.quantize(values, *((scale, zero_point) if given_range else (None, None)), channel_stats)
    assert_same(from_image(actual), expected, f"quantize {dtype} {memory} {kind}")
    assert actual[0].is_contiguous(memory_format=torch.channels_last) or actual[0].numel() == 0


@sweep(60)
@given(
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=2), inner=st.lists(st.integers(1, 3), max_size=2), features=st.sampled_from(SIZES),
    dtype=st.sampled_from(list(FLOATS)), kind=st.sampled_from(["normal", "constant", "not finite"]), channel_stats=flags, empty=rarely, seed=seeds,
)  # fmt: skip
def test_quantize_rows(leading, inner, features, dtype, kind, channel_stats, empty, seed):
    if len(leading) == 1 and len(inner) == 2:
        inner = inner[:1]  # four dimensions with one scale per sample are an image
    leading = [0, *leading[1:]] if empty else leading
    x = float_values(np.random.default_rng(seed), (*leading, *inner, features), kind).to(FLOATS[dtype])
    actual = ops.quantize(x, len(leading), channel_stats=channel_stats)
    values = x.float().numpy().reshape(math.prod(leading), 1, math.prod(inner), features)
    expected = oracle.quantize(values, channel_stats=channel_stats)
    assert actual[0].shape == x.shape and list(actual[1].shape) == list(actual[2].shape) == leading == list(actual[3].shape[:-1])
    assert_same(from_rows(actual, expected), expected, f"quantize {list(x.shape)}")


def test_samples_without_values():
    q, scale, zero_point, stats = ops.quantize(torch.zeros(2, 3, 0, 4))
    assert q.shape == (2, 3, 0, 4) and stats.tolist() == [[0, 0, 0]] * 2
    assert scale.tolist() == [2.0**-60] * 2 and zero_point.tolist() == [0, 0]
    assert ops.dequantize(q, scale, zero_point).shape == (2, 3, 0, 4)
    assert ops.moments(q).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("dtype", FLOATS)
@sweep(50)
@given(batch=batches, positions=st.integers(1, 9), channels=st.sampled_from(SIZES), wild=flags, as_image=flags, shifted=flags, seed=seeds)
def test_dequantize(dtype, batch, positions, channels, wild, as_image, shifted, seed):
    x = cases.random_codes(np.random.default_rng(seed), (batch, 1, positions, channels), wild)
    tensors = image(x)[:3] if as_image else rows(x, [batch], [batch, positions, channels])[:3]
    tensors = [misaligned(t) for t in tensors] if shifted else tensors
    actual = ops.dequantize(*tensors, dtype=FLOATS[dtype])
    assert actual.dtype == FLOATS[dtype]
    actual = (actual.permute(0, 2, 3, 1) if as_image else actual).reshape(x.q.shape).contiguous()
    expected = oracle.dequantize(x)
    if dtype == "bfloat16":
        assert_same_array(actual.view(torch.uint16).numpy(), oracle.to_bfloat16_bits(expected), "dequantize to bfloat16")
    else:
        with np.errstate(over="ignore"):
            expected = expected.astype(dtype)
        bits = f"uint{8 * expected.itemsize}"
        same_nan = np.isnan(expected) & np.isnan(actual.numpy())
        assert_same_array(np.where(same_nan, 0, actual.numpy().view(bits)), np.where(same_nan, 0, expected.view(bits)), f"dequantize to {dtype}")


@sweep(60)
@given(batch=batches, positions=st.integers(1, 40), channels=st.sampled_from(SIZES), channel_stats=flags, as_image=flags, shifted=flags, seed=seeds)
def test_moments(batch, positions, channels, channel_stats, as_image, shifted, seed):
    x = cases.random_codes(np.random.default_rng(seed), (batch, positions, 1, channels))
    q = image(x)[0] if as_image else rows(x, [batch], [batch, positions, channels])[0]
    actual = ops.moments(misaligned(q) if shifted else q, 1, channel_stats)
    assert_same_array(actual.numpy(), oracle.moments(x.q, channel_stats), "moments")


def test_moments_of_large_samples_are_exact():
    q = torch.full((1, 3, 700, 701), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    n = 700 * 701
    assert ops.moments(q, 1, True).tolist() == [[3 * n * 255, 3 * n * 255**2, 0, *[n * 255] * 3, *[n * 255**2] * 3]]
    rest = torch.full((2, 5, 100_003), 254, dtype=torch.uint8)
    assert ops.moments(rest, 2)[1, 4].tolist() == [100_003 * 254, 100_003 * 254**2, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Linear


@st.composite
def linear_sizes(draw):
    """(rows, K, N) with a product that stays quick."""
    k = draw(st.sampled_from(SIZES))
    n = draw(st.sampled_from(SIZES))
    return draw(st.sampled_from([m for m in SIZES if m * k * n <= 300_000])), k, n


def split(count: int, rng) -> list[int]:
    """`count` as a product of two factors."""
    factor = int(rng.choice([d for d in range(1, count + 1) if count % d == 0]))
    return [factor, count // factor]


@pytest.mark.parametrize("strategy", STRATEGIES)
@sweep(70)
@given(
    sizes=linear_sizes(), layout=st.sampled_from(["tokens", "tokens of batches", "images", "four dimensions"]), activation=st.sampled_from(list(ACTIVATIONS)),
    residual=rarely, bias=flags, wild=rarely, channel_stats=flags, input_channel_stats=flags, gamma=st.integers(0, 3), shifted=rarely, empty=rarely, seed=seeds,
)  # fmt: skip
def test_linear(strategy, sizes, layout, activation, residual, bias, wild, channel_stats, input_channel_stats, gamma, shifted, empty, seed):
    rng, options = np.random.default_rng(seed), ACTIVATIONS[activation]
    m, k, n = sizes
    m = 0 if empty else m
    outer, inner = split(m, rng) if m else (0, 2)
    if layout == "tokens":
        leading, shape = [m], [m]
    elif layout == "tokens of batches":
        leading, shape = [outer, inner], [outer, inner]
    elif layout == "images":
        leading, shape = [outer], [outer, inner]
    else:
        leading, shape = [outer, 1], [outer, 1, inner]
    samples = math.prod(leading)
    per_sample = inner if layout in ("images", "four dimensions") else 1
    x = cases.random_codes(rng, (samples, 1, per_sample, k), wild, input_channel_stats or strategy == "channel")
    layer = cases.random_layer(rng, n, k, bias=bias)
    shortcut = cases.random_codes(rng, (samples, 1, per_sample, n), wild, channel_stats) if residual and "activation" not in options else None
    number = STRATEGIES[strategy]
    predictor = cases.random_predictor(rng, number, layer, cases.spread_of(x, layer), wild)
    tensors = [*rows(x, leading, [*shape, k]), packed(layer)]
    tensors = [misaligned(t) for t in tensors] if shifted else tensors
    rest = rows(shortcut, leading, [*shape, n]) if shortcut else ()
    actual = ops.linear(
        *tensors, n, *rest, **options, strategy=number, predictor=predictor_tensor(predictor), gamma=gamma, channel_stats=channel_stats
    )  # fmt: skip
    expected = oracle.layer(x, layer, shortcut, **options, strategy=number, predictor=predictor, gamma=gamma, channel_stats=channel_stats)
    assert list(actual[0].shape) == [*shape, n]
    actual = actual[0].numpy().reshape(expected.shape) if number == oracle.NONE else from_rows(actual, expected)
    assert_same(actual, expected, f"linear {strategy} {activation}")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("code, zero_point, weight", [(255, 0, 127), (255, 0, -127), (0, 255, 127), (255, 255, 127)])
def test_accumulators_at_the_bound(strategy, code, zero_point, weight):
    k, number = 65_999, STRATEGIES[strategy]
    q = np.full((2, 1, 1, k), code, dtype=np.uint8)
    x = Codes(q, oracle.f32([1e-3, 1e-4]), np.full(2, zero_point, dtype=np.int32), oracle.moments(q, strategy == "channel"))
    layer = Layer(np.full((3, 1, 1, k), weight, dtype=np.int8), oracle.f32([1e-3, 1e-5, 1e-6]), oracle.f32([0, 1, -1]), Geometry())
    predictor = cases.random_predictor(np.random.default_rng(0), number, layer, 1e4)
    options = {"strategy": number, "gamma": 1}
    actual = ops.linear(*rows(x, [2], [2, k]), packed(layer), 3, predictor=predictor_tensor(predictor), **options)
    expected = oracle.layer(x, layer, predictor=predictor, **options)
    actual = actual[0].numpy().reshape(expected.shape) if number == oracle.NONE else from_rows(actual, expected)
    assert_same(actual, expected, f"linear {strategy} of {k} weights")
    assert_same(run_conv2d(x, layer, predictor=predictor, **options), expected, f"conv2d {strategy} of {k} weights")


# ----------------------------------------------------------------------------------------------------------------------
# Convolution


@st.composite
def any_geometry(draw, groups=st.sampled_from([1, 1, 1, 2, 3]), largest_kernel=4):
    kernel = draw(st.tuples(*[st.integers(1, largest_kernel)] * 2))
    stride = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, 6])] * 2))  # up to beyond the kernel
    padding = draw(st.tuples(*[st.sampled_from([0, 0, 1, 2, 5])] * 4))  # up to beyond the kernel
    dilation = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 2))
    return Geometry(kernel, stride, padding, dilation, draw(groups))


geometries = any_geometry()


def fitting(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """The size, enlarged where the kernel would not fit."""
    padding = geometry.padding
    spans = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, geometry.kernel)]
    return max(height, spans[0] - padding[0] - padding[1]), max(width, spans[1] - padding[2] - padding[3])


def check_conv2d(strategy, geometry, batch, height, width, inputs, outputs, activation, residual, bias, wild, channel_stats, gamma, shifted, seed):
    rng, options, number = np.random.default_rng(seed), dict(ACTIVATIONS[activation]), STRATEGIES[strategy]
    height, width = fitting(geometry, height, width)
    x = cases.random_codes(rng, (batch, height, width, inputs * geometry.groups), wild, bool(rng.integers(2)) or strategy == "channel")
    layer = cases.random_layer(rng, outputs * geometry.groups, inputs, geometry, bias)
    shape = (batch, *geometry.out_size(height, width), outputs * geometry.groups)
    shortcut = cases.random_codes(rng, shape, wild) if residual and "activation" not in options else None
    predictor = cases.random_predictor(rng, number, layer, cases.spread_of(x, layer), wild)
    options.update(strategy=number, gamma=gamma, channel_stats=channel_stats)
    weight = misaligned(packed(layer)) if shifted else None
    actual = run_conv2d(x, layer, shortcut, predictor, weight, **options)
    expected = oracle.layer(x, layer, shortcut, predictor=predictor, **options)
    assert_same(actual, expected, f"conv2d {strategy} {activation} of {x.q.shape} to {shape}")


common = {
    "batch": batches, "height": st.integers(1, 9), "width": st.integers(1, 9), "activation": st.sampled_from(list(ACTIVATIONS)), "residual": rarely, "bias": flags,
    "wild": rarely, "channel_stats": flags, "gamma": st.integers(0, 4), "shifted": rarely, "seed": seeds,
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@sweep(80)
@given(geometry=geometries, inputs=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33]), outputs=st.sampled_from([1, 3, 8, 15, 16, 17, 33]), **common)
def test_conv2d(strategy, **arguments):
    check_conv2d(strategy, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@sweep(60)
@given(geometry=any_geometry(st.sampled_from(SIZES[:-3]), 5), inputs=st.just(1), outputs=st.sampled_from([1, 1, 1, 2, 3]), **common)
def test_depthwise(strategy, **arguments):
    check_conv2d(strategy, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@sweep(25)
@given(inputs=st.sampled_from(SIZES), outputs=st.sampled_from(SIZES), stride=st.sampled_from([1, 2]), **common)
def test_pointwise(strategy, stride, **arguments):
    check_conv2d(strategy, Geometry(stride=(stride, stride)), **arguments)


@pytest.mark.parametrize("kernel, height, width", [((7, 7), 15, 15), ((1, 9), 3, 20), ((11, 3), 12, 5), ((3, 3), 3, 3), ((5, 5), 1, 1)])
@pytest.mark.parametrize("strategy", ["dynamic", "gaussian", "gaussian_channel", "channel"])
def test_large_kernels_and_single_fields(strategy, kernel, height, width):
    for padding in ((0, 0, 0, 0), (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2), (0, 9, 8, 0)):
        geometry = Geometry(kernel, (2, 2), padding)
        if min(geometry.out_size(height, width)) > 0:
            for groups, inputs in ((1, 3), (4, 1)):
                arguments = (strategy, geometry._replace(groups=groups), 2, height, width, inputs, 6, "relu", False, True, False, False, 1, False, 7)
                check_conv2d(*arguments)


@pytest.mark.parametrize("height, width, stride", [(7, 9, 1), (8, 8, 1), (23, 40, 1), (64, 64, 1), (31, 129, 2)])
@pytest.mark.parametrize("activation", ["identity", "relu6", "silu", "sigmoid"])
def test_probe_of_many_positions(activation, height, width, stride):
    """A few segments, many, rows that end with a segment; more samples than the workspace holds at once."""
    for groups, inputs, outputs in ((1, 5, 24), (6, 1, 1)):
        geometry = Geometry((3, 3), (stride, stride), (1, 1, 1, 1), (1, 1), groups)
        for residual, wild in ((False, False), (True, True)):
            check_conv2d("probe", geometry, 3, height, width, inputs, outputs, activation, residual, True, wild, True, 0, False, 11)


def test_probed_rows():
    for rows in (0, 1, 63, 64, 65, 255, 256, 512, 513, 4096, 12544, 999_983):
        spans = _native.probe_rows(rows)
        assert np.concatenate([np.arange(*span) for span in spans]).tolist() == oracle.probed_rows(rows).tolist()
        probed = sum(end - begin for begin, end in spans)
        assert probed == rows if rows < 64 else max(32, rows / 16) <= probed < rows / 16 + 32
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:])) and spans[-1][1] <= rows
    columns = {begin % 64 for begin, _ in _native.probe_rows(64 * 64)}
    assert len(columns) > 12, "segments line up with the columns of an image"
    with pytest.raises(RuntimeError, match="probe_rows: rows -1, want >= 0"):
        _native.probe_rows(-1)


def test_values_far_beyond_int32_saturate():
    x = Codes(np.array([[[[0, 255, 7]]]], dtype=np.uint8), oracle.f32([1e18]), np.array([7], dtype=np.int32), np.zeros((1, 3), dtype=np.int64))
    layer = Layer(np.eye(3, dtype=np.int8).reshape(3, 1, 1, 3), oracle.f32([1, 1, 1]), None, Geometry())
    for scale, zero_point in ((1e-18, 128), (1e-18, 0), (1e-18, 255), (1e-37, 3)):  # the last makes t infinite
        predictor = oracle.f32([scale, zero_point])
        actual = run_conv2d(x, layer, predictor=predictor, strategy=1)
        assert_same(actual, oracle.layer(x, layer, strategy=1, predictor=predictor), "t beyond int32")
        assert actual.q.ravel().tolist()[:2] == [0, 255]


@pytest.mark.parametrize("strategy", ["gaussian", "gaussian_channel", "channel"])
@sweep(80)
@given(geometry=geometries, gamma=st.integers(0, 4), residual=flags, wild=rarely, depthwise=rarely, batch=batches, seed=seeds)
def test_surrogate_law(strategy, geometry, gamma, residual, wild, depthwise, batch, seed):
    rng, number = np.random.default_rng(seed), STRATEGIES[strategy]
    inputs, outputs = (1, 2) if depthwise else (3, 5)
    height, width = fitting(geometry, *(int(v) for v in rng.integers(1, 12, 2)))
    x = cases.random_codes(rng, (batch, height, width, inputs * geometry.groups), wild, bool(rng.integers(2)) or strategy == "channel")
    layer = cases.random_layer(rng, outputs * geometry.groups, inputs, geometry)
    shortcut = cases.random_codes(rng, (batch, *geometry.out_size(height, width), outputs * geometry.groups), wild) if residual else None
    predictor = cases.random_predictor(rng, number, layer, 1.0, wild)
    arguments = (*image(x), len(layer.weight), *cases.geometry_arguments(geometry), geometry.groups, *(image(shortcut) if residual else ()))
    actual = ops.surrogate_law(*arguments, strategy=number, predictor=predictor_tensor(predictor), gamma=gamma)
    assert_same_array(actual.numpy(), oracle.surrogate_law(x, layer, shortcut, number, predictor, gamma), f"surrogate_law {strategy} gamma {gamma}")


@pytest.mark.parametrize("count, code, odd_ones, zero_point", [(3607, 94, 2, 238), (4744, 241, 1, 209), (859, 193, 1, 145), (3883, 166, 3, 211)])
def test_laws_from_stats_divide_exact_sums(count, code, odd_ones, zero_point):
    """gamma 0: where nearly all codes are equal, the variance is a small difference, and a sum that was rounded shows."""
    layer = Layer(np.ones((1, 1, 1, 1), dtype=np.int8), oracle.f32([1]), None, Geometry())
    predictor = oracle.f32([1, 1, 0, 1, 0, 0, 0])
    q = np.full((1, count, 1, 1), code, dtype=np.uint8)
    q[0, :odd_ones] += 1
    x = Codes(q, oracle.f32([1]), np.array([zero_point], dtype=np.int32), oracle.moments(q))
    law = ops.surrogate_law(*image(x), 1, [1], [1], [0], [1], 1, strategy=3, predictor=torch.from_numpy(predictor), gamma=0)
    assert_same_array(law.numpy(), oracle.surrogate_law(x, layer, None, 3, predictor, 0), "surrogate_law, gamma 0")


# ----------------------------------------------------------------------------------------------------------------------
# Ops without weights


def range_predictor(rng, strategy: str, spread: float, wild: bool, gaussian: int = 0):
    if strategy == "fixed":
        return cases.random_predictor(rng, oracle.FIXED, None, spread, wild)
    if strategy == "gaussian" and gaussian:
        predictor = oracle.f32([rng.uniform(0.5, 8), rng.uniform(0.5, 8), rng.uniform(-1, 1)])
        if wild and rng.random() < 0.3:
            predictor[rng.integers(3)] = rng.choice([np.nan, np.inf, 1e38])
        return predictor
    return None


plain = {
    "batch": batches, "height": st.integers(1, 8), "width": st.integers(1, 8), "channels": st.sampled_from(SIZES[:-3]), "wild": rarely, "channel_stats": flags,
    "seed": seeds,
}  # fmt: skip


@pytest.mark.parametrize("strategy", RANGES)
@sweep(80)
@given(bounds=st.sampled_from(BOUNDS), as_rows=rarely, shifted=rarely, **plain)
def test_add(strategy, bounds, as_rows, shifted, batch, height, width, channels, wild, channel_stats, seed):
    rng, options = np.random.default_rng(seed), ACTIVATIONS[bounds]
    a, b = (cases.random_codes(rng, (batch, height, width, channels), wild, channel_stats) for _ in range(2))
    predictor = range_predictor(rng, strategy, 300.0, wild, gaussian=3)
    options = {**options, "strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    convert = (lambda x: rows(x, [batch], [batch, height * width, channels])) if as_rows else image
    tensors = [*convert(a), *convert(b)]
    actual = ops.add(*([misaligned(t) for t in tensors] if shifted else tensors), predictor=predictor_tensor(predictor), **options)
    expected = oracle.add(a, b, predictor=predictor, **options)
    assert_same(from_rows(actual, expected) if as_rows else from_image(actual), expected, f"add {strategy} {bounds}")


@pytest.mark.parametrize("strategy", RANGES)
@sweep(80)
@given(second=st.sampled_from(["same shape", "per channel", "itself"]), as_rows=rarely, shifted=rarely, **plain)
def test_mul(strategy, second, as_rows, shifted, batch, height, width, channels, wild, channel_stats, seed):
    rng = np.random.default_rng(seed)
    a = cases.random_codes(rng, (batch, height, width, channels), wild, channel_stats)
    per_channel = second == "per channel" and not as_rows
    b = a if second == "itself" else cases.random_codes(rng, (batch, 1, 1, channels) if per_channel else a.q.shape, wild, channel_stats)
    predictor = range_predictor(rng, strategy, 3e4, wild, gaussian=3)
    predictor = predictor if strategy == "fixed" or predictor is None else predictor[:2]
    convert = (lambda x: rows(x, [batch], [batch, height * width, channels])) if as_rows else image
    tensors, options = [*convert(a), *convert(b)], {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    actual = ops.mul(*([misaligned(t) for t in tensors] if shifted else tensors), predictor=predictor_tensor(predictor), **options)
    expected = oracle.mul(a, b, predictor=predictor, **options)
    assert_same(from_rows(actual, expected) if as_rows else from_image(actual), expected, f"mul {strategy} {second}")


@pytest.mark.parametrize("strategy", RANGES)
@sweep(80)
@given(activation=st.sampled_from(list(ACTIVATIONS)), as_rows=rarely, **plain)
def test_activation(strategy, activation, as_rows, batch, height, width, channels, wild, channel_stats, seed):
    rng = np.random.default_rng(seed)
    x = cases.random_codes(rng, (batch, height, width, channels), wild)
    predictor = range_predictor(rng, strategy, 100.0, wild)
    options = {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    kind = dict(ACTIVATIONS[activation])
    arguments = (kind.pop("activation", 0), kind.get("activation_min"), kind.get("activation_max"))
    tensors = rows(x, [batch], [batch, height * width, channels]) if as_rows else image(x)
    actual = ops.activation(*tensors[:3], *arguments, predictor=predictor_tensor(predictor), **options)
    expected = oracle.activation(x, *arguments, predictor=predictor, **options)
    assert_same(from_rows(actual, expected) if as_rows else from_image(actual), expected, f"activation {strategy} {activation}")


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_activation_of_every_code_and_zero_point(kind):
    q = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (768, 1, 16, 16)).copy()
    zero_point = np.tile(np.arange(256, dtype=np.int32), 3)
    x = Codes(q, np.repeat(oracle.f32([0.003, 0.05, 1.7]), 256), zero_point, oracle.moments(q))
    actual = ops.activation(*image(x)[:3], kind)
    assert_same(from_image(actual), oracle.activation(x, kind), f"activation {kind}")


@pytest.mark.parametrize("strategy", RANGES)
@sweep(80)
@given(more=st.lists(st.sampled_from([1, 2, 3, 16, 33]), max_size=3), equal=rarely, as_rows=rarely, **plain)
def test_concat(strategy, more, equal, as_rows, batch, height, width, channels, wild, channel_stats, seed):
    rng = np.random.default_rng(seed)
    xs = [cases.random_codes(rng, (batch, height, width, c), wild) for c in (channels, *more)]
    if equal:
        xs = [x._replace(scale=xs[0].scale, zero_point=xs[0].zero_point) for x in xs]
    predictor = range_predictor(rng, strategy, 100.0, wild)
    options = {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    tensors = [rows(x, [batch], [batch, height * width, x.q.shape[-1]]) if as_rows else image(x) for x in xs]
    actual = ops.concat(*([t[part] for t in tensors] for part in range(3)), predictor=predictor_tensor(predictor), **options)
    expected = oracle.concat(xs, predictor=predictor, **options)
    assert_same(from_rows(actual, expected) if as_rows else from_image(actual), expected, f"concat {strategy} of {len(xs)}")
    if equal and strategy != "fixed":
        ok = oracle.valid_scale(xs[0].scale) & (xs[0].scale < 1e36)  # else x itself overflows
        assert (expected.q[ok] == np.concatenate([x.q[ok] for x in xs], -1)).all()


@st.composite
def windows(draw, dilated: bool):
    """A pooling geometry: every padding is smaller than the window."""
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)) if dilated else (1, 1)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    padding = [draw(st.integers(0, span - 1)) for span in (spans[0], spans[0], spans[1], spans[1])]
    return Geometry(kernel, draw(st.tuples(*[st.sampled_from([1, 2, 3, 7])] * 2)), tuple(padding), dilation)


@sweep(150)
@given(geometry=windows(True), **plain)
def test_max_pool2d(geometry, batch, height, width, channels, wild, channel_stats, seed):
    height, width = fitting(geometry, height, width)
    x = cases.random_codes(np.random.default_rng(seed), (batch, height, width, channels), wild)
    actual = ops.max_pool2d(*image(x)[:3], *cases.geometry_arguments(geometry), channel_stats)
    assert_same(from_image(actual), oracle.max_pool2d(x, geometry, channel_stats), f"max_pool2d {geometry}")


@pytest.mark.parametrize("strategy", RANGES)
@sweep(70)
@given(geometry=windows(False), count_include_pad=flags, **plain)
def test_avg_pool2d(strategy, geometry, count_include_pad, batch, height, width, channels, wild, channel_stats, seed):
    rng, (height, width) = np.random.default_rng(seed), fitting(geometry, height, width)
    x = cases.random_codes(rng, (batch, height, width, channels), wild)
    predictor = range_predictor(rng, strategy, 60.0, wild)
    options = {"count_include_pad": count_include_pad, "strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    actual = ops.avg_pool2d(*image(x)[:3], *cases.geometry_arguments(geometry)[:3], predictor=predictor_tensor(predictor), **options)
    assert_same(from_image(actual), oracle.avg_pool2d(x, geometry, predictor=predictor, **options), f"avg_pool2d {strategy} {geometry}")


@sweep(40)
@given(geometry=windows(False), count_include_pad=flags, seed=seeds)
def test_averages_divide_as_torch_does(geometry, count_include_pad, seed):
    """torch pads symmetrically by at most half the window."""
    rng = np.random.default_rng(seed)
    padding = [min(geometry.padding[0], geometry.kernel[0] // 2), min(geometry.padding[2], geometry.kernel[1] // 2)]
    geometry = geometry._replace(padding=(padding[0], padding[0], padding[1], padding[1]))
    x = cases.random_codes(rng, (2, *fitting(geometry, 6, 7), 3))
    wanted = torch.nn.functional.avg_pool2d(torch.from_numpy(oracle.dequantize(x)).permute(0, 3, 1, 2).double(), geometry.kernel, geometry.stride, padding, False, count_include_pad)  # fmt: skip
    q, scale, zero_point, _ = ops.avg_pool2d(*image(x)[:3], list(geometry.kernel), list(geometry.stride), padding, count_include_pad)
    error = (ops.dequantize(q, scale, zero_point).double() - wanted).abs().amax((1, 2, 3))
    assert bool((error <= 0.501 * scale).all())


@pytest.mark.parametrize("strategy", RANGES)
@sweep(70)
@given(size=st.tuples(*[st.integers(1, 9)] * 2), **plain)
def test_adaptive_avg_pool2d(strategy, size, batch, height, width, channels, wild, channel_stats, seed):
    rng = np.random.default_rng(seed)
    x = cases.random_codes(rng, (batch, height, width, channels), wild)
    predictor = range_predictor(rng, strategy, 60.0, wild)
    options = {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    actual = ops.adaptive_avg_pool2d(*image(x)[:3], list(size), predictor=predictor_tensor(predictor), **options)
    assert_same(from_image(actual), oracle.adaptive_avg_pool2d(x, size, predictor=predictor, **options), f"adaptive_avg_pool2d {strategy} to {size}")


@sweep(80)
@given(factor=st.tuples(*[st.integers(1, 5)] * 2), **plain)
def test_upsample_nearest2d(factor, batch, height, width, channels, wild, channel_stats, seed):
    x = cases.random_codes(np.random.default_rng(seed), (batch, height, width, channels), wild)
    actual = ops.upsample_nearest2d(*image(x)[:3], list(factor), channel_stats)
    assert_same(from_image(actual), oracle.upsample_nearest2d(x, factor, channel_stats), f"upsample_nearest2d by {factor}")


# ----------------------------------------------------------------------------------------------------------------------
# Transformers


def tokens(rng, count, channels, wild=False, channel_stats=False) -> Codes:
    """Codes [count, channels] with a scale per row."""
    x = cases.random_codes(rng, (count, 1, 1, channels), wild, channel_stats)
    return x._replace(q=x.q.reshape(count, channels))


@pytest.mark.parametrize("strategy", ["none", *RANGES])
@sweep(100)
@given(
    count=st.sampled_from([1, 2, 7, 0]), channels=st.sampled_from([*SIZES, 200]), from_codes=flags, residual=flags, affine=flags, keep_sum=flags,
    eps=st.sampled_from([1e-5, 1e-6, 0.5]), wild=rarely, channel_stats=flags, shifted=rarely, seed=seeds,
)  # fmt: skip
def test_layer_norm(strategy, count, channels, from_codes, residual, affine, keep_sum, eps, wild, channel_stats, shifted, seed):
    rng = np.random.default_rng(seed)
    x = tokens(rng, count, channels, wild) if from_codes else oracle.f32(rng.normal(rng.normal(), 2.0 ** rng.uniform(-8, 8), (count, channels)))
    if wild and not from_codes and count:
        x[0, rng.integers(channels)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 0.0])
    added = oracle.f32(rng.normal(0, 3, (count, channels))) if residual else None
    weight, bias = (oracle.f32(rng.normal(1, 0.5, channels)) if affine else None for _ in range(2))
    predictor = range_predictor(rng, strategy, 4.0, wild)
    options = {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    expected, total = oracle.layer_norm(x, added, weight, bias, eps, predictor=predictor, **options)
    inputs = [torch.from_numpy(part) for part in x[:3]] if from_codes else [torch.from_numpy(x), None, None]
    inputs += [None if part is None else torch.from_numpy(part) for part in (added, weight, bias)]
    if shifted:
        inputs = [None if part is None else misaligned(part) for part in inputs]
    *outputs, kept = ops.layer_norm(*inputs, eps, keep_sum, predictor=predictor_tensor(predictor), **options)
    assert_same(outputs[0].numpy() if strategy == "none" else Codes(*(part.numpy() for part in outputs)), expected, f"layer_norm {strategy}")
    assert_same(kept.numpy(), total if keep_sum else np.zeros(0, dtype=np.float32), "its sum")


def attend(query, key, value, batch, heads, scale, **options) -> Codes:
    """torch.ops.probquant.attention on rows of tokens."""
    tensors = [torch.from_numpy(part).reshape(batch, -1, *part.shape[1:]) for x in (query, key, value) for part in x[:3]]
    outputs = ops.attention(*tensors, heads, scale, **options)
    return Codes(*(part.flatten(0, 1).numpy() for part in outputs))


@pytest.mark.parametrize("strategy", RANGES)
@sweep(100)
@given(
    batch=st.sampled_from([1, 1, 2, 0]), queries=st.sampled_from([1, 2, 5, 6, 7, 23, 24, 25, 50, 0]), keys=st.sampled_from([*range(1, 10), *SIZES, 197]),
    heads=st.sampled_from([1, 2, 3]), dim=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64]), sharpness=st.floats(0.01, 30), wild=rarely,
    channel_stats=flags, seed=seeds,
)  # fmt: skip
def test_attention(strategy, batch, queries, keys, heads, dim, sharpness, wild, channel_stats, seed):
    rng = np.random.default_rng(seed)
    query, key, value = (tokens(rng, batch * count, heads * dim, wild) for count in (queries, keys, keys))
    typical = [float(np.median(x.scale)) if len(x.scale) else 1.0 for x in (query, key)]
    scale = abs(sharpness / (6000 * dim**0.5 * typical[0] * typical[1])) if np.isfinite(typical).all() else 0.1
    scale = float(np.float32(np.clip(scale, 1e-30, 1e30)))
    predictor = range_predictor(rng, strategy, 100.0, wild)
    options = {"strategy": STRATEGIES[strategy], "channel_stats": channel_stats}
    expected = oracle.attention(query, key, value, batch, heads, scale, predictor=predictor, **options) if batch * queries else None
    if expected is None:  # nothing to compute: shapes only
        sizes = [batch, queries, heads * dim], [batch, keys, heads * dim]
        empty = [(torch.zeros(s, dtype=torch.uint8), torch.ones(s[:2]), torch.zeros(s[:2], dtype=torch.int32)) for s in (sizes[0], sizes[1], sizes[1])]
        outputs = ops.attention(*empty[0], *empty[1], *empty[2], heads, scale, predictor=predictor_tensor(predictor), **options)
        assert list(outputs[0].shape) == sizes[0] and outputs[1].shape == (batch, queries)
        return
    actual = attend(query, key, value, batch, heads, scale, predictor=predictor_tensor(predictor), **options)
    assert_same(actual, expected, f"attention {strategy}")


@pytest.mark.parametrize("code, zero_point", [(255, 0), (0, 255)])
@pytest.mark.parametrize("keys, dim", [(33000, 2), (3, 33000)])
def test_attention_sums_at_the_bound(keys, dim, code, zero_point):
    def extreme(count):
        return Codes(np.full((count, dim), code, dtype=np.uint8), oracle.f32([0.01] * count), np.full(count, zero_point, dtype=np.int32), None)

    args = extreme(2), extreme(keys), extreme(keys), 1, 1, 1e-6
    assert_same(attend(*args), oracle.attention(*args), "attention at the bound")


def test_attention_is_close_to_torchs():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 50, 96, generator=generator) for _ in range(3))
    heads = [x.reshape(2, 50, 3, 32).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 50, 96)
    codes = [part for x in (query, key, value) for part in ops.quantize(x, 2)[:3]]
    error = ops.dequantize(*ops.attention(*codes, 3, 32**-0.5)[:3]) - expected
    assert float(error.pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# What never matters: the other samples of a batch, the threads; what always travels: NaN


def every_op(x: Codes, other: Codes, layer: Layer, depthwise: Layer):
    """(name, outputs) of every op in every strategy; x and other [N, H, W, C], layers keep that shape."""
    rng = np.random.default_rng(5)
    n, height, width, channels = x.q.shape
    fixed = torch.tensor([0.5, 100.0])
    yield "dequantize", [ops.dequantize(*image(x)[:3])]
    yield "moments", [ops.moments(image(x)[0], 1, True)]
    for strategy, number in STRATEGIES.items():
        for weights, kind in ((layer, "conv2d"), (depthwise, "depthwise")):
            predictor = predictor_tensor(cases.random_predictor(rng, number, weights, 100.0))
            for residual in (False, True):
                arguments = (*image(x), packed(weights), len(weights.weight), *cases.geometry_arguments(weights.geometry), weights.geometry.groups)
                rest = image(other) if residual else ()
                yield f"{kind} {strategy}", list(ops.conv2d(*arguments, *rest, strategy=number, predictor=predictor, gamma=2, channel_stats=True))
        token_rows = rows(x, [n], [n, height * width, channels])
        flat = layer._replace(weight=np.ascontiguousarray(layer.weight[:, :1, :1]), geometry=Geometry())
        predictor = predictor_tensor(cases.random_predictor(rng, number, flat, 100.0))
        yield f"linear {strategy}", list(ops.linear(*token_rows, packed(flat), channels, strategy=number, predictor=predictor, activation=1, gamma=1))
    flat, added = rows(x, [n], [n, height * width * channels])[:3], torch.from_numpy(oracle.dequantize(other)).flatten(1)
    token = [part.unsqueeze(1) for part in flat]
    for number in (0, 1, 2, 3):  # a sample is a token
        *outputs, total = ops.layer_norm(*flat, added, None, None, 1e-5, True, strategy=number, predictor=fixed if number == 1 else None)
        yield f"layer_norm {number}", outputs
        yield f"sum of layer_norm {number}", [total]
        if number:
            outputs = ops.attention(*token, *token, *token, height, 0.01, strategy=number, predictor=fixed if number == 1 else None)
            yield f"attention {number}", [part.flatten(0, 1) for part in outputs]
    for number in (1, 2, 3):
        given_range = fixed if number == 1 else None
        widths = fixed if number == 1 else torch.tensor([3.0, 3.0, 0.5]) if number == 3 else None
        yield f"add {number}", list(ops.add(*image(x), *image(other), strategy=number, predictor=widths))
        gate, factors = ops.adaptive_avg_pool2d(*image(other)[:3], [1]), torch.tensor([3.0, 2.0]) if number == 3 else widths
        yield f"mul {number}", list(ops.mul(*image(x), *image(other), strategy=number, predictor=factors))
        yield f"mul {number} per channel", list(ops.mul(*image(x), *gate, strategy=number, predictor=factors))
        yield f"activation {number}", list(ops.activation(*image(x)[:3], 2, strategy=number, predictor=given_range))
        pairs = [list(pair) for pair in zip(image(x)[:3], image(other)[:3])]
        yield f"concat {number}", list(ops.concat(*pairs, strategy=number, predictor=given_range, channel_stats=True))
        yield f"avg_pool2d {number}", list(ops.avg_pool2d(*image(x)[:3], [3], [2], [1], strategy=number, predictor=given_range))
        yield f"adaptive_avg_pool2d {number}", list(ops.adaptive_avg_pool2d(*image(x)[:3], [3], strategy=number, predictor=given_range))
    yield "upsample_nearest2d", list(ops.upsample_nearest2d(*image(x)[:3], [2, 3], True))
    yield "max_pool2d", list(ops.max_pool2d(*image(x)[:3], [3], [2], [1], [1]))


def op_inputs(n, size, channels, seed=3):
    rng = np.random.default_rng(seed)
    x, other = (cases.random_codes(rng, (n, size, size, channels), channel_stats=True) for _ in range(2))
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    return x, other, cases.random_layer(rng, channels, channels, geometry), cases.random_layer(rng, channels, 1, geometry._replace(groups=channels))


def take(x: Codes, samples) -> Codes:
    return Codes(*(part[samples] for part in x))


def same_tensors(name, actual, expected):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride(), name
        assert_same_array(a.contiguous().numpy(), b.contiguous().numpy(), f"{name}: output {i}")


@pytest.mark.parametrize("channels, size", [(5, 6), (32, 9)])
def test_a_sample_is_the_same_alone_and_in_any_batch(channels, size):
    x, other, *layers = op_inputs(5, size, channels)
    whole = list(every_op(x, other, *layers))
    for samples in ([0], [4], [3, 1], [2, 2, 0]):
        for (name, outputs), (_, part) in zip(whole, every_op(take(x, samples), take(other, samples), *layers), strict=True):
            for i, (a, b) in enumerate(zip(outputs, part, strict=True)):
                if a.numel():  # not the empty tensors of strategy none
                    assert_same_array(b.contiguous().numpy(), a[samples].contiguous().numpy(), f"{name}: output {i} of samples {samples}")


@pytest.mark.parametrize("n, size, channels", [(1, 40, 24), (3, 23, 33), (2, 64, 7)])
def test_one_and_two_threads_agree(n, size, channels):
    inputs = op_inputs(n, size, channels)
    alone = list(every_op(*inputs))
    large = torch.randn(n, channels, size, 3 * size, generator=torch.Generator().manual_seed(0))
    codes = ops.quantize(large, channel_stats=True)
    torch.set_num_threads(2)
    try:
        assert torch.get_num_threads() == 2
        for (name, outputs), (_, expected) in zip(every_op(*inputs), alone, strict=True):
            same_tensors(f"{name} on two threads", outputs, expected)
        same_tensors("quantize on two threads", ops.quantize(large, channel_stats=True), codes)
    finally:
        torch.set_num_threads(1)


def test_rows_on_two_threads():
    """Few rows: the output channels are split."""
    rng = np.random.default_rng(0)
    x, layer = cases.random_codes(rng, (3, 1, 1, 300), channel_stats=True), cases.random_layer(rng, 500, 300)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for strategy, number in STRATEGIES.items():
            predictor = predictor_tensor(cases.random_predictor(np.random.default_rng(1), number, layer, 100.0))
            results.append((strategy, ops.linear(*rows(x, [3], [3, 300]), packed(layer), 500, strategy=number, predictor=predictor)))
    torch.set_num_threads(1)
    half = len(results) // 2
    for (name, alone), (_, both) in zip(results[:half], results[half:], strict=True):
        same_tensors(name, both, alone)


@pytest.mark.parametrize("bad", cases.BAD_SCALES)
def test_an_invalid_sample_travels_on_and_stays_alone(bad):
    x, other, *layers = op_inputs(3, 7, 6)
    broken = x._replace(scale=np.array([x.scale[0], bad, x.scale[2]], dtype=np.float32))
    for (name, good), (_, outputs) in zip(every_op(x, other, *layers), every_op(broken, other, *layers), strict=True):
        if name == "moments":
            continue  # of codes: no scale is involved
        for a, b in zip(good, outputs, strict=True):
            if a.numel():
                assert_same_array(b[[0, 2]].contiguous().numpy(), a[[0, 2]].contiguous().numpy(), f"{name}: the other samples")
        if outputs[0].dtype == torch.float32:
            assert bool(outputs[0][1].isnan().all()), f"{name}: float output {outputs[0][1].flatten()[:4].tolist()}, want NaN"
            continue
        q, scale, zero_point, stats = (part[1] for part in outputs)
        assert bool(scale.isnan()) and int(zero_point) == 0, f"{name}: scale {float(scale)}, zero point {int(zero_point)}"
        assert not bool(q.any()), f"{name}: codes {q.flatten()[:4].tolist()}, want 0"
        assert stats[2] == -1 and not bool(stats[[0, 1]].any()) and not bool(stats[3:].any()), f"{name}: stats {stats.tolist()}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_input_makes_one_sample_invalid(value):
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    codes = ops.quantize(x)
    broken = x.clone()
    broken[1, 2, 3, 4] = value
    q, scale, zero_point, stats = ops.quantize(broken)
    assert bool(scale[1].isnan()) and int(zero_point[1]) == 0 and stats[1].tolist() == [0, 0, -1] and not bool(q[1].any())
    same_tensors("the other samples", [part[[0, 2]] for part in (q, scale, zero_point, stats)], [part[[0, 2]] for part in codes])
    assert bool(ops.dequantize(q, scale, zero_point)[1].isnan().all())


def test_batch_of_zero():
    """Every op in every strategy; the codes as one gets them: from quantize, or from numpy."""
    x, other, *layers = op_inputs(0, 6, 4)
    for name, outputs in every_op(x, other, *layers):
        assert outputs[0].shape[0] == 0, name
    q, scale, zero_point, stats = ops.quantize(torch.zeros(0, 4, 6, 6))
    assert q.shape == (0, 4, 6, 6) and scale.shape == zero_point.shape == (0,) and stats.shape == (0, 3)
    from_numpy = torch.from_numpy(np.zeros((0, 6, 6, 4), dtype=np.uint8)).permute(0, 3, 1, 2)  # its strides are all 0
    assert ops.max_pool2d(from_numpy, scale, zero_point, [2], [2], [0], [1])[0].shape == (0, 4, 3, 3)
