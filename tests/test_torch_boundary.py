"""The boundary between torch and the op library: who frees what, and how errors reach Python."""

import gc
import os
from pathlib import Path

import pytest
import torch

from probquant import ops


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantized(rows, columns):
    return ops.quantize(torch.linspace(-1, 1, rows * columns).reshape(rows, columns))


def succeed():
    """Plain tensors, optional ones absent and present, lists of tensors; four results each."""
    q, scale, zero_point, stats = quantized(4, 64)
    ops.concat([q, q], [scale, scale], [zero_point, zero_point])
    weight = torch.ones(8, 1, 1, 64, dtype=torch.int8)
    packed = ops.pack_weight(weight, torch.ones(8), torch.zeros(8))
    ops.linear(q, scale, zero_point, stats, packed, 8, strategy=2, activation_min=0.0)
    ops.linear(q, scale, zero_point, stats, packed, 8, strategy=1, predictor=torch.tensor([0.1, 3.0]))


def fail():
    q, scale, zero_point, _ = quantized(4, 64)
    with pytest.raises(RuntimeError):
        ops.concat([q, q], [scale], [zero_point, zero_point])
    with pytest.raises(RuntimeError):
        ops.quantize(torch.zeros(4, 64), 1, scale.double(), zero_point)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
@pytest.mark.parametrize("call", [succeed, fail])
def test_calls_leak_nothing(call):
    for _ in range(500):
        call()
    gc.collect()
    before = resident_mib()
    for _ in range(5000):
        call()
    gc.collect()
    assert resident_mib() - before < 1  # a tensor handle lost per call would be some MiB


def test_results_are_freed_with_their_last_reference():
    x = torch.zeros(1 << 10, 1 << 12)  # 4 MiB of codes per call
    ops.quantize(x)
    before = resident_mib()
    for _ in range(100):
        ops.quantize(x)
    assert resident_mib() - before < 40


def test_an_error_is_a_runtime_error_with_its_own_message():
    with pytest.raises(RuntimeError, match=r"^probquant: ") as caught:
        ops.quantize(torch.zeros(4, 64, dtype=torch.int32))
    assert "quantize" in str(caught.value)
    assert "\n" not in str(caught.value)
