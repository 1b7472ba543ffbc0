"""The C++ side as its users meet it: csrc/examples builds against the installed package and gives the stored bytes, and
every public header stands alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import probquant

EXAMPLES = Path(__file__).parents[1] / "csrc" / "examples"
INCLUDE = Path(probquant.cmake_prefix_path).parents[1] / "include"
HEADERS = sorted(path.relative_to(INCLUDE).as_posix() for path in INCLUDE.rglob("*.h"))


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compiler():
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C++ compiler found (CXX, c++, g++, clang++)")
    return found


@pytest.fixture(scope="module")
def built(compiler, tmp_path_factory):
    """The build folder of csrc/examples."""
    if not EXAMPLES.exists():
        pytest.skip(f"{EXAMPLES} is not there: run the tests from the source tree")
    missing = [tool for tool in ("cmake", "ctest", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not found: {', '.join(missing)} (pip install cmake ninja)")
    folder = tmp_path_factory.mktemp("examples")
    prefix = f"-DCMAKE_PREFIX_PATH={probquant.cmake_prefix_path}"
    run("cmake", "-S", EXAMPLES, "-B", folder, "-G", "Ninja", prefix, f"-DCMAKE_CXX_COMPILER={compiler}")
    run("cmake", "--build", folder)
    return folder


def test_examples_pass_their_ctest(built):
    output = run("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in output


def test_stored_bytes_are_what_the_generator_prints(built):
    printed = run(built / "two_layers", "--print", env={**os.environ, "PROBQUANT_ISA": "reference"})
    assert printed == (EXAMPLES / "two_layers_expected.h").read_text()


def test_a_changed_byte_is_noticed(built, compiler, tmp_path):
    for file in EXAMPLES.iterdir():
        shutil.copy(file, tmp_path)
    header = tmp_path / "two_layers_expected.h"
    text = header.read_text()
    start = text.index("hidden_q[] = {")
    header.write_text(text[:start] + text[start:].replace(" 102,", " 103,", 1))
    library = Path(probquant.cmake_prefix_path).parent
    program = tmp_path / "two_layers"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-I", INCLUDE, "-L", library, f"-Wl,-rpath,{library}"]
    run(compiler, *flags, tmp_path / "two_layers.cpp", "-o", program, "-lprobquant")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "hidden.q differs from the stored bytes" in result.stdout


@pytest.mark.parametrize("header", HEADERS)
def test_header_stands_alone(compiler, header, tmp_path):
    source = tmp_path / "alone.cpp"
    source.write_text(f"#include <{header}>\n#include <{header}>\n")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    run(compiler, *flags, "-I", INCLUDE, source)


def test_headers_include_neither_torch_nor_cuda():
    text = "".join((INCLUDE / header).read_text() for header in HEADERS)
    includes = {line.split()[1] for line in text.splitlines() if line.startswith("#include")}
    assert HEADERS and not [name for name in includes if name.startswith(("<torch", "<ATen", "<c10", "<cuda"))]
