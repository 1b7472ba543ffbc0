"""A quantized model without Python: AOTInductor's package, run by csrc/examples/run_package.cpp, gives the model's own bytes."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probquant

SOURCE = Path(__file__).parents[1] / "csrc" / "examples" / "run_package.cpp"
TORCH = Path(torch.__path__[0])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """run_package, built as its head says; the compiler is the one that AOTInductor needs as well."""
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler found (CXX, g++, clang++)")
    if not SOURCE.exists():
        pytest.skip(f"{SOURCE} is not there: run the tests from the source tree")
    built = tmp_path_factory.mktemp("run_package") / "run_package"
    flags = ["-std=c++20", "-I", TORCH / "include", "-L", TORCH / "lib", f"-Wl,-rpath,{TORCH / 'lib'}"]
    done = subprocess.run([compiler, *flags, SOURCE, "-o", built, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.parametrize("recorded", [False, True])
def test_a_compiled_package_runs_without_python(program, tmp_path, recorded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    qmodel = probquant.quantize(model.eval(), [torch.randn(8, 3, 16, 16)], progress=False)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(qmodel.recorded() if recorded else qmodel, (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        done = subprocess.run([program, probquant.ops_library, package, *map(str, images.shape)], input=images.numpy().tobytes(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert np.array_equal(np.frombuffer(done.stdout, np.float32).reshape(batch, 10), qmodel(images).numpy())


def test_the_program_says_what_is_wrong(program):
    def error(*arguments, images=b""):
        done = subprocess.run([program, *arguments], input=images, capture_output=True)
        assert done.returncode != 0
        return done.stderr.decode()

    assert "usage: " in error()
    assert "no-such-library.so" in error("no-such-library.so", "model.pt2", "1", "3", "16", "16")
    assert "fewer than 768 values" in error(probquant.ops_library, "model.pt2", "1", "3", "16", "16", images=bytes(4))
