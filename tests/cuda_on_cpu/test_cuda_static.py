"""What nvcc says of the CUDA kernels, for every architecture that ships: no spills, and registers and shared memory within
the budgets below. Needs nvcc, no GPU."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CSRC

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]

# Kernel instances, registers per thread and bytes of static shared memory, at most. 64 registers let four blocks of 256
# threads run on a multiprocessor: half of its threads, enough for kernels that are bound by memory.
BUDGETS = {"dequantize": (3, 40, 0), "moments": (1, 64, 2240), "quantize": (3, 64, 2304), "range": (3, 40, 64)}


@pytest.fixture(scope="module")
def reports(nvcc, tmp_path_factory):
    """ptxas's report of every file."""
    if not CSRC.exists():
        pytest.skip(f"{CSRC} is not there: run the tests from the source tree")
    folder = tmp_path_factory.mktemp("static")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES if f"compute_{arch}\n" in known]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-fatbin", f"-I{CSRC / 'include'}"]

    def compile_file(name):
        command = [nvcc, *flags, *targets, CSRC / "cuda" / f"{name}.cu", "-o", folder / f"{name}.fatbin"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {"count": len(targets), **dict(zip(BUDGETS, pool.map(compile_file, BUDGETS), strict=True))}


def test_every_kernel_file_has_a_budget():
    assert sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")) == sorted(BUDGETS)


@pytest.mark.parametrize("name", BUDGETS)
def test_within_budget(reports, name):
    instances, registers, shared = BUDGETS[name]
    report = reports[name]
    assert report.count("Compiling entry function") == instances * reports["count"]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(spills) >= 2 * instances * reports["count"] and not any(spills)
    used = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(used) == instances * reports["count"] and max(used) <= registers
    assert max((int(n) for n in re.findall(r"(\d+) bytes smem", report)), default=0) <= shared
