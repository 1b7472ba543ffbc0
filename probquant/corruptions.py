"""Shifts of the input that a deployed network meets: less contrast, darkness, sensor noise.

Contrast and noise follow ImageNet-C (Hendrycks and Dietterich, 2019), severities 1 to 5. They act on images before
normalization: ``uint8``, or ``float32`` in [0, 1]; [N, C, H, W] or [C, H, W]. The result has the same shape and dtype.
What an image becomes depends on that image and the seed alone, never on its neighbours in a batch.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor on the distance to the channel's mean, severities 1..5
DARKNESS = (0.5, 0.35, 0.25, 0.15, 0.1)  # factor on every pixel
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, pixels in [0, 1]


def contrast(images: Tensor, severity: int = 3) -> Tensor:
    """Pull every pixel towards its image's mean, per channel."""
    pixels = _pixels(images)
    mean = pixels.mean(dim=(-2, -1), keepdim=True)
    return _like(images, (pixels - mean) * _strength(CONTRAST, severity) + mean)


def dark(images: Tensor, severity: int = 3) -> Tensor:
    """Scale every pixel down, as with too little light."""
    return _like(images, _pixels(images) * _strength(DARKNESS, severity))


def noise(images: Tensor, severity: int = 3, seed: int = 0) -> Tensor:
    """Add Gaussian noise. Its generator is seeded with ``seed`` and the image's own pixels."""
    pixels = _pixels(images)
    sigma = _strength(NOISE, severity)
    noisy = torch.empty_like(pixels)
    for image, target in zip(*(x if x.dim() == 4 else x.unsqueeze(0) for x in (pixels, noisy))):
        generator = torch.Generator().manual_seed(zlib.crc32(image.contiguous().numpy().tobytes(), seed))
        target.copy_(image + sigma * torch.randn(image.shape, generator=generator))
    return _like(images, noisy)


CORRUPTIONS = {"contrast": contrast, "dark": dark, "noise": noise}


def corrupt(images: Tensor, kind: str, severity: int = 3) -> Tensor:
    """Apply the corruption named ``kind`` (a key of ``CORRUPTIONS``); "clean" returns the images as they are."""
    if kind == "clean":
        return images
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; there are clean, {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[kind](images, severity)


def _strength(table: tuple[float, ...], severity: int) -> float:
    if severity not in range(1, len(table) + 1):
        raise ValueError(f"severity must be 1..{len(table)}, got {severity!r}")
    return table[severity - 1]


def _pixels(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    if images.dtype != torch.float32:
        raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
    return images


def _like(images: Tensor, pixels: Tensor) -> Tensor:
    pixels = pixels.clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else pixels
