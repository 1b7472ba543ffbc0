"""Reads machine code: the instructions of every kernel in a cubin, and its loops. Needs nvdisasm (PyPI nvidia-cuda-nvdisasm)."""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


def find_nvdisasm():
    """On PATH, in a toolkit, or where pip puts it; None if there is none."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm")
    return shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm") or next(map(str, packaged), None)


@dataclass
class Code:
    """Opcodes without their modifiers, in order; `jumps` are (from, to) positions of the branches backwards."""

    opcodes: list[str]
    jumps: list[tuple[int, int]]

    def main_loop(self, opcode):
        """Counts of the opcodes in the smallest loop that has the most of `opcode`; None without such a loop."""
        loops = [Counter(self.opcodes[to : at + 1]) for at, to in self.jumps]
        return min((loop for loop in loops if loop[opcode]), key=lambda loop: (-loop[opcode], loop.total()), default=None)


def kernels(cubin, nvdisasm):
    """Mangled name -> Code."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    result = {}
    for name, body in re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\s*\.section|\Z)", text, re.S):
        opcodes, labels, branches = [], {}, []
        for line in body.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(opcodes)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*?);", line):
                if instruction[1] == "BRA" and (target := re.search(r"`\((\.L_\w+)\)", instruction[2])):
                    branches.append((len(opcodes), target[1]))
                opcodes.append(instruction[1])
        jumps = [(at, labels[target]) for at, target in branches if labels.get(target, at + 1) <= at]
        result[name] = Code(opcodes, jumps)
    return result
