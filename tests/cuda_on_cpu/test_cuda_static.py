"""What nvcc makes of the CUDA kernels, for every architecture that ships: no spills, registers and shared memory within the budgets
below, tensor cores kept fed in the main loops. Needs nvcc, no GPU; what it says of the machine code also nvdisasm."""

import importlib
import math

import machine_code
import pytest
from conftest import CSRC

FULL = [architecture for architecture in machine_code.ARCHITECTURES if architecture != 80]
ARCHITECTURES = [80, *(pytest.param(architecture, marks=pytest.mark.full) for architecture in FULL)]

# Kernel instances, registers per thread and bytes of static shared memory, at most, and blocks that fit on a multiprocessor, at least.
# 64 registers let four blocks of 256 threads run there: half of its threads, enough for kernels that are bound by memory.
BUDGETS = {
    "activation": (2, 64, 2820, 4),
    "attention": (3, 168, 21312, 3),
    "concat": (1, 64, 2244, 4),
    "dense": (5, 255, 0, 1),
    "depthwise": (1, 128, 8460, 2),
    "dequantize": (3, 40, 0, 4),
    "layer_norm": (1, 168, 0, 3),
    "moments": (1, 64, 2244, 4),
    "pack": (2, 64, 64, 4),
    "pairs": (4, 64, 2316, 4),
    "patch_sums": (2, 80, 6444, 3),
    "pool": (3, 64, 2308, 4),
    "predict": (2, 64, 6208, 4),
    "quantize": (3, 64, 2308, 4),
    "range": (3, 40, 64, 4),
    "upsample": (1, 64, 2244, 4),
}

# Kernels whose last block adds up what the others have left (parts.cuh): a fence on either side of a part's signature, one behind the swap that
# says who takes the parts, which is their only atomic on global memory.
LEAVE_PARTS = {
    *("activation_kernel", "average_kernel", "concat_kernel", "dense_kernel", "depthwise_kernel", "max_pool_kernel", "moments_kernel", "pair_kernel"),
    *("patch_sums_kernel", "quantize_kernel", "upsample_kernel"),
}

# Dense layers, by the rows and columns of their tile (csrc/cuda/heuristics.h) and the bytes they copy at once (dense.cu). Units of 1 byte are
# gathered through registers, which no cp.async can do, in a loop of its own in front of the main one.
DENSE = [(128, 128, 16), (64, 64, 16), (32, 64, 16), (64, 64, 8), (64, 64, 1)]
MOST_OTHERS = 4.0  # other instructions per mma in the main loop
MOST_GATHERING = 128  # instructions per round of the main loop, which has 32 mma
SHARED_FITS = {75: 1, 80: 3, 86: 2, 89: 2, 90: 4, 100: 4, 120: 2}  # blocks with 48 KiB of shared memory each


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """A function from an architecture to the kernels of all files, with the blocks of each that fit on a multiprocessor."""
    if not CSRC.exists():
        pytest.skip(f"{CSRC} is not there: run the tests from the source tree")
    folder, results = tmp_path_factory.mktemp("cuda_static"), {}
    calculator = machine_code.Calculator(folder, nvcc)

    def compile_all(architecture):
        if architecture not in machine_code.known_architectures(nvcc):
            pytest.skip(f"this nvcc does not know sm_{architecture}")
        if architecture not in results:
            kernels = machine_code.compile_files(BUDGETS, architecture, folder, nvcc, machine_code.find_nvdisasm())
            results[architecture] = list(zip(kernels, calculator.blocks(kernels), strict=True))
        return results[architecture]

    compile_all.calculator = calculator
    return compile_all


