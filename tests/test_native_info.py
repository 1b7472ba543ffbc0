"""probquant._native: what the build contains, which instruction set is used, and that PROBQUANT_ISA only lowers it."""

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ISAS = ["reference", "avx2", "avx512vnni", "amx"]
PACKAGE = Path(find_spec("probquant").origin).parent
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])  # the module alone: the package would import torch
import _native
print((_native.build_info(), _native.cpu_info()))
"""


def native_info(isa):
    environment = {name: value for name, value in os.environ.items() if name != "PROBQUANT_ISA"}
    if isa is not None:
        environment["PROBQUANT_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(PACKAGE)], env=environment, capture_output=True, text=True
    )


def parsed(result):
    assert result.returncode == 0, result.stderr
    return ast.literal_eval(result.stdout)


def test_build_info():
    build, cpu = parsed(native_info(None))
    assert build["version"] == version("probquant")
    assert build["isas"] == ISAS[: len(build["isas"])]
    assert build["isas"][-1] == cpu["isa_compiled"]
    assert build["cuda"] == bool(build["cuda_archs"]) == bool(build["cuda_compiler"])
    assert build["compiler"] and build["build_type"] == "Release"


def test_features_match_the_kernels_view():
    flags = Path("/proc/cpuinfo")
    line = next((x for x in flags.read_text().splitlines() if x.startswith("flags")), "") if flags.exists() else ""
    if not line:
        pytest.skip("no flags in /proc/cpuinfo")
    kernel = set(line.split(":", 1)[1].split())
    _, cpu = parsed(native_info(None))
    assert cpu["features"] == {name: name in kernel for name in cpu["features"]}


@pytest.mark.parametrize("isa", [None, "", *ISAS])
def test_environment_only_lowers(isa):
    _, cpu = parsed(native_info(isa))
    best = min(ISAS.index(cpu["isa_compiled"]), ISAS.index(cpu["isa_detected"]))
    wanted = min(best, ISAS.index(isa)) if isa else best
    assert cpu["isa_used"] == ISAS[wanted]


def test_unknown_isa_is_an_error():
    result = native_info("sse9")
    assert result.returncode != 0
    assert "PROBQUANT_ISA is 'sse9', wanted reference, avx2, avx512vnni or amx" in result.stderr
