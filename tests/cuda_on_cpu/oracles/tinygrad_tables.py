"""Prints where every (lane, value) of mma.m16n8k32's fragments lies, out of tinygrad's emulator of tensor cores
(tinygrad/runtime/ops_python.py), in the form of cute_tables.cpp. Its element functions are run on symbols; its code is not
imported, so that its own requirements need not be there."""

import importlib.util
import re
from pathlib import Path


class Values:
    """Stands for values[element][lane]: indexing twice gives the two indices."""

    def __init__(self, element=None):
        self.element = element

    def __getitem__(self, index):
        return Values(index) if self.element is None else (index, self.element)


def main():
    source = (Path(importlib.util.find_spec("tinygrad").origin).parent / "runtime" / "ops_python.py").read_text()
    cuda = source[source.index('elif device == "CUDA":') :]
    eight_bits = cuda[cuda.index("if dims == (8,16,32):") :]
    body = {}
    for name, arguments, text in [
        ("c_map", "lane, elem", cuda),
        ("a_elem", "x, k, row, goff", eight_bits),
        ("b_elem", "x, col, k, goff", eight_bits),
    ]:
        body[name] = re.search(rf"def {name}\({arguments}\): return (.*)", text)[1]
    for k in range(32):
        for row in range(16):
            lane, value = eval(body["a_elem"], {"x": Values(), "k": k, "row": row, "goff": 0})
            print("m16n8k32.A", lane, value, row + 16 * k)
        for column in range(8):
            lane, value = eval(body["b_elem"], {"x": Values(), "k": k, "col": column, "goff": 0})
            print("m16n8k32.B", lane, value, column + 8 * k)
    for lane in range(32):
        for value in range(4):
            column, row = eval(body["c_map"], {"lane": lane, "elem": value})
            print("m16n8k32.C", lane, value, row + 16 * column)


if __name__ == "__main__":
    main()