def test_every_kernel_file_has_a_budget():
    assert machine_code.all_files() == sorted(BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_within_budget(compiled, architecture):
    kernels = compiled(architecture)
    for name, (instances, registers, shared, blocks) in BUDGETS.items():
        of_file = [(kernel, fitting) for kernel, fitting in kernels if kernel.file == name]
        assert len(of_file) == instances, name
        for kernel, fitting in of_file:
            assert kernel.spilled == 0, kernel
            assert kernel.registers <= registers and kernel.shared <= shared, kernel
            assert fitting >= blocks, (kernel, fitting)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_opcodes(compiled, architecture):
    """What every kernel must be made of: products on tensor cores or in dp4a, and fences of sequential consistency where blocks leave parts
    (parts.cuh); and what not: local memory, sums by atomics, and double outside of the laws, which have a 64th of float32's units on many GPUs."""
    if machine_code.find_nvdisasm() is None:
        pytest.skip("no nvdisasm found (pip install nvidia-cuda-nvdisasm)")
    wanted = {"dense": {"IMMA", "LDSM"} | ({"LDGSTS"} if architecture >= 80 else {"LDG", "STS"}), "depthwise": {"IDP"}}
    wanted_of_kernel = {"attention_kernel": {"IMMA"}}
    for kernel, _ in compiled(architecture):
        opcodes = set(kernel.code.opcodes)
        assert wanted.get(kernel.file, set()) | wanted_of_kernel.get(kernel.title, set()) <= opcodes, kernel.title
        assert not opcodes & {"LDL", "STL"}, kernel.title
        assert kernel.file in ("predict", "patch_sums", "pairs", "dense", "depthwise") or not opcodes & {"DADD", "DMUL", "DFMA"}, kernel.title
        assert kernel.code.fences >= (3 if kernel.title.split("<")[0] in LEAVE_PARTS else 0), kernel.title
        assert "RED" not in opcodes and kernel.code.opcodes.count("ATOMG") == (kernel.title.split("<")[0] in LEAVE_PARTS), kernel.title


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_main_loops(compiled, architecture):
    if machine_code.find_nvdisasm() is None:
        pytest.skip("no nvdisasm found (pip install nvidia-cuda-nvdisasm)")
    dense = {kernel.tile: (kernel, fitting) for kernel, fitting in compiled(architecture) if kernel.file == "dense"}
    assert sorted(dense) == sorted(DENSE)
    for tile in DENSE:
        kernel, fitting = dense[tile]
        assert fitting >= min(kernel.planned_blocks, SHARED_FITS[architecture]), (tile, fitting)
        loop = kernel.code.main_loop("IMMA")
        assert loop is not None, tile
        wanted = {"IMMA", "LDSM"} | ({"LDGSTS"} if architecture >= 80 else {"LDG", "STS"})
        assert wanted <= set(loop), (tile, loop)
        others = (loop.total() - loop["IMMA"] - loop["NOP"]) / loop["IMMA"]  # sm_120 wants a NOP behind every mma
        assert others <= MOST_OTHERS, (tile, others, loop)
        if tile[2] == 1:
            assert loop["IMMA"] == 32 * (4 if architecture < 80 else 1)  # where an mma is four of m8n8k16
            gathering = kernel.code.gathering()
            assert gathering["LDG"] == 20 and gathering.total() <= MOST_GATHERING, gathering


def test_the_benchmarks_page_is_written(compiled, monkeypatch):
    if machine_code.find_nvdisasm() is None:
        pytest.skip("no nvdisasm found (pip install nvidia-cuda-nvdisasm)")
    cuda_static = importlib.import_module("cuda_static")
    for device in cuda_static.DEVICES:
        assert device.source and 2 ** round(math.log2(device.per_clock)) == pytest.approx(device.per_clock, rel=2e-3), device
    monkeypatch.setattr(cuda_static, "DEVICES", [device for device in cuda_static.DEVICES if device.architecture == 80])
    page = cuda_static.page([kernel for kernel, _ in compiled(80)], compiled.calculator, [1])
    for text in ("dense_kernel<128, 128,", "attention_kernel", "estimates, lower bounds", "### ViT-B/16, batch 1", "| 3x3 56x56 64->64 relu | 3 |"):
        assert text.lower() in page.lower(), text
