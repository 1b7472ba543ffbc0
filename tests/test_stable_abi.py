"""Holds csrc/torch/stable_symbols.h against the headers of the installed torch.

The op library is built without torch, from its own list of C functions. Here a generated file includes that list and
torch's headers, and asserts that both give every function the same type; a difference is a compile error. Torch's headers
are asked for the ABI of 2.10, the oldest torch that probquant supports, so that a function which came later fails too.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SYMBOLS = Path(__file__).parents[1] / "csrc" / "torch" / "stable_symbols.h"

SOURCE = """
#define USE_CUDA  // declares the CUDA part of the C ABI; no CUDA header is involved
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <type_traits>
#include "stable_symbols.h"

#define SAME(result, name, parameters) \\
  static_assert(std::is_same_v<decltype(&::name), result (*) parameters>, #name " differs from torch's declaration");
PROBQUANT_TORCH_SYMBOLS(SAME)
PROBQUANT_TORCH_CUDA_SYMBOLS(SAME)
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
PROBQUANT_TORCH_2_13_SYMBOLS(SAME)
#endif
"""


def abi_version(major, minor):
    return f"0x{major:02x}{minor:02x}000000000000ULL"


@pytest.fixture(scope="module")
def compile_with_torch(tmp_path_factory):
    torch = pytest.importorskip("torch")
    if not SYMBOLS.exists():
        pytest.skip(f"{SYMBOLS} is not there: run the tests from the source tree")
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch" / "csrc" / "stable" / "c" / "shim.h").exists():
        pytest.skip("this torch comes without its headers")
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler found (CXX, c++, g++, clang++)")
    folder = tmp_path_factory.mktemp("stable_abi")

    def run(source, target):
        file = folder / "check.cpp"
        file.write_text(source)
        flags = ["-std=c++17", "-fsyntax-only", f"-DTORCH_TARGET_VERSION={target}"]
        includes = ["-I", SYMBOLS.parent, "-isystem", include]
        return subprocess.run([compiler, *flags, *includes, file], capture_output=True, text=True)

    return run


def test_every_declaration_is_torchs_own(compile_with_torch):
    result = compile_with_torch(SOURCE, abi_version(2, 10))
    assert result.returncode == 0, result.stderr


def test_declarations_that_newer_torch_adds(compile_with_torch):
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 13):
        pytest.skip("torch >= 2.13 is wanted")
    result = compile_with_torch(SOURCE, abi_version(*version))
    assert result.returncode == 0, result.stderr


def test_a_wrong_declaration_is_noticed(compile_with_torch):
    wrong = SOURCE + "SAME(int32_t, aoti_torch_get_dim, (AtenTensorOpaque*, int32_t*))\n"
    result = compile_with_torch(wrong, abi_version(2, 10))
    assert result.returncode != 0
    assert "aoti_torch_get_dim differs from torch's declaration" in result.stderr


def test_every_linked_function_is_in_libtorch_cpu():
    torch = pytest.importorskip("torch")
    import ctypes
    import re

    if not SYMBOLS.exists():
        pytest.skip(f"{SYMBOLS} is not there: run the tests from the source tree")
    linked = SYMBOLS.read_text().split("#define PROBQUANT_TORCH_CUDA_SYMBOLS")[0]
    names = re.findall(r"X\([\w*]+, (\w+),", linked)
    assert len(names) > 30
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    missing = [name for name in names if not hasattr(library, name)]
    assert not missing
