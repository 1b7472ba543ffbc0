"""Runs the CUDA kernels of csrc/cuda on the CPU, on fibers, and compares them byte for byte with the CPU functions: their sources
under g++ and, where there is an nvcc, what it makes of them. No GPU is needed. README.md says what this finds and what not."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import CSRC, ORDERS, run
from test_cuda_static import BUDGETS

# Name, test, file, right text, wrong text. One file of kernels is compiled anew per mutant: <kernels>:<header> alters a header for it alone.
MUTANTS = {
    "missing_barrier": ("ops_test", "activation.cu", "  __syncthreads();\n  Range r", "  Range r"),
    "channels_of_the_next_input": ("ops_test", "concat.cu", "channel >= s.channels[input]", "channel > s.channels[input]"),
    "overlooked_nan": ("kernels_test", "range.cu", ": -kInfinity;", ": r.lo;"),
    "padding_of_another_sample": ("layers_test", "dense.cu", "zero_point[sample])];", "zero_point[0])];"),
    "tiles_without_their_last_stage": ("layers_test", "dense.cu", "if (k_block + depth >= g_.k_blocks) return;", "if (k_block + depth + 1 >= g_.k_blocks) return;"),
    "chunks_beyond_the_row": ("layers_test", "dense.cu", "max_x + dx <= g.row_bytes - min(g.segment_inputs - byte, kChunk) &&", "max_x + dx <= g.row_bytes &&"),
    "columns_without_padding": ("layers_test", "dense.cu", "1u << walk.ky | 1u << (Field", "1u << walk.ky | 0u << (Field"),
    "prediction_by_any_block": ("layers_test", "patch_sums.cu", "bool last = grid.parts == 1;", "bool last = true;"),
    "signatures_that_stay": ("kernels_test", "moments.cu:parts.cuh", "    part.signature = 0;\n", ""),
    "a_part_that_is_not_waited_for": ("ops_test", "pairs.cu:parts.cuh", "int32_t first = count - 1;", "int32_t first = count - 2;"),
    "parts_of_another_sample": ("layers_test", "dense.cu", "plan_.parts.parts + static_cast<int64_t>(sample) * plan_.parts.count", "plan_.parts.parts"),
    "ranges_without_the_last_tile": ("layers_test", "dense.cu", "i < plan_.range_count; i += lanes) measured", "i < plan_.range_count - 1; i += lanes) measured"),
    "channels_of_the_wrong_tile": ("layers_test", "dense.cu", "tile_of(sample)) * g_.out_channels + channel] =", "0) * g_.out_channels + channel] ="),
    "turned_depthwise_taps": ("layers_test", "depthwise.cu", "low23, 0x5410), w.x", "low23, 0x7632), w.x"),
    "keys_beyond_the_last": ("transformers_test", "attention.cu", "exists ? exponential(h, logits[h]) : 0.0f;", "exponential(h, logits[h]);"),
    "lanes_added_in_another_order": ("transformers_test", "attention.cu", "distance = 2; distance > 0; distance /= 2", "distance = 1; distance < 4; distance *= 2"),
}


TESTS = ["kernels_test", "layers_test", "ops_test", "transformers_test"]


def run_checked(build, target, order="random"):
    """Runs the program under the checker; the file that then holds the addresses of the kernels that it launched."""
    file = build.root / f"{target}.launches"
    assert " 0 failures; " in run(build(target), order, 1, env={**os.environ, "CUDA_ON_CPU_LAUNCHES": str(file)})
    return file


@pytest.mark.parametrize("order", [pytest.param(order, marks=() if order == "random" else pytest.mark.full) for order in ORDERS])
@pytest.mark.parametrize("test", TESTS)
def test_kernels_give_the_cpus_bytes(build, leg, test, order):
    run_checked(build, leg(test), order)


@pytest.mark.full
def test_every_instance_runs_under_the_checker(build, leg):
    """All kernels and template instances that are linked in, which are all that ship, are launched by one of the tests."""
    if shutil.which("nm") is None:
        pytest.skip("no nm found (binutils)")
    shipped, launched = set(), set()
    for target in map(leg, TESTS):
        program, file = build(target), build.root / f"{target}.launches"
        if not file.exists() or file.stat().st_mtime < program.stat().st_mtime:
            run_checked(build, target)
        symbols = [line.split(" ", 2) for line in run("nm", "--defined-only", "-C", program).splitlines()]
        at = {name: int(address, 16) for address, _, name in symbols}
        kernels = {}
        for name, address in at.items():
            # not host code's stubs, which nvcc calls otherwise, nor parts and lambdas of kernels
            if match := re.fullmatch(r"(?:void )?probquant::cuda::\(anonymous namespace\)::(\w+_kernel(?:<.*>)?)\([^{[]*\)", name):
                kernels[address] = match[1]
        where, *addresses = [int(line, 16) for line in file.read_text().split()]
        shipped |= set(kernels.values())
        launched |= {kernels[address - where + at["cudaGetLastError"]] for address in addresses}
    assert len(shipped) == sum(instances for instances, *_ in BUDGETS.values())
    assert shipped - launched == set()


@pytest.mark.full
@pytest.mark.parametrize("test", ["layers_test", "transformers_test"])
def test_large_sizes(build, leg, test):
    """A GEMM of 1024^3, a convolution of 56 x 56 x 64, the sizes of ViT-B/16: without the checker."""
    assert " 0 failures; " in run(build(leg(test)), "large")


# Sectors of global memory or wavefronts of shared memory that accesses take, for each that their bytes need, where that is more than one; none
# of it lies in the main loop of a kernel but for units of 8 bytes in dense layers and tables. By instruction, file and space.
WASTE = {
    ("ld.global.u32", "dense.cu", "global"): 2.8,  # gathering: an instruction per word around an unaligned chunk, the same sectors from L1
    ("ld.global.u8", "dense.cu", "global"): 1.3,  # and the image's border
    ("st.shared.v4.u32", "dense.cu", "shared"): 2.0,  # where lanes part there, what is left of two quarters of a warp counts as one
    ("cp.async.ca.shared.global", "ptx.cuh", "global"): 1.6,  # units of 8 bytes: a pixel of 24 begins and ends within a sector
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
    ("ld.volatile.global.u64", "parts.cuh", "global"): 4.0,  # signatures, once per block
    ("ld.shared.f32", "activation.cu", "shared"): 4.0,  # a table that codes index at random: see its head comment
    ("ld.shared.u16", "activation.cu", "shared"): 4.0,
    ("ld.global.f32", "concat.cu", "global"): 2.0,  # the inputs' parameters, once per block
    ("ld.global.u32", "concat.cu", "global"): 2.0,
    ("ld.global.f32", "reduce.cuh", "global"): 1.9,  # the blocks' ranges, once per block
}


@pytest.mark.full
@pytest.mark.parametrize("test", TESTS)
def test_no_bandwidth_is_wasted(build, nvcc, test):
    report = run(build(test + "_ptx"), "large")
    rows = re.findall(r"^(\S+) at (\S+):\d+ +(shared|global) .* ([\d.]+)$", report, re.M)
    assert len(rows) > 10
    assert [(*place, ratio) for *place, ratio in rows if float(ratio) > WASTE.get(tuple(place), 1.0)] == []


def test_the_host_side(build, leg):
    assert "0 failures" in run(build(leg("host_test")))


@pytest.mark.full
@pytest.mark.parametrize("test", TESTS)
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
            kernels, _, header = file.partition(":")
            (folder / name).mkdir(parents=True, exist_ok=True)
            for part in filter(None, (kernels, header)):
                text = (CSRC / "cuda" / part).read_text()
                if part == (header or kernels):
                    assert text.count(right) == 1, name
                    text = text.replace(right, wrong)
                if part == header:  # in a namespace of its own: else the linker takes the other kernels' copies of its functions
                    text = text.replace("namespace probquant::cuda {", "namespace probquant::cuda {\nnamespace {").replace("}  // namespace probquant::cuda", "}\n}")
                text = re.sub(r'#include "(\.\./)?', lambda match: f'#include "{"" if match[1] else "cuda/"}', text)
                (folder / name / part).write_text(text.replace(f'"cuda/{header}"', f'"{header}"') if header else text)
    return lambda name: build(name, MUTANTS=";".join(f"{folder / name / file.partition(':')[0]}:{test}" for name, (test, file, *_) in MUTANTS.items()))


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(mutants, name):
    statuses = (subprocess.run([mutants(name), order, "1"], capture_output=True).returncode for order in ("random", "forward"))
    assert any(status == 1 for status in statuses)
