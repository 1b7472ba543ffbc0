"""Runs the CUDA kernels on the CPU, on fibers: the sources of csrc/cuda under g++, compared byte for byte with the CPU
functions. Needs neither nvcc nor a GPU. fibers.h says what this finds and what it does not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import probquant

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


# Name, file, right text, wrong text.
MUTANTS = {
    "missing_barrier": ("reduce.cuh", "  __syncthreads();\n  for (unsigned warp", "  for (unsigned warp"),
    "channels_beyond_the_last": ("place.cuh", "|| channel >= p.channels) end", ") end"),
    "overlooked_nan": ("range.cu", ": -kInfinity;", ": r.lo;"),
}


def run(*command, status=0, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    output = result.stdout + result.stderr
    assert result.returncode == status, output
    return output


def build(folder, **cache):
    if not CSRC.exists():
        pytest.skip(f"{CSRC} is not there: run the tests from the source tree")
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not found: {', '.join(missing)} (pip install cmake ninja)")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler found (CXX, c++, g++, clang++)")
    defines = [f"-D{name}={value}" for name, value in {"CMAKE_PREFIX_PATH": probquant.cmake_prefix_path, **cache}.items()]
    run("cmake", "-S", HERE, "-B", folder, "-G", "Ninja", *defines)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Programs as they are meant, and one with each of the mutants."""
    folder = tmp_path_factory.mktemp("plain")
    mutants = []
    for name, (file, right, wrong) in MUTANTS.items() if CSRC.exists() else []:
        mutants.append(folder / "mutants" / name)
        for part in ("core", "cuda", "include"):
            shutil.copytree(CSRC / part, mutants[-1] / part)
        text = (mutants[-1] / "cuda" / file).read_text()
        assert text.count(right) == 1
        (mutants[-1] / "cuda" / file).write_text(text.replace(right, wrong))
    return build(folder, MUTANTS=";".join(map(str, mutants)))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sanitized"), SANITIZE="address,undefined")


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_kernels_give_the_cpus_bytes(plain, order):
    assert " 0 failures; " in run(plain / "kernels_test", order, 1)


def test_kernels_stay_in_bounds(sanitized):
    assert " 0 failures; " in run(sanitized / "kernels_test", "random", 2)


def test_the_fibers_report_broken_rules(plain):
    run(plain / "fibers_test")


def test_the_sanitizers_see_shared_memory(sanitized):
    # The stacks of threads that never end are not unwound, so strings on them leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run(sanitized / "fibers_test", env=environment)
    assert "out of bounds" in run(sanitized / "fibers_test", "overrun", status=1, env=environment)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(plain, name):
    statuses = (subprocess.run([plain / name, order, "1"], capture_output=True).returncode for order in ("random", "forward"))
    assert any(status == 1 for status in statuses)
