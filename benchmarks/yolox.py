"""YOLOX-nano (arXiv 2107.08430) in plain torch, with the weights of an ONNX file, and what turns its output into boxes.

Written from the paper's figures and the ONNX graph. Batch norms are folded already in the file, so a convolution has a bias
and no norm. Boxes are (left, top, right, bottom) in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 416  # pixels of the side of the network's input
PADDING = 114  # value of the pixels beside a picture that is not square
STRIDES = (8, 16, 32)  # pixels of the input per cell of an output level
CLASSES = 80


class Conv(nn.Sequential):
    """Convolution and SiLU."""

    def __init__(self, i: int, o: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups), nn.SiLU())


class Separable(nn.Sequential):
    """Depthwise 3x3, then 1x1."""

    def __init__(self, i: int, o: int, stride: int = 1):
        super().__init__(Conv(i, i, 3, stride, i), Conv(i, o, 1))


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool):
        super().__init__()
        self.reduce, self.conv, self.shortcut = Conv(width, width, 1), Separable(width, width), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.reduce(x))
        return y + x if self.shortcut else y


class CSP(nn.Module):
    """Two 1x1 branches, bottlenecks in one of them, joined by a third 1x1."""

    def __init__(self, i: int, o: int, depth: int, shortcut: bool):
        super().__init__()
        self.left, self.right = Conv(i, o // 2, 1), Conv(i, o // 2, 1)
        self.blocks = nn.Sequential(*(Bottleneck(o // 2, shortcut) for _ in range(depth)))
        self.join = Conv(o, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.join(torch.cat([self.blocks(left), right], 1))


class Focus(nn.Module):
    """Four pixels of a 2 x 2 block become channels."""

    def __init__(self, o: int):
        super().__init__()
        self.conv = Conv(12, o, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(corners, 1))


class PyramidPooling(nn.Module):
    """Max pools of 5, 9 and 13 beside the input itself."""

    def __init__(self, width: int):
        super().__init__()
        self.reduce, self.join = Conv(width, width // 2, 1), Conv(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return self.join(torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], 1))


class Head(nn.Module):
    """Of one level: box (4), objectness and class scores (sigmoid), [N, 85, H, W]."""

    def __init__(self, i: int, width: int):
        super().__init__()
        self.stem = Conv(i, width, 1)
        self.class_branch = nn.Sequential(Separable(width, width), Separable(width, width))
        self.classes = nn.Conv2d(width, CLASSES, 1)
        self.box_branch = nn.Sequential(Separable(width, width), Separable(width, width))
        self.box, self.objectness = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        classes, boxes = self.classes(self.class_branch(x)), self.box_branch(x)
        return torch.cat([self.box(boxes), self.objectness(boxes).sigmoid(), classes.sigmoid()], 1)


class YoloxNano(nn.Module):
    """float32 [N, 3, 416, 416], BGR in 0..255, to [N, 3549, 85] (:func:`decode`). Modules stand in the order they run in."""

    def __init__(self):
        super().__init__()
        self.focus = Focus(16)
        self.dark2 = nn.Sequential(Separable(16, 32, 2), CSP(32, 32, 1, True))
        self.dark3 = nn.Sequential(Separable(32, 64, 2), CSP(64, 64, 3, True))
        self.dark4 = nn.Sequential(Separable(64, 128, 2), CSP(128, 128, 3, True))
        self.dark5 = nn.Sequential(Separable(128, 256, 2), PyramidPooling(256), CSP(256, 256, 1, False))
        self.lateral5, self.top_down4 = Conv(256, 128, 1), CSP(256, 128, 1, False)
        self.lateral4, self.top_down3 = Conv(128, 64, 1), CSP(128, 64, 1, False)
        self.down3, self.bottom_up4 = Separable(64, 64, 2), CSP(128, 128, 1, False)
        self.down4, self.bottom_up5 = Separable(128, 128, 2), CSP(256, 256, 1, False)
        self.heads = nn.ModuleList(Head(i, 64) for i in (64, 128, 256))

    def forward(self, x: Tensor) -> Tensor:
        dark3 = self.dark3(self.dark2(self.focus(x)))
        dark4 = self.dark4(dark3)
        lateral5 = self.lateral5(self.dark5(dark4))
        lateral4 = self.lateral4(self.top_down4(torch.cat([F.interpolate(lateral5, scale_factor=2), dark4], 1)))
        level3 = self.top_down3(torch.cat([F.interpolate(lateral4, scale_factor=2), dark3], 1))
        level4 = self.bottom_up4(torch.cat([self.down3(level3), lateral4], 1))
        level5 = self.bottom_up5(torch.cat([self.down4(level4), lateral5], 1))
        levels = (head(level) for head, level in zip(self.heads, (level3, level4, level5), strict=True))
        return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


def yolox_nano(weights: str | Path) -> nn.Module:
    """The network in eval mode with the weights of an ONNX file, whose convolutions run in the same order.

    Raises ValueError if the file holds another network.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(weights)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    stored = [node.input for node in graph.node if node.op_type == "Conv"]
    model = YoloxNano()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(stored) != len(layers):
        raise ValueError(f"{Path(weights).name} has {len(stored)} convolutions, YOLOX-nano has {len(layers)}")
    for number, (layer, (_, *names)) in enumerate(zip(layers, stored, strict=True)):
        values = [torch.from_numpy(numpy_helper.to_array(tensors[name]).copy()) for name in names]
        shapes, wanted = [list(value.shape) for value in values], [list(layer.weight.shape), list(layer.bias.shape)]
        if shapes != wanted:
            raise ValueError(f"{Path(weights).name}: convolution {number} has weight and bias {shapes}, YOLOX-nano {wanted}")
        layer.weight.data, layer.bias.data = values
    return model.eval()


