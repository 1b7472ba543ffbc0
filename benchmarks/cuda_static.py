"""The CUDA kernels without a GPU: registers, shared memory, occupancy and the instructions of the main loops, read from what nvcc makes of
them, and a roofline estimate of the layers of ResNet-50 and ViT-B/16. The estimate is arithmetic, not a measurement.

    python benchmarks/cuda_static.py > benchmarks/results/cuda_static.md      # needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm)
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace

from common import markdown_table
from machine_code import Calculator, all_files, compile_files, find_nvcc, find_nvdisasm, known_architectures
from shapes import Shape, read_shapes


@dataclass(frozen=True)
class Device:
    """Peaks as the vendor gives them, dense (no structured sparsity)."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float  # Hz, the boost clock that the peak belongs to
    int8: float  # operations per second, two per multiply-accumulate
    bandwidth: float  # bytes per second
    source: str
    mma_share: float = 1.0  # of the int8 peak that mma.sync reaches

    @property
    def per_clock(self) -> float:
        """int8 operations per clock and multiprocessor: a power of two, if the figures belong together."""
        return self.int8 / (self.clock * self.multiprocessors)


DEVICES = (
    Device(
        "A100", 80, 108, 1.41e9, 624e12, 2039e9,
        "NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM: INT8 624 TOPS (1,248 with sparsity), 2,039 GB/s. "
        "NVIDIA A100 Tensor Core GPU Architecture whitepaper: 108 SMs, GPU boost clock 1410 MHz",
    ),
    Device(
        "H100", 90, 132, 1.83e9, 1979e12, 3350e9,
        "NVIDIA H100 Tensor Core GPU datasheet, H100 SXM: INT8 3,958 TOPS with sparsity, half without, 3.35 TB/s. "
        "NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5: 132 SMs, 1830 MHz boost for tensor operations, INT8 1978.9 TOPS. "
        "These kernels use mma.sync, not wgmma: on Hopper 62.9 % of the peak on average, against over 95 % (Luo et al., Dissecting the NVIDIA Hopper Architecture "
        "through Microbenchmarking and Multiple Level Analysis, arXiv 2501.12084, section 6.2, measured on an H800)",
        mma_share=0.629,
    ),
    Device(
        "L4", 89, 58, 2.04e9, 242e12, 300e9,
        "NVIDIA L4 Tensor Core GPU datasheet: INT8 485 TOPS with sparsity, half without, 300 GB/s. "
        "NVIDIA Ada GPU Architecture whitepaper V2.01: 58 SMs (7424 CUDA cores), boost clock 2040 MHz",
    ),
    Device(
        "RTX 4090", 89, 128, 2.52e9, 660.6e12, 1008e9,
        "NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090: 128 SMs, boost clock 2520 MHz, INT8 tensor 660.6 TOPS (1321.2 with sparsity), 1008 GB/s",
    ),
)  # fmt: skip

