"""Shifts of the input that a deployed network meets: light, contrast, noise, blur, fog, compression, low resolution.

They follow ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) with its constants for 224 x 224 pixels, severities 1 to
5, but for `dark`, which ImageNet-C lacks, and the clouds of the fog, which are sums of random grids here instead of a
diamond-square fractal. They act on images before normalization: ``uint8``, or ``float32`` in [0, 1]; [N, C, H, W] or
[C, H, W]. The result has the same shape and dtype. What an image becomes depends on that image and the seed alone, never
on its neighbours in a batch.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

#: What each severity, 1 to 5, means.
STRENGTHS: dict[str, tuple] = {
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor on the distance to the channel's mean
    "dark": (0.5, 0.4, 0.3, 0.2, 0.1),  # factor on every pixel
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value (HSV)
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot": (60, 25, 12, 5, 3),  # photons of a white pixel
    "blur": (1, 2, 3, 4, 6),  # sigma of the Gaussian in pixels
    "fog": ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),  # thickness, decay of the clouds' finer grids
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # factor on the resolution
}


def _contrast(image: Tensor, factor: float, generator: Generator) -> Tensor:
    mean = image.mean(dim=(1, 2), keepdim=True)
    return (image - mean) * factor + mean


def _dark(image: Tensor, factor: float, generator: Generator) -> Tensor:
    return image * factor


def _brightness(image: Tensor, added: float, generator: Generator) -> Tensor:
    value = image.amax(0, keepdim=True)
    wanted = (value + added).clamp(max=1)
    return torch.where(value > 0, image * (wanted / value), wanted)  # hue and saturation stay


def _noise(image: Tensor, sigma: float, generator: Generator) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=generator)


def _shot(image: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson(image * photons, generator=generator) / photons


def _blur(image: Tensor, sigma: float, generator: Generator) -> Tensor:
    radius = 4 * sigma
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(len(image), 1, 1, -1)
    x = F.pad(image[None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel, groups=len(image)), kernel.transpose(2, 3), groups=len(image))[0]


def _fog(image: Tensor, thickness_and_decay: tuple[float, float], generator: Generator) -> Tensor:
    thickness, decay = thickness_and_decay
    size = image.shape[1:]
    clouds = torch.zeros(1, 1, *size)
    for octave in range(1, max(2, math.ceil(math.log2(max(size))))):
        grid = torch.rand(1, 1, 2**octave, 2**octave, generator=generator) / decay**octave
        clouds += F.interpolate(grid, size, mode="bilinear", align_corners=True)
    clouds = (clouds - clouds.min()) / (clouds.max() - clouds.min()).clamp(min=1e-6)
    brightest = image.max()
    return (image + thickness * clouds[0]) * brightest / (brightest + thickness)


def _jpeg(image: Tensor, quality: int, generator: Generator) -> Tensor:
    import numpy as np
    from PIL import Image

    if len(image) != 3:
        raise ValueError(f"jpeg wants images of 3 channels, got {len(image)}")
    pixels, file = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


def _pixelate(image: Tensor, factor: float, generator: Generator) -> Tensor:
    small = [max(1, int(side * factor)) for side in image.shape[1:]]
    return F.interpolate(F.interpolate(image[None], small, mode="area"), image.shape[1:], mode="nearest")[0]


#: Every corruption by its name: (image float32 [C, H, W] in [0, 1], strength, generator) -> the same, not yet clamped to [0, 1].
CORRUPTIONS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "contrast": _contrast, "dark": _dark, "brightness": _brightness, "noise": _noise, "shot": _shot, "blur": _blur, "fog": _fog,
    "jpeg": _jpeg, "pixelate": _pixelate,
}  # fmt: skip


def corrupt(images: Tensor, kind: str, severity: int = 3, seed: int = 0) -> Tensor:
    """Applies the corruption named ``kind`` (a key of ``CORRUPTIONS``); "clean" returns the images as they are.

    severity: 1 to 5 (``STRENGTHS``). seed: what is random depends on it and on the image's own pixels.
    Raises ValueError for another kind or severity, TypeError for images of another dtype.
    """
    if kind == "clean":
        return images
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; there are clean, {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1..5, got {severity!r}")
    if images.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
    as_codes = images.dtype == torch.uint8
    result = torch.empty_like(images)
    for image, target in zip(*(x if x.dim() == 4 else x.unsqueeze(0) for x in (images, result)), strict=True):
        pixels = (image.float() / 255 if as_codes else image).contiguous()
        generator = torch.Generator().manual_seed(zlib.crc32(pixels.numpy().tobytes(), seed))
        pixels = CORRUPTIONS[kind](pixels, STRENGTHS[kind][severity - 1], generator).clamp(0, 1)
        target.copy_((pixels * 255).round() if as_codes else pixels)
    return result