def prepare(picture: Tensor) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, 416, 416]."""
    return letterbox(picture)[0]


def factors(width: int, height: int) -> tuple[float, float]:
    """By what a picture of this size is scaled, horizontally and vertically."""
    return (min(SIZE / width, SIZE / height),) * 2


def categories(listed: list[int]) -> list[int]:
    """The category of every class, from those that the annotations list."""
    return sorted(listed)


def letterbox(picture: Tensor, size: int = SIZE) -> tuple[Tensor, float]:
    """uint8 [3, H, W] to (uint8 [3, size, size], factor): the picture at the top left, bilinear, padded with 114."""
    height, width = picture.shape[1:]
    factor = min(size / height, size / width)
    fitted = (int(height * factor), int(width * factor))
    resized = F.interpolate(picture[None].float(), fitted, mode="bilinear")[0].round().to(torch.uint8)
    canvas = torch.full((3, size, size), PADDING, dtype=torch.uint8)
    canvas[:, : fitted[0], : fitted[1]] = resized
    return canvas, factor


def network_input(pictures: Tensor) -> Tensor:
    """uint8 RGB [N, 3, H, W] to what the network takes."""
    return pictures.flip(1).float()


def decode(output: Tensor, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """The network's output [N, cells, 85] to (boxes [N, cells, 4], scores [N, cells, 80])."""
    corners, strides = [], []
    for stride in STRIDES:
        y, x = torch.meshgrid(*[torch.arange(size // stride)] * 2, indexing="ij")
        corners.append(torch.stack([x, y], 2).reshape(-1, 2))
        strides.append(torch.full((x.numel(), 1), stride))
    corner, stride = torch.cat(corners), torch.cat(strides)
    centre, extent = (output[..., :2] + corner) * stride, output[..., 2:4].exp() * stride
    return torch.cat([centre - extent / 2, centre + extent / 2], -1), output[..., 4:5] * output[..., 5:]


def non_maximum_suppression(boxes: Tensor, scores: Tensor, threshold: float = 0.001, overlap: float = 0.65, limit: int = 100):
    """(boxes [n, 4], scores [n], classes [n]) of one image, best first, at most `limit`; boxes [cells, 4], scores [cells, 80].

    Every class of a cell above `threshold` is a candidate, the best 1000 of an image count; of candidates of one class that
    overlap by more than `overlap` (intersection over union) the best stays.
    """
    cells, classes = (scores > threshold).nonzero(as_tuple=True)
    found = scores[cells, classes]
    order = found.argsort(descending=True, stable=True)[:1000]
    boxes, found, classes = boxes[cells[order]], found[order], classes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    shared = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(boxes[:, None, :2], boxes[None, :, :2])).clamp(min=0).prod(2)
    suppresses = (shared > overlap * (areas[:, None] + areas[None] - shared)) & (classes[:, None] == classes[None])
    alive, kept = torch.ones(len(boxes), dtype=torch.bool), []
    for i in range(len(boxes)):
        if alive[i] and len(kept) < limit:
            kept.append(i)
            alive &= ~suppresses[i]
    return boxes[kept], found[kept], classes[kept]


def detections(output: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(boxes, scores, classes) of every picture, of the network's output."""
    for boxes, scores in zip(*decode(output), strict=True):
        yield non_maximum_suppression(boxes, scores)
