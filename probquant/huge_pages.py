"""Memory in huge pages, for what is large and read once per call: a model's packed weights, side by side.

Weights come from beyond L2, at every call anew, and in pages of 4 KiB a layer that reads megabytes of them waits for page walks beside:
5 % of the time of a ResNet-50 with AMX, 4 % with VNNI (batch 1).
"""

from __future__ import annotations

import contextlib
import mmap
from itertools import accumulate

import torch

_PAGE = 2 << 20
_ALIGNMENT = 64  # bytes, of a packed weight


def side_by_side(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of contiguous uint8 tensors in one mapping, which lives as long as one of them. Where they do not fill a huge page, or the system
    has none to give, they lie in ordinary pages."""
    starts = list(accumulate((-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0))
    if starts[-1] < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensors
    memory = mmap.mmap(-1, starts[-1] + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _PAGE
    copies = []
    for tensor, start in zip(tensors, starts, strict=False):
        copy = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.numel(), offset=first + start)  # a storage of its own
        copies.append(copy.reshape(tensor.shape).copy_(tensor))
    return copies
