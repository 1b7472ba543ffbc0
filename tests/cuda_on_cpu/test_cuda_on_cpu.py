"""Runs the CUDA kernels of csrc/cuda on the CPU, on fibers, and compares them byte for byte with the CPU functions: their sources
under g++ and, where there is an nvcc, what it makes of them. No GPU is needed. README.md says what this finds and what not."""

import os
import re
import subprocess

import pytest
from conftest import CSRC, ORDERS, run

# Name, test, file, right text, wrong text. Files of kernels, not headers: one of them is compiled anew per mutant.
MUTANTS = {
    "missing_barrier": ("ops_test", "activation.cu", "  __syncthreads();\n  Range r", "  Range r"),
    "channels_of_the_next_input": ("ops_test", "concat.cu", "channel >= s.channels[input]", "channel > s.channels[input]"),
    "overlooked_nan": ("kernels_test", "range.cu", ": -kInfinity;", ": r.lo;"),
    "padding_of_another_sample": ("layers_test", "dense.cu", "zero_point[sample])];", "zero_point[0])];"),
    "tiles_without_their_last_stage": ("layers_test", "dense.cu", "k_block < copied)", "k_block + 1 < copied)"),
    "chunks_beyond_the_row": ("layers_test", "dense.cu", "x + dx <= g.row_bytes - kChunk &&", "x + dx <= g.row_bytes &&"),
    "turned_depthwise_taps": ("layers_test", "depthwise.cu", "low23, 0x5410), w.x", "low23, 0x7632), w.x"),
    "keys_beyond_the_last": ("transformers_test", "attention.cu", "exists ? exponential(h, logits[h]) : 0.0f;", "exponential(h, logits[h]);"),
    "lanes_added_in_another_order": ("transformers_test", "attention.cu", "distance = 2; distance > 0; distance /= 2", "distance = 1; distance < 4; distance *= 2"),
}


@pytest.mark.parametrize("order", [pytest.param(order, marks=() if order == "random" else pytest.mark.full) for order in ORDERS])
@pytest.mark.parametrize("test", ["kernels_test", "layers_test", "ops_test", "transformers_test"])
def test_kernels_give_the_cpus_bytes(build, leg, test, order):
    assert " 0 failures; " in run(build(leg(test)), order, 1)


@pytest.mark.full
@pytest.mark.parametrize("test", ["layers_test", "transformers_test"])
def test_large_sizes(build, leg, test):
    """A GEMM of 1024^3, a convolution of 56 x 56 x 64, the sizes of ViT-B/16: without the checker."""
    assert " 0 failures; " in run(build(leg(test)), "large")


# Sectors of global memory or wavefronts of shared memory that accesses take, for each that their bytes need, where that is more than one; none
# of it lies in the main loop of a layer whose channels are a multiple of 16. By instruction, file and space.
WASTE = {
    ("ld.global.u32", "dense.cu", "global"): 2.4,  # units of 1 byte: the words around an unaligned chunk
    ("ld.global.u8", "dense.cu", "global"): 1.3,  # and the image's border
    ("cp.async.ca.shared.global", "ptx.cuh", "shared"): 2.0,  # units of 8 bytes: half a chunk each
    ("cp.async.ca.shared.global", "ptx.cuh", "global"): 1.6,  # whose other half then comes from L1
    ("st.shared.u32", "dense.cu", "shared"): 2.0,  # a few of the accumulators' stores in front of the epilogue, which nvcc takes apart
    ("ld.global.u32", "epilogue.cuh", "global"): 2.7,  # a channel's constants, once per tile
    ("ld.global.f32", "epilogue.cuh", "global"): 2.7,
    ("ld.global.u8", "pack.cu", "global"): 1.2,
    ("st.global.u8", "pack.cu", "global"): 1.2,
    ("ld.global.u8", "patch_sums.cu", "global"): 1.1,  # fields begin anywhere
    ("ld.global.u8", "attention.cu", "global"): 8.0,  # packing, once per head
    ("ld.global.v4.u32", "attention.cu", "global"): 2.0,  # a key's terms
    ("st.shared.f32", "attention.cu", "shared"): 2.0,  # sums of exponentials, once per block
    ("ld.shared.f32", "attention.cu", "shared"): 2.0,
    ("st.global.u64", "row.cuh", "global"): 1.1,  # a row of stats has three columns in front of the channels'
}


@pytest.mark.full
@pytest.mark.parametrize("test", ["layers_test_ptx", "transformers_test_ptx"])
def test_no_bandwidth_is_wasted(build, nvcc, test):
    report = run(build(test), "large")
    rows = re.findall(r"^(\S+) at (\S+):\d+ +(shared|global) .* ([\d.]+)$", report, re.M)
    assert len(rows) > 10
    assert [(*place, ratio) for *place, ratio in rows if float(ratio) > WASTE.get(tuple(place), 1.0)] == []


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
            text = (CSRC / "cuda" / file).read_text()
            assert text.count(right) == 1
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(re.sub(r'#include "(\.\./)?', lambda match: f'#include "{"" if match[1] else "cuda/"}', text.replace(right, wrong)))
    return lambda name: build(name, MUTANTS=";".join(f"{folder / name / file}:{test}" for name, (test, file, *_) in MUTANTS.items()))


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(mutants, name):
    statuses = (subprocess.run([mutants(name), order, "1"], capture_output=True).returncode for order in ("random", "forward"))
    assert any(status == 1 for status in statuses)
