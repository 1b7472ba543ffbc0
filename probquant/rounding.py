"""Second-order rounding of weights: each weight is rounded so as to make up for the rounding of those before it.

GPTQ (Frantar et al., arXiv 2210.17323), after Optimal Brain Surgeon: with H the second moments of a layer's inputs, the error that
rounding makes at the output of one channel is d^T H d for the vector d of its weights' errors. Weights are rounded one after the
other, and the error of each is spread over those still to come, by a Cholesky factor of H's inverse.

H is streamed from calibration, every sample over the signal at the layer's output. The mean of the inputs is taken out of it where bias
correction takes care of the mean error. It is an estimate: off by the more, the fewer positions it was taken from, so the fewer these are for a
channel's weights, the more H is drawn towards a multiple of the identity (as by Ledoit and Wolf, J. Multivar. Anal. 88, 2004), for which
rounding is to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LARGEST = 2400  # weights per output for which H is kept (23 MB in float32); beyond, weights are rounded to nearest
_POSITIONS = 256  # of an image, evenly spaced, that count: they overlap and resemble each other
_BLOCK = 64  # weights of a channel whose errors are spread together: the paper's lazy batches
_DAMPING = 0.01  # of H's mean diagonal, added to it: the paper's; and as much as there are weights for each position that H was taken from (fit)


class RoundingFit:
    """Codes of one layer's weight, of shape [O, kh, kw, I / groups] or [O, K], fitted to its inputs."""

    def __init__(self, weight_shape: Sequence[int], options: dict, centred: bool):
        """options: of a conv2d unit. centred: whether mean errors are corrected elsewhere."""
        self.kernel = tuple(weight_shape[1:3]) if len(weight_shape) == 4 else (1, 1)
        self.options, self.groups, self.centred = options, options["groups"], centred
        size = self.kernel[0] * self.kernel[1] * weight_shape[-1]
        self.moments = torch.zeros(self.groups, size, size)
        self.sums = torch.zeros(self.groups, size)
        self.count, self.positions = 0.0, 0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """x: the layer's float input, [N, C, H, W] of a convolution or [N, ..., K]; weights: surrogates.sample_weights() of its output."""
        if self.options.keys() >= {"stride", "padding", "dilation"} and x.dim() == 4:
            top, bottom, left, right = self.options["padding"]
            x = torch.nn.functional.pad(x, (left, right, top, bottom))
            fields = x.flatten(2)[:, :, self._field_positions(*x.shape[2:])]  # [N, C, taps, positions]
            count = fields.shape[3]
            self._add(fields.permute(1, 2, 0, 3).reshape(self.groups, -1, fields.shape[0] * count), weights.repeat_interleave(count))
        else:
            self._add(x.reshape(1, -1, x.shape[-1]).mT, weights.repeat_interleave(x.shape[1:-1].numel()))

    def _field_positions(self, height: int, width: int) -> torch.Tensor:
        """[taps, positions]: where in a padded image of this size the receptive fields that count have their values."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.options["stride"], self.options["dilation"]
        across = (width - dw * (kw - 1) - 1) // sw + 1
        count = ((height - dh * (kh - 1) - 1) // sh + 1) * across
        at = torch.arange(0, count, max(1, count // _POSITIONS))
        taps = (torch.arange(kh)[:, None] * dh * width + torch.arange(kw) * dw).reshape(-1, 1)
        return taps + at // across * sh * width + at % across * sw

    def _add(self, fields: torch.Tensor, weights: torch.Tensor) -> None:
        """fields: [groups, K, positions]; weights: [positions]"""
        weighed = fields * weights.to(fields)
        self.moments += weighed @ fields.mT
        self.sums += weighed.sum(2)
        self.count += float(weights.sum())
        self.positions += len(weights)

    def fit(self, weight: torch.Tensor, scale: torch.Tensor, profile: torch.Tensor | None = None) -> torch.Tensor:
        """int8 codes in [-127, 127], for the float weight and its scale [O]; profile [C]: what the weight's inputs are divided by."""
        if weight.dim() == 4:
            weight = weight.permute(0, 3, 1, 2)  # unfold's order
        shape = weight.shape
        w = weight.double().reshape(self.groups, shape[0] // self.groups, -1) / scale.double().reshape(self.groups, -1, 1)
        mean = self.sums.double() / (self.count or 1.0)
        h = self.moments.double() / (self.count or 1.0)
        if self.centred:
            h -= mean[:, :, None] * mean[:, None, :]
        if profile is not None:
            over = profile.double().reshape(self.groups, -1).repeat_interleave(self.kernel[0] * self.kernel[1], 1)
            h /= over[:, :, None] * over[:, None, :]
        diagonal = h.diagonal(dim1=1, dim2=2)
        order = diagonal.argsort(dim=1, descending=True)  # the weights that matter most are rounded first
        ridge = diagonal.mean(1).clamp(min=1e-30)[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)  # so an input that is always 0 does no harm
        h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
        w = w.gather(2, order[:, None, :].expand_as(w))
        damping = _DAMPING + h.shape[1] / max(self.positions, 1)  # what makes up for errors on few positions need not on others
        factor = torch.linalg.cholesky(torch.cholesky_inverse(_damped_cholesky(h, ridge, damping)), upper=True)
        codes = torch.empty_like(w)
        for begin in range(0, w.shape[2], _BLOCK):  # within a block at once, beyond it by one product of matrices
            end = min(begin + _BLOCK, w.shape[2])
            errors = torch.empty_like(w[:, :, begin:end])
            for i in range(begin, end):
                codes[:, :, i] = w[:, :, i].round().clamp(-127, 127)
                errors[:, :, i - begin] = error = (w[:, :, i] - codes[:, :, i]) / factor[:, None, i, i]
                w[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
            w[:, :, end:] -= errors @ factor[:, begin:end, end:]
        codes = torch.empty_like(codes).scatter_(2, order[:, None, :].expand_as(codes), codes).reshape(shape)
        return (codes.permute(0, 2, 3, 1) if len(shape) == 4 else codes).contiguous().to(torch.int8)


def _damped_cholesky(h: torch.Tensor, ridge: torch.Tensor, damping: float) -> torch.Tensor:
    """Of h + damping * ridge, or with as much more as rounding errors in h ask for."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(h + damping * ridge)
        if not failed.any():
            return factor
        damping *= 10