# Classes of opcodes; what is in none of them is integer arithmetic, control or moves.
CLASSES = {
    "IMMA": ("IMMA",),
    "LDSM": ("LDSM",),
    "LDGSTS": ("LDGSTS",),
    "global": ("LDG", "STG", "RED", "ATOMG", "LD", "ST"),
    "shared": ("LDS", "STS", "ATOMS"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FRND", "MUFU", "F2I", "I2F", "I2FP", "F2F", "FSET", "DADD", "DMUL", "DFMA"),
}
ISSUED = 4  # warp instructions per clock and multiprocessor, one per scheduler: CUDA C++ Programming Guide, "SIMT Architecture" of 7.x to 12.x


def classify(loop: Counter) -> dict[str, int]:
    counts = {name: sum(loop[opcode] for opcode in opcodes) for name, opcodes in CLASSES.items()}
    return {**counts, "other": loop.total() - sum(counts.values())}


def main_loop(kernel) -> Counter | None:
    """The loop that does the work: around mma where there is one, else the innermost one with most loads."""
    return kernel.code.main_loop("IMMA") or kernel.code.inner_loop("LDG")


def resources(kernels, calculator) -> str:
    """One row per kernel, one column per architecture."""
    architectures = sorted({k.architecture for k in kernels})
    found = {(k.file, k.title, k.architecture): (k, blocks) for k, blocks in zip(kernels, calculator.blocks(kernels), strict=True)}
    rows = []
    for file, title in dict.fromkeys((k.file, k.title) for k in kernels):
        of_kernel = [found[file, title, architecture] for architecture in architectures]
        first = of_kernel[0][0]
        cells = [f"{k.registers} / {blocks} / {blocks * k.threads / 32:.0f}" for k, blocks in of_kernel]
        rows.append([f"{file}.cu", title, first.threads, max(k.shared for k, _ in of_kernel), *cells])
    return markdown_table(["file", "kernel", "threads", "static shared", *(f"sm_{a}" for a in architectures)], rows, left=2)


def loops(kernels) -> str:
    rows = []
    for k in kernels:
        loop = main_loop(k)
        if loop is None:
            continue
        counts = classify(loop)
        others = f"{(loop.total() - counts['IMMA'] - loop['NOP']) / counts['IMMA']:.1f}" if counts["IMMA"] else "-"
        rows.append([f"{k.file}.cu", k.title, f"sm_{k.architecture}", loop.total(), *counts.values(), others])
        if k.file == "dense" and k.tile[2] == 1:
            gathering = k.code.gathering()
            rows.append([f"{k.file}.cu", f"{k.title}, gathering", f"sm_{k.architecture}", gathering.total(), *classify(gathering).values(), f"{gathering.total() / counts['IMMA']:.1f}"])
    return markdown_table(["file", "kernel", "for", "instructions", *CLASSES, "other", "others per IMMA"], rows, left=3)


@dataclass(frozen=True)
class Tiling:
    """How heuristics.h divides a layer."""

    rows: int
    columns: int
    depth: int  # k blocks of 64 bytes per round of the main loop
    warps: int
    blocks: int
    k_blocks: int
    unit: int  # bytes of the input that are copied at once


def estimate(shape: Shape, tiling: Tiling, device: Device, instructions: int) -> tuple[float, str]:
    """Seconds at least, and what takes them. A multiprocessor works off its blocks one behind the other; whole waves count."""
    waves = math.ceil(tiling.blocks / device.multiprocessors)
    operations = 2 * tiling.rows * tiling.columns * tiling.k_blocks * 64
    rounds = math.ceil(tiling.k_blocks / tiling.depth)
    moved = shape.batch * (shape.height * shape.width * shape.in_channels + shape.out_height * shape.out_width * shape.out_channels)
    weights = shape.out_channels * tiling.k_blocks * 64
    times = {
        "tensor": waves * operations / (device.int8 * device.mma_share / device.multiprocessors),
        "issue": waves * rounds * tiling.warps * instructions / (ISSUED * device.clock),
        "memory": (moved + weights) / device.bandwidth,
    }
    return max((seconds, bound) for bound, seconds in times.items())


def roofline(network: str, batch: int, kernels, calculator) -> str:
    shapes = [replace(shape, batch=batch) for shape in read_shapes(network)]
    questions = [
        f"tile {s.batch} {s.height} {s.width} {s.in_channels} {s.out_channels} {s.kernel} {s.stride} {s.padding} {s.groups}" for s in shapes
    ]
    tilings = [Tiling(*answer) for answer in calculator.ask(questions)]
    instructions = {(k.architecture, *k.tile): main_loop(k).total() + (k.code.gathering().total() if k.tile[2] == 1 else 0) for k in kernels if k.file == "dense"}
    rows, totals = [], [0.0] * len(DEVICES)
    for shape, tiling in zip(shapes, tilings, strict=True):
        cells = []
        for i, device in enumerate(DEVICES):
            seconds, bound = estimate(shape, tiling, device, instructions[device.architecture, tiling.rows, tiling.columns, tiling.unit])
            totals[i] += seconds * shape.count
            cells.append(f"{seconds * 1e6:.1f} {bound}")
        rows.append([shape.name, shape.count, f"{tiling.rows}x{tiling.columns}{f'/{tiling.unit}' if tiling.unit < 16 else ''}", tiling.blocks, *cells])
    rows.append(["all", sum(s.count for s in shapes), "", "", *(f"{seconds * 1e6:.0f}" for seconds in totals)])
    return markdown_table(["layer", "count", "tile", "blocks", *(device.name for device in DEVICES)], rows)


def page(kernels, calculator, batches) -> str:
    parts = [
        "# CUDA kernels, read and calculated",
        "Written by `python benchmarks/cuda_static.py`. **No GPU has run anything of this page**: the first two tables are read from what nvcc makes of "
        "the kernels, the others are calculated.",
        "## Registers and occupancy",
        "Per architecture: registers per thread / blocks per multiprocessor / warps per multiprocessor, by the toolkit's `cuda_occupancy.h`. "
        "Threads and static shared memory (bytes) are a block's, dense layers have 48 KiB of dynamic shared memory in addition. "
        "`dense_kernel`: rows and columns of the block's tile and of the warp's, k blocks per stage, slices of K, stages, blocks per multiprocessor, "
        "bytes of the input that it copies at once. Nothing spills.",
        resources(kernels, calculator),
        "## Main loops",
        "Instructions of the loop with most `IMMA`, or, without one, of the innermost loop with most loads; once through it, per warp. A loop may be "
        "unrolled. Attention has three such loops, this is the last of them. `gathering` is what a dense layer whose channels are no multiple of 8 runs "
        "through in front of as many rounds of its main loop, within the image.",
        loops([k for k in kernels if k.architecture in {d.architecture for d in DEVICES}]),
        "## Roofline estimates",
        "**Estimates, lower bounds in microseconds**: the largest of the tensor cores' time (whole tiles, whole waves), of the time to issue the main "
        f"loop's instructions ({ISSUED} per clock and multiprocessor) and of the time to move input, weights and output once through device memory. Launches, "
        "epilogues, the prediction and a pipeline's beginning are not in it, nor attention, norms and pools. A small layer is bound by what is missing here. A tile with /1 or /8 copies "
        "so many bytes at once instead of 16.",
        markdown_table(
            ["device", "multiprocessors", "GHz", "int8, TOP/s", "per clock and multiprocessor", "of it mma.sync, TOP/s", "GB/s", "source"],
            [
                [d.name, d.multiprocessors, f"{d.clock / 1e9:.2f}", f"{d.int8 / 1e12:.1f}", f"{d.per_clock:.0f}", f"{d.int8 * d.mma_share / 1e12:.0f}", f"{d.bandwidth / 1e9:.0f}", d.source]
                for d in DEVICES
            ],
        ),
    ]
    for network, title in (("resnet50", "ResNet-50"), ("vit_b16", "ViT-B/16")):
        for batch in batches:
            parts += [f"### {title}, batch {batch}", roofline(network, batch, kernels, calculator)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes of the estimates")
    args = parser.parse_args()
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        raise SystemExit("needs nvcc, and nvdisasm (pip install nvidia-cuda-nvdisasm)")
    with tempfile.TemporaryDirectory() as folder:
        kernels = []
        for architecture in known_architectures(nvcc):
            print(f"sm_{architecture}", file=sys.stderr)
            kernels += compile_files(all_files(), architecture, folder, nvcc, nvdisasm)
        print(page(kernels, Calculator(folder, nvcc), args.batches), end="")


if __name__ == "__main__":
    main()
