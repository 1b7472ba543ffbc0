"""The CUDA functions of the C++ library on a machine without a GPU: they link, and say clearly why they cannot run; and the torch
ops' CUDA registrations are there in every build."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import probquant
from probquant.model import UnitTensors

SOURCE = Path(__file__).parent / "cpp" / "cuda_call.cpp"
PACKAGE = Path(probquant.cmake_prefix_path).parents[1]
CUDA = probquant.build_info()["cuda"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each function says, by name."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; tests/test_cuda_ops.py runs the kernels on it")
    compiler = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler found (CXX, c++, g++, clang++)")
    program = tmp_path_factory.mktemp("cuda_call") / "cuda_call"
    library = PACKAGE / "lib"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", PACKAGE / "include", "-L", library, f"-Wl,-rpath,{library}"]
    subprocess.run([compiler, *flags, SOURCE, "-o", program, "-lprobquant"], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("name", ["quantize", "dequantize", "moments", "pack_weight", "conv2d", "add", "activation", "concat", "upsample_nearest2d", "layer_norm", "attention"])
def test_the_error_says_what_is_missing(answers, name):
    assert answers[name].startswith(f"probquant: {name}: ")
    if CUDA:
        assert "no NVIDIA driver is installed" in answers[name] or "no CUDA device" in answers[name] or "the NVIDIA driver knows" in answers[name]
    else:
        assert "built without CUDA kernels" in answers[name]


@pytest.mark.skipif(not CUDA, reason="this probquant was built without CUDA kernels")
def test_arguments_are_checked_before_the_device_is_asked(answers):
    assert answers["workspace_bytes"] == "ok"
    assert answers["packed_weight_bytes"] == "ok"
    assert answers["a missing predictor"] == "probquant: conv2d: predictor has 1 values, strategy 1 wants 2"
    assert answers["a wrong size"] == "probquant: moments: channels 2 does not divide the sample's 3 values"


@pytest.mark.parametrize(
    "op", ["quantize", "dequantize", "moments", "pack_weight", "linear", "conv2d", "surrogate_law", "add", "activation", "concat",
           "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "layer_norm", "attention"])
def test_registered_for_cuda_tensors(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"probquant::{op}", "CUDA")


def network(x, packed):
    ops = probquant.ops
    q = ops.quantize(x, 1, None, None, True)
    y = ops.conv2d(*q, packed, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, *[None] * 4, 0, 0.0, None, int(probquant.Strategy.DYNAMIC))
    z = ops.activation(*ops.add(*y, *y)[:3], int(probquant.Activation.GELU))
    joined = ops.concat([z[0], y[0]], [z[1], y[1]], [z[2], y[2]])
    up = ops.upsample_nearest2d(*ops.max_pool2d(*joined[:3], [2], [2], [0], [1])[:3], [2])
    tokens = ops.dequantize(*up[:3]).flatten(2).transpose(1, 2).contiguous()
    norm = ops.layer_norm(tokens, None, None, None, None, None)
    mixed = ops.attention(*norm[:3], *norm[:3], *norm[:3], 4, 0.5)
    return ops.dequantize(*mixed[:3], torch.bfloat16), ops.moments(q[0], 1, True), q


@pytest.mark.parametrize("tracer", ["make_fx", "torch.compile"])
def test_fake_cuda_tensors_trace(tracer):
    """Both of torch's tracers see every op, with tensors on a GPU that is not there: what they call are the ops' fakes."""
    ops, graphs = probquant.ops, []

    def record(graph, inputs):  # a backend of torch.compile: what Dynamo hands to a compiler
        assert all(x.device.type == "cuda" for x in inputs)
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4, 8, 8, device="cuda", dtype=torch.float16)
        weight = torch.empty(8, 3, 3, 4, device="cuda", dtype=torch.int8)
        packed = ops.pack_weight(weight, weight.new_empty(8, dtype=torch.float32)) if CUDA else torch.empty(1, device="cuda", dtype=torch.uint8)
        if tracer == "make_fx":
            graphs.append(make_fx(network)(x, packed))
            assert all(node.meta["val"].device.type == "cuda" for node in graphs[0].graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))
    torch.compiler.reset()
    y, again, (q, _, _, stats) = (network if tracer == "make_fx" else torch.compile(network, backend=record, fullgraph=True))(x, packed)
    assert len(graphs) == 1
    called = {str(node.target).removesuffix(".default") for node in graphs[0].graph.nodes}
    assert {f"probquant.{op}" for op in ("conv2d", "add", "activation", "concat", "upsample_nearest2d", "layer_norm", "attention")} <= called
    assert (y.shape, y.dtype, y.device.type) == ((2, 64, 16), torch.bfloat16, "cuda")
    assert (q.shape, q.dtype, stats.shape) == (x.shape, torch.uint8, again.shape)


def test_a_layer_packs_its_weight_for_the_device_it_moves_to():
    weight, scale = torch.ones(8, 3, 3, 4, dtype=torch.int8), torch.ones(8)
    unit = UnitTensors(weight, scale, None, None, 1)
    before = unit.packed_weight
    assert unit.to("cpu").packed_weight is before
    unit.packed_weight = before[:5]  # bytes of another layout would have another size
    assert unit.to("meta").packed_weight.shape == before.shape
