"""The CUDA functions of the C++ library on a machine without a GPU: they link, and say clearly why they cannot run; and the torch
ops' CUDA registrations are there in every build."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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
    assert answers["quantize_workspace_bytes"] == "ok"
    assert answers["packed_weight_bytes"] == "ok"
    assert answers["a missing predictor"] == "probquant: conv2d: predictor has 1 values, strategy 1 wants 2"
    assert answers["a wrong size"] == "probquant: moments: channels 2 does not divide the sample's 3 values"


@pytest.mark.parametrize(
    "op", ["quantize", "dequantize", "moments", "pack_weight", "linear", "conv2d", "surrogate_law", "add", "activation", "concat",
           "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "layer_norm", "attention"])
def test_registered_for_cuda_tensors(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"probquant::{op}", "CUDA")


def test_fake_cuda_tensors_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, 8, device="cuda", dtype=torch.float16)
        q, scale, zero_point, stats = probquant.ops.quantize(x, 1, None, None, True)
        y = probquant.ops.dequantize(q, scale, zero_point, torch.bfloat16)
        again = probquant.ops.moments(q, 1, True)
    assert {t.device.type for t in (q, scale, zero_point, stats, y, again)} == {"cuda"}
    assert (q.shape, q.dtype, stats.shape) == (x.shape, torch.uint8, again.shape)


def test_a_layer_packs_its_weight_for_the_device_it_moves_to():
    weight, scale = torch.ones(8, 3, 3, 4, dtype=torch.int8), torch.ones(8)
    unit = UnitTensors(weight, scale, None, None, 1)
    before = unit.packed_weight
    assert unit.to("cpu").packed_weight is before
    unit.packed_weight = before[:5]  # bytes of another layout would have another size
    assert unit.to("meta").packed_weight.shape == before.shape
