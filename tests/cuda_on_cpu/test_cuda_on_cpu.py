"""Runs the CUDA kernels of csrc/cuda on the CPU, on fibers, and compares them byte for byte with the CPU functions: their sources
under g++ and, where there is an nvcc, what it makes of them. No GPU is needed. README.md says what this finds and what not."""

import os
import shutil
import subprocess

import pytest
from conftest import CSRC, ORDERS, run

# Name, test, file, right text, wrong text.
MUTANTS = {
    "missing_barrier": ("kernels_test", "reduce.cuh", "  __syncthreads();\n  for (unsigned warp", "  for (unsigned warp"),
    "channels_beyond_the_last": ("kernels_test", "place.cuh", "|| channel >= p.channels) end", ") end"),
    "overlooked_nan": ("kernels_test", "range.cu", ": -kInfinity;", ": r.lo;"),
    "padding_of_another_sample": ("layers_test", "dense.cu", "zero_point[sample])];", "zero_point[0])];"),
    "tiles_without_their_last_stage": ("layers_test", "dense.cu", "k_block < copied)", "k_block + 1 < copied)"),
    "keys_beyond_the_last": ("transformers_test", "attention.cu", "exists ? exponential(h, logits[h]) : 0.0f;", "exponential(h, logits[h]);"),
    "lanes_added_in_another_order": ("transformers_test", "attention.cu", "distance = 2; distance > 0; distance /= 2", "distance = 1; distance < 4; distance *= 2"),
    "turned_depthwise_taps": ("layers_test", "depthwise.cu", "low23, 0x5410), w.x", "low23, 0x7632), w.x"),
}


@pytest.mark.parametrize("order", [pytest.param(order, marks=() if order == "random" else pytest.mark.full) for order in ORDERS])
@pytest.mark.parametrize("test", ["kernels_test", "layers_test", "ops_test", "transformers_test"])
def test_kernels_give_the_cpus_bytes(build, leg, test, order):
    assert " 0 failures; " in run(build(leg(test)), order, 1)


def test_the_host_side(build, leg):
    assert "0 failures" in run(build(leg("host_test")))


@pytest.mark.full
@pytest.mark.parametrize("test", ["kernels_test", "layers_test", "ops_test", "transformers_test"])
def test_kernels_stay_in_bounds(build, test):
    assert " 0 failures; " in run(build(test, "sanitized", SANITIZE="address,undefined"), "random", 2)


def test_the_fibers_report_broken_rules(build):
    run(build("fibers_test"))


@pytest.mark.full
def test_the_sanitizers_see_shared_memory(build):
    # The stacks of threads that never end are not unwound, so strings on them leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    program = build("fibers_test", "sanitized", SANITIZE="address,undefined")
    run(program, env=environment)
    assert "out of bounds" in run(program, "overrun", status=1, env=environment)


@pytest.fixture(scope="module")
def mutants(build):
    """One program for each of the mutants: its test with a kernel that is wrong in one place."""
    folder = build.root / "mutants"
    with build.lock("mutants"):
        for name, (_, file, right, wrong) in MUTANTS.items():
            for part in ("core", "cpu", "cuda", "include"):
                shutil.copytree(CSRC / part, folder / name / part, dirs_exist_ok=True)
            text = (CSRC / "cuda" / file).read_text()
            assert text.count(right) == 1
            (folder / name / "cuda" / file).write_text(text.replace(right, wrong))
    return lambda name: build(name, "with_mutants", MUTANTS=";".join(f"{folder / name}:{test}" for name, (test, *_) in MUTANTS.items()))


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(mutants, name):
    statuses = (subprocess.run([mutants(name), order, "1"], capture_output=True).returncode for order in ("random", "forward"))
    assert any(status == 1 for status in statuses)
