"""How far a network's outputs are from float32's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
    """All tensors of a model's output, in a fixed order; what else is in it (None, numbers, strings) is left out."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def float_outputs(output, images: int) -> list[Tensor]:
    """Those of a model's output tensors that are floating-point and have one row per image: anchors and parameters do not depend on the input."""
    return [tensor for tensor in outputs_of(output) if tensor.is_floating_point() and tensor.dim() and len(tensor) == images]


def joined_outputs(output, images: int, most: int | None = None) -> Tensor:
    """All of a model's float_outputs() as one float32 tensor [images, values]; of each at most `most` values per image, evenly spaced."""

    def rows(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape(images, math.prod(tensor.shape[1:]))
        count = tensor.shape[1]
        return (tensor if most is None or count <= most else tensor[:, torch.arange(most, device=tensor.device) * count // most]).float()

    tensors = float_outputs(output, images)
    return torch.cat([rows(tensor) for tensor in tensors], dim=1) if tensors else torch.empty(images, 0)
