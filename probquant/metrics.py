"""How far a network's outputs are from float32's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_DB = 138.5  # 2 ** -46, the square of float32's resolution: no SQNR is told beyond it


def sqnr(reference: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantization noise ratio of each image in dB, ``float64`` [N]; both arguments are [N, ...], same shape.

    10 log10(sum reference^2 / sum (approximation - reference)^2), within +-138.5 dB (what float32 can resolve); a noise
    that is not finite counts as the largest. NaN where the reference is all zero: there is no signal to compare with.
    """
    if reference.shape != approximation.shape:
        raise ValueError(f"shapes differ: reference {tuple(reference.shape)}, approximation {tuple(approximation.shape)}")
    reference, approximation = (x.reshape(len(x), math.prod(x.shape[1:])).float() for x in (reference, approximation))
    signal = reference.square().sum(1, dtype=torch.float64)
    noise = (approximation - reference).square().sum(1, dtype=torch.float64).nan_to_num(nan=math.inf)
    decibels = 10 * torch.log10(signal / noise)
    return decibels.clamp(-_MAX_DB, _MAX_DB).where(signal > 0, torch.nan)


def outputs_of(output) -> list[Tensor]:
    """All tensors of a model's output, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [tensor for part in output for tensor in outputs_of(part)]


def float_outputs(output) -> list[Tensor]:
    """Those of a model's output tensors that are floating-point."""
    return [tensor for tensor in outputs_of(output) if tensor.is_floating_point()]


def joined_outputs(output) -> Tensor:
    """All of a model's outputs as one float32 tensor [N, values]."""
    tensors = outputs_of(output)
    return torch.cat([tensor.reshape(len(tensors[0]), -1).float() for tensor in tensors], dim=1)
