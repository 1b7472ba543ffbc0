"""The ops on CUDA tensors: every byte as on the CPU, on torch's current stream, in a CUDA graph. Where there is no GPU these
tests are skipped; tests/cuda_on_cpu runs the same kernels without one."""

import pytest
import torch

import probquant
from probquant import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU, or a torch without CUDA"),
    pytest.mark.skipif(not probquant.build_info()["cuda"], reason="this probquant was built without CUDA kernels"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMAGES = [(1, 1, 1, 1), (2, 3, 7, 5), (0, 3, 4, 4), (3, 64, 14, 14), (2, 257, 5, 3), (1, 3, 224, 224), (2, 0, 3, 3), (64, 3, 32, 32)]
ROWS = [(1, 1), (7, 96), (5, 1000), (2, 3, 257), (4, 197, 768), (0, 8)]


def bits(tensor):
    """Bytes, so that NaN equals NaN of the same payload."""
    return tensor.cpu().contiguous().view(torch.uint8) if tensor.numel() else tensor.cpu()


def assert_same_bytes(on_cpu, on_cuda):
    on_cpu, on_cuda = [x if isinstance(x, tuple) else (x,) for x in (on_cpu, on_cuda)]
    for wanted, got in zip(on_cpu, on_cuda, strict=True):
        assert got.is_cuda
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert torch.equal(bits(wanted), bits(got))


def noise(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("channel_stats", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
def test_quantize_images(shape, dtype, channels_last, channel_stats):
    x = noise(shape, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_same_bytes(ops.quantize(x, 1, None, None, channel_stats), ops.quantize(x.cuda(), 1, None, None, channel_stats))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_a_crop(dtype):
    x = noise((3, 5, 40, 30), dtype)
    assert_same_bytes(ops.quantize(x[:, 1:4, 3:37:2, 5:]), ops.quantize(x.cuda()[:, 1:4, 3:37:2, 5:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_quantize_rows(shape, dtype):
    for sample_dims in range(1, len(shape)):
        x = noise(shape, dtype)
        assert_same_bytes(ops.quantize(x, sample_dims), ops.quantize(x.cuda(), sample_dims))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, zero_point", [(0.01, 100), (1e-4, 0), (float("nan"), 3), (0.0, 3), (-1.0, 3), (float("inf"), 3), (0.02, 999)])
def test_quantize_with_given_parameters(scale, zero_point, dtype):
    x = noise((3, 5, 9, 7), dtype)
    parameters = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    on_cuda = [p.cuda() for p in parameters]
    assert_same_bytes(ops.quantize(x, 1, *parameters, True), ops.quantize(x.cuda(), 1, *on_cuda, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 1e-40, 6e4])
def test_quantize_special_values(value, dtype):
    x = noise((4, 3, 33, 31), dtype)
    x[1, 2, 17, 30] = value
    x[2] = value
    assert_same_bytes(ops.quantize(x, 1, None, None, True), ops.quantize(x.cuda(), 1, None, None, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_every_code(dtype):
    scale = torch.tensor([0.01, 3e36, 1e-38, float("nan"), 0.0, -1.0, float("inf"), 7.7e-6])
    zero_point = torch.tensor([128, 0, 255, 3, -7, 1000, 5, 77], dtype=torch.int32)
    q = torch.arange(256, dtype=torch.uint8).repeat(8, 3)
    assert_same_bytes(ops.dequantize(q, scale, zero_point, dtype), ops.dequantize(q.cuda(), scale.cuda(), zero_point.cuda(), dtype))


def test_float16_has_the_cpus_conversions():
    """Every float16, through quantize with a scale that tells neighbours apart, and back."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(256, 256)
    assert_same_bytes(ops.quantize(x), ops.quantize(x.cuda()))


@pytest.mark.parametrize("channel_stats", [False, True])
@pytest.mark.parametrize("shape", [s for s in IMAGES if s[1] > 0])
def test_moments(shape, channel_stats):
    q = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 256).to(torch.uint8).to(memory_format=torch.channels_last)
    assert_same_bytes(ops.moments(q, 1, channel_stats), ops.moments(q.cuda(), 1, channel_stats))


# ----------------------------------------------------------------------------------------------------------------------
# Layers

GEOMETRIES = [  # batch, height, width, in, out, kernel, stride, padding, dilation, groups
    (1, 224, 224, 3, 64, 7, 2, 3, 1, 1),
    (2, 56, 56, 64, 64, 3, 1, 1, 1, 1),
    (8, 28, 28, 128, 512, 1, 1, 0, 1, 1),
    (3, 7, 7, 512, 2048, 1, 1, 0, 1, 1),
    (1, 7, 7, 512, 512, 3, 1, 1, 1, 1),
    (4, 13, 9, 48, 33, 3, 2, 1, 2, 1),
    (2, 14, 14, 64, 128, 3, 1, 1, 1, 4),
    (2, 56, 56, 144, 144, 3, 1, 1, 1, 144),
    (3, 11, 7, 5, 10, 5, 2, 2, 1, 5),
]
STRATEGIES = ["NONE", "FIXED", "DYNAMIC", "GAUSSIAN", "GAUSSIAN_CHANNEL", "PROBE", "CHANNEL"]


def random_codes(rng, shape):
    q = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale = torch.rand(shape[0], generator=rng) * 0.1 + 0.01
    return (q, scale, torch.randint(0, 256, shape[:1], generator=rng, dtype=torch.int32), ops.moments(q, 1, True))


def predictor_of(strategy, rng, inputs, outputs, groups, taps):
    per_output = strategy == "GAUSSIAN_CHANNEL" or (strategy == "CHANNEL" and 1 < groups == inputs)
    laws = {"FIXED": 2, "PROBE": 2, "GAUSSIAN": 7, "CHANNEL": 7 + 2 * inputs}
    values = 3 + 3 * outputs if per_output else laws.get(strategy)
    return None if values is None else torch.rand(values, generator=rng) / taps + 0.01


def on_cuda(arguments):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv2d(geometry, strategy):
    batch, height, width, inputs, outputs, kernel, stride, padding, dilation, groups = geometry
    rng = torch.Generator().manual_seed(sum(geometry))
    x = random_codes(rng, (batch, inputs, height, width))
    weight = torch.randint(-127, 128, (outputs, kernel, kernel, inputs // groups), generator=rng, dtype=torch.int8)
    constants = (weight, torch.rand(outputs, generator=rng) * 1e-3, torch.randn(outputs, generator=rng), groups)
    sizes = (outputs, [kernel, kernel], [stride, stride], [padding, padding], [dilation, dilation], groups)
    extent = [(size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in (height, width)]
    residual = random_codes(rng, (batch, outputs, *extent))
    predictor = predictor_of(strategy, rng, inputs, outputs, groups, kernel * kernel * inputs // groups)
    for activation, bounds, shortcut in ((0, (0.0, 6.0), residual), (2, (None, None), [None] * 4)):
        arguments = (*shortcut, activation, *bounds, int(probquant.Strategy[strategy]), predictor, 2, True)
        wanted = ops.conv2d(*x, ops.pack_weight(*constants), *sizes, *arguments)
        got = ops.conv2d(*on_cuda(x), ops.pack_weight(*on_cuda(constants)), *sizes, *on_cuda(arguments))
        assert_same_bytes(wanted, got)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape, outputs", [((1, 2048), 1000), ((4, 197, 768), 3072), ((197, 768), 2304), ((3, 5, 33), 17)])
def test_linear(shape, outputs, strategy):
    rng = torch.Generator().manual_seed(outputs)
    q = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    x = (q, torch.rand(shape[0], generator=rng) * 0.1, torch.randint(0, 256, shape[:1], generator=rng, dtype=torch.int32), ops.moments(q, 1, True))
    constants = (torch.randint(-127, 128, (outputs, shape[-1]), generator=rng, dtype=torch.int8), torch.rand(outputs, generator=rng) * 1e-3)
    predictor = predictor_of(strategy, rng, shape[-1], outputs, 1, shape[-1])
    arguments = (*[None] * 4, 2, None, None, int(probquant.Strategy[strategy]), predictor, 1, False)
    wanted = ops.linear(*x, ops.pack_weight(*constants), outputs, *arguments)
    assert_same_bytes(wanted, ops.linear(*on_cuda(x), ops.pack_weight(*on_cuda(constants)), outputs, *on_cuda(arguments)))


@pytest.mark.parametrize("strategy", ["FIXED", "DYNAMIC", "GAUSSIAN"])
@pytest.mark.parametrize("shape", [(2, 64, 112, 112), (3, 17, 9, 7)])
def test_pools(shape, strategy):
    rng = torch.Generator().manual_seed(3)
    x = random_codes(rng, shape)[:3]
    range_ = int(probquant.Strategy[strategy]), torch.tensor([0.02, 100.0]) if strategy == "FIXED" else None, True
    assert_same_bytes(ops.max_pool2d(*x, [3], [2], [1], [1], True), ops.max_pool2d(*on_cuda(x), [3], [2], [1], [1], True))
    assert_same_bytes(ops.avg_pool2d(*x, [3], [2], [1], False, *range_), ops.avg_pool2d(*on_cuda(x), [3], [2], [1], False, *on_cuda(range_)))
    assert_same_bytes(ops.adaptive_avg_pool2d(*x, [1], *range_), ops.adaptive_avg_pool2d(*on_cuda(x), [1], *on_cuda(range_)))


@pytest.mark.parametrize("strategy", ["FIXED", "DYNAMIC", "GAUSSIAN"])
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (3, 17, 9, 7), (1, 300, 1, 1)])
def test_ops_without_weights(shape, strategy):
    rng = torch.Generator().manual_seed(4)
    x, other = random_codes(rng, shape), random_codes(rng, shape)
    strategy, fixed = int(probquant.Strategy[strategy]), torch.tensor([0.02, 100.0]) if strategy == "FIXED" else None
    both = (*x, *other, 0.0, 6.0, strategy, torch.tensor([3.0, 3.0, 0.2]) if strategy == probquant.Strategy.GAUSSIAN else fixed, True)
    assert_same_bytes(ops.add(*both), ops.add(*on_cuda(both)))
    gate = ops.adaptive_avg_pool2d(*other[:3], [1])
    for second in (other, gate):
        factors = (*x, *second, strategy, torch.tensor([3.0, 3.0]) if strategy == probquant.Strategy.GAUSSIAN else fixed, True)
        assert_same_bytes(ops.mul(*factors), ops.mul(*on_cuda(factors)))
    for activation in range(5):
        arguments = (*x[:3], activation, -1.0, 1.5, strategy, fixed, True)
        assert_same_bytes(ops.activation(*arguments), ops.activation(*on_cuda(arguments)))
    lists = [[a, b, a] for a, b in zip(x[:3], other[:3], strict=True)]
    assert_same_bytes(ops.concat(*lists, strategy, fixed, True), ops.concat(*map(on_cuda, lists), strategy, *on_cuda([fixed]), True))
    assert_same_bytes(ops.upsample_nearest2d(*x[:3], [2, 3], True), ops.upsample_nearest2d(*on_cuda(x[:3]), [2, 3], True))


def random_tokens(rng, shape):
    q = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    return q, torch.rand(shape[:-1], generator=rng) * 0.1 + 0.01, torch.randint(0, 256, shape[:-1], generator=rng, dtype=torch.int32)


@pytest.mark.parametrize("strategy", ["NONE", "FIXED", "DYNAMIC"])
@pytest.mark.parametrize("shape", [(4, 197, 768), (7, 33), (5, 1500)])
def test_layer_norm(shape, strategy):
    rng = torch.Generator().manual_seed(5)
    residual, weight, bias = torch.randn(shape, generator=rng), torch.randn(shape[-1], generator=rng), torch.randn(shape[-1], generator=rng)
    fixed = torch.tensor([0.02, 100.0]) if strategy == "FIXED" else None
    for x in (random_tokens(rng, shape), (torch.randn(shape, generator=rng), None, None)):
        arguments = (*x, residual, weight, bias, 1e-6, True, int(probquant.Strategy[strategy]), fixed, strategy != "NONE")
        assert_same_bytes(ops.layer_norm(*arguments), ops.layer_norm(*on_cuda(arguments)))


@pytest.mark.parametrize("strategy", ["FIXED", "DYNAMIC"])
@pytest.mark.parametrize("batch, queries, keys, heads, head_dim", [(2, 197, 197, 12, 64), (1, 49, 49, 4, 32), (3, 5, 300, 2, 80), (1, 17, 1025, 1, 7)])
def test_attention(batch, queries, keys, heads, head_dim, strategy):
    rng = torch.Generator().manual_seed(6)
    tokens = [part for count in (queries, keys, keys) for part in random_tokens(rng, (batch, count, heads * head_dim))]
    fixed = torch.tensor([0.02, 100.0]) if strategy == "FIXED" else None
    for scale in (head_dim**-0.5, 1e-3):
        arguments = (*tokens, heads, scale, int(probquant.Strategy[strategy]), fixed, True)
        assert_same_bytes(ops.attention(*arguments), ops.attention(*on_cuda(arguments)))


def test_runs_on_the_current_stream():
    x = noise((8, 64, 56, 56), torch.float32)
    wanted = ops.quantize(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a reader that did not wait would see the empty tensor
        late = torch.empty_like(x, device="cuda").copy_(x.pin_memory(), non_blocking=True)
        got = ops.quantize(late)
    stream.synchronize()
    assert_same_bytes(wanted, got)


def test_in_a_cuda_graph():
    x = torch.zeros(4, 3, 64, 64, device="cuda")
    q, scale, zero_point, _ = ops.quantize(x)  # loads the kernels, which a capture may not
    ops.dequantize(q, scale, zero_point), ops.moments(q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, scale, zero_point, stats = ops.quantize(x, 1, None, None, True)
        y = ops.dequantize(q, scale, zero_point)
        again = ops.moments(q, 1, True)
    for seed in range(3):
        fresh = noise((4, 3, 64, 64), torch.float32, seed)
        x.copy_(fresh)
        graph.replay()
        wanted = ops.quantize(fresh, 1, None, None, True)
        assert_same_bytes(wanted, (q, scale, zero_point, stats))
        assert_same_bytes(ops.dequantize(*wanted[:3]), y)
        assert_same_bytes(ops.moments(wanted[0], 1, True), again)


def layer_arguments(strategy, rng):
    """Of conv2d and for pack_weight: a layer that samples patches, with a residual."""
    x, residual = random_codes(rng, (2, 24, 14, 14)), random_codes(rng, (2, 40, 14, 14))
    weight = torch.randint(-127, 128, (40, 3, 3, 24), generator=rng, dtype=torch.int8)
    predictor = predictor_of(strategy, rng, 24, 40, 1, 9 * 24)
    return x, (weight, torch.rand(40, generator=rng) * 1e-3), (40, [3, 3], [1, 1], [1, 1], [1, 1], 1, *residual, 0, 0.0, 6.0, int(probquant.Strategy[strategy]), predictor, 1, True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_in_a_cuda_graph_on_another_stream(strategy):
    """Neither a synchronization nor an allocation of their own: a capture would fail. Behind a wait, on the stream that is current."""
    x, constants, sizes = layer_arguments(strategy, torch.Generator().manual_seed(7))
    wanted = ops.conv2d(*x, ops.pack_weight(*constants), *sizes)
    on_device, packed, sizes = on_cuda(x), ops.pack_weight(*on_cuda(constants)), on_cuda(sizes)
    ops.conv2d(*on_device, packed, *sizes)  # loads the kernels, which a capture may not
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        assert_same_bytes(wanted, ops.conv2d(*on_device, packed, *sizes))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.conv2d(*on_device, packed, *sizes)
    for _ in range(2):  # stats start anew
        graph.replay()
        assert_same_bytes(wanted, got)


def test_graphs_replay_side_by_side():
    """Two graphs, captured on one stream, replay on two others at once: what blocks leave for the last one to add up belongs to one launch."""
    rng = torch.Generator().manual_seed(8)
    layers = [layer_arguments("GAUSSIAN", rng) for _ in range(2)]
    wanted, graphs, got, keep = [], [], [], []
    for x, constants, sizes in layers:
        wanted.append(ops.conv2d(*x, ops.pack_weight(*constants), *sizes))
        on_device, packed, sizes = on_cuda(x), ops.pack_weight(*on_cuda(constants)), on_cuda(sizes)
        keep.append((on_device, packed, sizes))
        ops.conv2d(*on_device, packed, *sizes)  # loads the kernels, which a capture may not
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            got.append(ops.conv2d(*on_device, packed, *sizes))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(200):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for on_cpu, on_gpu in zip(wanted, got, strict=True):
        assert_same_bytes(on_cpu, on_gpu)


def test_on_every_device():
    for index in range(torch.cuda.device_count()):
        x = noise((2, 3, 9, 9), torch.float32, index)
        assert_same_bytes(ops.quantize(x), ops.quantize(x.to(f"cuda:{index}")))


def test_compiles():
    x = noise((2, 3, 16, 16), torch.float32).cuda()
    assert_same_bytes(ops.quantize(x.cpu()), torch.compile(ops.quantize, fullgraph=True)(x))


def test_arguments_on_other_devices_are_refused():
    x = noise((2, 3, 4, 4), torch.float32).cuda()
    with pytest.raises(RuntimeError, match="probquant: quantize: scale is on another device"):
        ops.quantize(x, 1, torch.ones(1), torch.ones(1, dtype=torch.int32))
