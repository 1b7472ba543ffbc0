"""Who checks the checker: seeded bugs, fragment layouts from CuTe and tinygrad, NVIDIA's own kernels, and PTX that must be
refused. What comes from packages is left out without them: pip install --no-deps nvidia-cutlass tinygrad."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import HERE, run
from ptx import Unsupported, translate


def test_seeded_bugs_are_reported_and_clean_kernels_are_not(build, nvcc):
    assert " 0 failures" in run(build("bugs_ptx"))


def test_the_profile_counts_sectors_and_bank_conflicts(build, nvcc):
    report = run(build("profile_ptx"))
    counted = {int(line): (int(done), int(needed)) for line, done, needed in re.findall(r"profile\.cu:(\d+) .* (\d+) +(\d+) +[\d.]+\n", report)}
    for number, line in enumerate((HERE / "profile.cu").read_text().splitlines(), 1):
        if wanted := re.search(r"// wanted: (\d+) of (\d+)", line):
            assert counted[number] == (int(wanted[1]), int(wanted[2])), report


@pytest.mark.full
@pytest.mark.parametrize("program", ["arithmetic_ptx", "language_ptx"])
def test_instructions(build, nvcc, program):
    run(build(program))


# ---- layouts


@pytest.fixture(scope="session")
def cutlass(nvcc):
    """The folder with CUTLASS's headers."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("no CUTLASS headers (pip install --no-deps nvidia-cutlass)")
    return Path(package.origin).parent / "source" / "include"


@pytest.fixture(params=["cute", "tinygrad"])
def layouts(request, build, nvcc):
    """A file of fragment layouts from somebody else."""
    if request.param == "cute":
        return run(build("cute_tables", CUTLASS=request.getfixturevalue("cutlass")))
    if importlib.util.find_spec("tinygrad") is None:
        pytest.skip("no tinygrad (pip install --no-deps tinygrad)")
    return run(sys.executable, HERE / "oracles" / "tinygrad_tables.py")


@pytest.mark.full
def test_fragment_layouts(build, layouts):
    report = run(build("fragments_ptx"), input=layouts)
    assert "m16n8k32: 0 of 1024 wrong" in report


@pytest.mark.full
def test_a_wrong_layout_is_noticed(build, layouts):
    assert "m16n8k32: 1024 of 1024 wrong" in run(build("fragments_mutant_ptx"), input=layouts, status=1)


# ---- NVIDIA's kernels


@pytest.mark.full
def test_cub_blocks(build, nvcc):
    run(build("cub_blocks_ptx"))


@pytest.mark.full
@pytest.mark.parametrize("arguments", [(64, 64, 64), (256, 192, 256), (128, 64, 208), (200, 136, 208, "unchecked")])
def test_cutlass_gemm(build, cutlass, arguments):
    run(build("cutlass_gemm_ptx", CUTLASS=cutlass), *arguments)


@pytest.mark.full
def test_cutlass_reads_rows_that_it_never_filled(build, cutlass):
    report = run(build("cutlass_gemm_ptx", CUTLASS=cutlass), 200, 136, 208, status=1)
    assert "uninitialised shared memory: ldmatrix" in report


# ---- the translator

KERNEL = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 .ptr .global .align 4 p)
{{
	.reg .pred %p<3>;
	.reg .b32 %r<8>;
	.reg .f32 %f<4>;
	.reg .b64 %rd<3>;
	ld.param.u64 %rd1, [p];
	{}
	ret;
}}
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "add.s32 %r1, %r2, %r3;",
        "@!%p1 st.global.v2.u32 [%rd1+8], {%r1, %r2};",
        "shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 31, -1;",
        "cp.async.cg.shared.global [%r1], [%rd1], 16, %r2;",
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%r0,%r1,%r2,%r3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r0,%r1,%r2,%r3};",
        "fma.rn.f32 %f1, %f2, %f3, 0f3F800000;",
    ],
)
def test_known_instructions(instruction):
    assert "kernel_0(uint8_t* params)" in translate(KERNEL.format(instruction))


@pytest.mark.parametrize(
    "instruction, reason",
    [
        ("frobnicate.b32 %r1, %r2;", "opcode frobnicate"),
        ("add.sat.s32 %r1, %r2, %r3;", "modifier .sat"),
        ("add.f32 %f1, %f2, %f3;", "ptxas may contract it"),
        ("fma.rn.ftz.f32 %f1, %f2, %f3, %f1;", "modifier .ftz"),
        ("div.approx.f32 %f1, %f2, %f3;", "none of .rn"),
        ("ex2.approx.ftz.f32 %f1, %f2;", "opcode ex2"),
        ("ld.global.L2::cache_hint.u32 %r1, [%rd1], %rd2;", "modifier .L2::cache_hint"),
        ("ld.global.u32 %r1, [%rd7];", "operand %rd7"),
        ("shfl.bfly.b32 %r1, %r2, 16, 31;", "none of .sync"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.u4.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};", "type u4"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};", "fragment size"),
        ("cp.async.ca.shared.global [%r1], [%rd1], 12;", "12 bytes"),
        ("cvt.s32.f32 %r1, %f1;", "without a rounding"),
        ("wgmma.fence.sync.aligned;", "opcode wgmma"),
        ("mov.u32 %r1, %clock;", "operand %clock"),
    ],
)
def test_unknown_instructions_are_refused(instruction, reason):
    with pytest.raises(Unsupported) as error:
        translate(KERNEL.format(instruction))
    assert reason in str(error.value) and instruction.rstrip(";") in str(error.value)
