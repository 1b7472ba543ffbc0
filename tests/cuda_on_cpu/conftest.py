"""Builds and runs the programs of CMakeLists.txt, for the tests in this folder.

CUDA_ON_CPU_BUILDS names a folder that keeps the builds from one run to the next. Tests marked `full` run when this folder (or something in it) is named on the command line; a plain `pytest` leaves them out.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import probquant

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
sys.path.append(str(HERE.parents[1] / "benchmarks"))
from machine_code import find_nvcc  # noqa: E402
ORDERS = ("forward", "backward", "random")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only where tests/cuda_on_cpu is named on the command line")


def pytest_collection_modifyitems(config, items):
    named = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    if not any(path == HERE or HERE in path.parents for path in named):
        skip = pytest.mark.skip(reason="part of the full set: python -m pytest tests/cuda_on_cpu")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def nvcc():
    if find_nvcc() is None:
        pytest.skip("no nvcc found (CUDACXX, nvcc)")
    return find_nvcc()


def run(*command, status=0, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    output = result.stdout + result.stderr
    assert result.returncode == status, output
    return output


class Builds:
    """Programs of CMakeLists.txt, in a folder that all pytest workers share: one of them builds while the others wait."""

    def __init__(self, root):
        self.root = root
        root.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def lock(self, name):
        with open(self.root / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def __call__(self, target, folder="plain", **cache):
        """The program of that CMake target. Cache variables that change how a program is built need a folder of their own; those that only
        add programs do not."""
        with self.lock(folder):
            if cache or not (self.root / folder / "build.ninja").exists():
                cache = {"CMAKE_PREFIX_PATH": probquant.cmake_prefix_path, "NVCC": find_nvcc() or "", **cache}
                run("cmake", "-S", HERE, "-B", self.root / folder, "-G", "Ninja", *(f"-D{name}={value}" for name, value in cache.items()))
            run("cmake", "--build", self.root / folder, "--target", target)
        return self.root / folder / target


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    if not CSRC.exists():
        pytest.skip(f"{CSRC} is not there: run the tests from the source tree")
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not found: {', '.join(missing)} (pip install cmake ninja)")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler found (CXX, c++, g++, clang++)")
    own = tmp_path_factory.getbasetemp()
    temporary = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda_on_cpu"
    return Builds(Path(os.environ.get("CUDA_ON_CPU_BUILDS", temporary)))


@pytest.fixture(params=["cpp", "ptx"])
def leg(request):
    """Both ways from a kernel to the CPU: a function from a program's name to its CMake target."""
    if request.param == "ptx":
        request.getfixturevalue("nvcc")
    return lambda name: name + ("_ptx" if request.param == "ptx" else "")
