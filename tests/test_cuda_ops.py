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
