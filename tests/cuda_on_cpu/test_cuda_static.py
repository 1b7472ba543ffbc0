"""What nvcc makes of the CUDA kernels, for every architecture that ships: no spills, registers and shared memory within the budgets
below, tensor cores kept fed in the main loops. Needs nvcc, no GPU; what it says of the machine code also nvdisasm."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import sass
from conftest import CSRC

FULL = [75, 86, 89, 90, 100, 120]
ARCHITECTURES = [80, *(pytest.param(architecture, marks=pytest.mark.full) for architecture in FULL)]

# Kernel instances, registers per thread and bytes of static shared memory, at most. 64 registers let four blocks of 256
# threads run on a multiprocessor: half of its threads, enough for kernels that are bound by memory.
BUDGETS = {
    "activation": (2, 64, 2816),
    "add": (2, 64, 2304),
    "attention": (3, 168, 21312),
    "concat": (1, 64, 2240),
    "dense": (4, 255, 0),
    "depthwise": (1, 128, 0),
    "dequantize": (3, 40, 0),
    "layer_norm": (1, 168, 0),
    "moments": (1, 64, 2240),
    "pack": (2, 64, 64),
    "patch_sums": (2, 80, 0),
    "pool": (3, 64, 2304),
    "predict": (2, 64, 6208),
    "quantize": (3, 64, 2304),
    "range": (3, 40, 64),
    "upsample": (1, 64, 2240),
}

# Dense layers, by the rows, columns and gathering of their tile (csrc/cuda/heuristics.h): registers, so that the blocks per
# multiprocessor which the tile plans for fit, and other instructions per mma in the main loop.
DENSE = {
    "ILi128ELi128E.*Lb0E": (255, 4.0),
    "ILi64ELi64E.*Lb0E": (168, 4.0),
    "ILi32ELi64E.*Lb0E": (255, 4.0),
    "ILi64ELi64E.*Lb1E": (168, 45.0),  # reads x byte by byte
}


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """A function from an architecture to {file: (cubin, ptxas's report)}."""
    if not CSRC.exists():
        pytest.skip(f"{CSRC} is not there: run the tests from the source tree")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    results = {}

    def compile_all(architecture):
        if f"compute_{architecture}\n" not in known:
            pytest.skip(f"this nvcc does not know sm_{architecture}")
        if architecture not in results:
            folder = tmp_path_factory.mktemp(f"sm_{architecture}")
            flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-cubin", f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}"]

            def compile_file(name):
                cubin = folder / f"{name}.cubin"
                done = subprocess.run([nvcc, *flags, CSRC / "cuda" / f"{name}.cu", "-o", cubin], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                return cubin, done.stderr

            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                results[architecture] = dict(zip(BUDGETS, pool.map(compile_file, BUDGETS), strict=True))
        return results[architecture]

    return compile_all


def test_every_kernel_file_has_a_budget():
    assert sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")) == sorted(BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_within_budget(compiled, architecture):
    for name, (_, report) in compiled(architecture).items():
        instances, registers, shared = BUDGETS[name]
        assert report.count("Compiling entry function") == instances, name
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
        assert len(spills) >= 2 * instances and not any(spills), name
        used = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert len(used) == instances and max(used) <= registers, (name, used)
        assert max((int(n) for n in re.findall(r"(\d+) bytes smem", report)), default=0) <= shared, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_main_loops(compiled, architecture):
    nvdisasm = sass.find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("no nvdisasm found (pip install nvidia-cuda-nvdisasm)")
    cubin, report = compiled(architecture)["dense"]
    codes = sass.kernels(cubin, nvdisasm)
    registers = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", report, re.S))
    assert len(codes) == len(DENSE)
    for tile, (most_registers, most_others) in DENSE.items():
        (name,) = (name for name in codes if re.search(tile, name))
        loop = codes[name].main_loop("IMMA")
        assert loop is not None, tile
        wanted = {"IMMA", "LDSM"} | ({"LDGSTS"} if architecture >= 80 else set())
        assert wanted <= set(loop), (tile, loop)
        others = (loop.total() - loop["IMMA"] - loop["NOP"]) / loop["IMMA"]  # sm_120 wants a NOP behind every mma
        assert others <= most_others, (tile, others, loop)
        assert int(registers[name]) <= most_registers, (tile, registers[name])
