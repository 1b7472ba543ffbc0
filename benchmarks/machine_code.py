"""What nvcc makes of csrc/cuda, without a GPU: registers, shared memory and spills of every kernel, and its machine code. Needs nvcc; the
machine code needs nvdisasm, too (PyPI nvidia-cuda-nvdisasm)."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # that ship, see PROBQUANT_CUDA_ARCHS in CMakeLists.txt


def find_nvcc():
    """CUDACXX, on PATH, or in a toolkit; None if there is none."""
    candidates = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def find_nvdisasm():
    """On PATH, in a toolkit, or where pip puts it; None if there is none."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm")
    return shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm") or next(map(str, packaged), None)


def known_architectures(nvcc):
    """Those of ARCHITECTURES that this nvcc compiles for."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [architecture for architecture in ARCHITECTURES if f"compute_{architecture}\n" in known]


@dataclass
class Code:
    """Opcodes without their modifiers, in order; `jumps` are (from, to) positions of the branches backwards, `fences` those of sequential
    consistency over the device."""

    opcodes: list[str]
    jumps: list[tuple[int, int]]
    fences: int = 0

    def main_loop(self, opcode):
        """Counts of the opcodes in the smallest loop that has the most of `opcode`; None without such a loop."""
        loops = [Counter(self.opcodes[to : at + 1]) for at, to in self.jumps]
        return min((loop for loop in loops if loop[opcode]), key=lambda loop: (-loop[opcode], loop.total()), default=None)

    def gathering(self):
        """Counts of the loop without mma, within one that has them, that has most global loads outside of the loops within it, and of nothing
        that these hold: of a dense layer that gathers its input, what a thread runs through in front of its products where the image has no border."""

        def own(at, to):
            inside = {i for other, other_to in self.jumps if (other, other_to) != (at, to) and to <= other_to and other <= at for i in range(other_to, other + 1)}
            return Counter(self.opcodes[i] for i in range(to, at + 1) if i not in inside)

        multiplies = [(at, to) for at, to in self.jumps if "IMMA" in self.opcodes[to : at + 1]]
        loops = [own(at, to) for at, to in self.jumps if (at, to) not in multiplies and any(begin <= to and at <= end for end, begin in multiplies)]
        return max(loops, key=lambda loop: loop["LDG"], default=None)

    def inner_loop(self, opcode):
        """The same among the loops that hold no other loop, in front of the fences behind which a last block adds up (parts.cuh)."""
        end = self.opcodes.index("MEMBAR") if "MEMBAR" in self.opcodes else len(self.opcodes)
        inner = [(at, to) for at, to in self.jumps if at < end and not any(to <= other_to and other <= at and (other, other_to) != (at, to) for other, other_to in self.jumps)]
        return Code(self.opcodes, inner).main_loop(opcode)


@dataclass
class Kernel:
    """One kernel of one file, for one architecture. Sizes in bytes, per block; `threads` is the most that a block may have."""

    file: str
    name: str  # mangled
    architecture: int
    registers: int
    shared: int
    spilled: int
    threads: int
    code: Code | None

    @property
    def numbers(self):
        """Its integer template arguments."""
        return [int(number) for number in re.findall(r"L(?:[ib]|NS_5DTypeE)(\d+)E", self.name)]

    @property
    def tile(self):
        """Of a dense layer: rows and columns of the block's tile, and the bytes of its input that it copies at once."""
        return (*self.numbers[:2], self.numbers[-1])

    @property
    def planned_blocks(self):
        """Blocks per multiprocessor for which a dense layer's tile was chosen."""
        return self.numbers[7]

    @property
    def title(self):
        """Its name with the sizes of its tile, its dtype or its operation, as far as there are any."""
        name = re.search(r"\d+([a-z_]+_kernel)", self.name)[1]
        arguments = [*re.findall(r"INS\d_\d+([A-Z][a-z]+)E", self.name), *map(str, self.numbers)]
        return f"{name}<{', '.join(arguments)}>" if arguments else name


def compile_files(names, architecture, folder, nvcc, nvdisasm=None):
    """The kernels of csrc/cuda/<name>.cu for every name, in the order of the source; with nvdisasm also their code."""
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-cubin", f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}"]

    def compile_file(name):
        own = Path(folder) / f"{name}_{architecture}"
        own.mkdir()
        command = [nvcc, *flags, CSRC / "cuda" / f"{name}.cu", "-o", own / "cubin", "--keep", "--keep-dir", own]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        ptx = next(own.glob("*.ptx")).read_text()
        codes = disassemble(own / "cubin", nvdisasm) if nvdisasm else {}
        result = []
        for report in done.stderr.split("Compiling entry function '")[1:]:
            kernel = report.split("'")[0]
            threads = re.search(rf"\.entry {re.escape(kernel)}\(.*?\.maxntid (\d+)", ptx, re.S)[1]
            shared = re.search(r"(\d+) bytes smem", report)
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
            registers = re.search(r"Used (\d+) registers", report)[1]
            result.append(Kernel(name, kernel, architecture, int(registers), int(shared[1]) if shared else 0, spilled, int(threads), codes.get(kernel)))
        return result

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [kernel for kernels in pool.map(compile_file, names) for kernel in kernels]


def all_files():
    """Names of the files with kernels."""
    return sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))


class Calculator:
    """cuda_static.cpp, compiled into `folder`: what the toolkit's cuda_occupancy.h says, and the tiles that heuristics.h chooses."""

    def __init__(self, folder, nvcc):
        self.program = Path(folder) / "calculator"
        source = Path(__file__).with_name("cuda_static.cpp")
        subprocess.run([nvcc, "-std=c++17", "-x", "c++", source, f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", self.program], check=True)

    def ask(self, questions):
        """A list of numbers per question."""
        answers = subprocess.run([self.program], input="\n".join(questions), capture_output=True, text=True, check=True).stdout
        return [[int(value) for value in line.split()] for line in answers.splitlines()]

    def blocks(self, kernels):
        """Blocks per multiprocessor of every kernel, with the dynamic shared memory that it is launched with."""
        return [
            answer[0]
            for answer in self.ask(
                f"occupancy {k.architecture // 10} {k.architecture % 10} {k.threads} {k.registers} {k.shared} {DYNAMIC_SHARED.get(k.file, 0)}" for k in kernels
            )
        ]


DYNAMIC_SHARED = {"dense": 48 << 10}  # Tile::kSharedBytes of heuristics.h, of every tile


def disassemble(cubin, nvdisasm):
    """Mangled name -> Code."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    result = {}
    for name, body in re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\s*\.section|\Z)", text, re.S):
        opcodes, labels, branches, fences = [], {}, [], 0
        for line in body.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(opcodes)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*?);", line):
                if instruction[1] == "BRA" and (target := re.search(r"`\((\.L_\w+)\)", instruction[2])):
                    branches.append((len(opcodes), target[1]))
                opcodes.append(instruction[1])
                fences += instruction[1] == "MEMBAR" and instruction[2].startswith(".SC.GPU")
        jumps = [(at, labels[target]) for at, target in branches if labels.get(target, at + 1) <= at]
        result[name] = Code(opcodes, jumps, fences)
    return result
