"""Shifted copies of calibration samples: what a deployed model may meet, made of the model's input alone.

Fixed ranges look as good as predicted ones on data like the calibration data; they fail where the input shifts. So every
calibration sample is also seen once with less contrast, darker, brighter or noisier, in turn. The input's normalization is not
known: its lowest and highest values so far stand for black and white.
"""

from __future__ import annotations

import torch

_CONTRAST, _DARKNESS, _BRIGHTNESS, _NOISE = 0.3, 0.3, 1.7, 0.12
KINDS = 4


class Shifts:
    """Shifts samples of one floating-point input [N, ...]; images are [N, C, H, W]."""

    def __init__(self, example: torch.Tensor):
        """example: some samples, whose lowest and highest value (per channel of an image) bound the shifted ones."""
        dims = (0, 2, 3) if example.dim() == 4 else tuple(range(example.dim()))
        self.low, self.high = example.amin(dims, keepdim=True)[0], example.amax(dims, keepdim=True)[0]

    def __call__(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Samples number, number + 1, ... of the stream; each is shifted by its number and itself alone."""
        return torch.stack([self._shifted(sample, number + i) for i, sample in enumerate(x)])

    def _shifted(self, x: torch.Tensor, number: int) -> torch.Tensor:
        kind = number % KINDS
        if kind == 0:
            mean = x.mean(tuple(range(1, x.dim())) if x.dim() == 3 else None, keepdim=True)
            return mean + _CONTRAST * (x - mean)
        if kind == 1:
            return self.low + _DARKNESS * (x - self.low)
        if kind == 2:
            return (self.low + _BRIGHTNESS * (x - self.low)).minimum(self.high)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(number), dtype=x.dtype)
        return (x + _NOISE * (self.high - self.low) * noise).clamp(self.low, self.high)
