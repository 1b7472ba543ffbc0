"""Plain definitions of the networks whose speed is measured. Weights are random, with activations of a sane size.

Speed does not depend on the weights; accuracy is measured elsewhere (python -m probquant demo). EfficientNet-lite0 is the
demo's pretrained network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_bn(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class _Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the block of ResNet."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    layers: list[nn.Module] = [_conv_bn(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if block == 0 and stage > 0 else 1
            if bottleneck:
                body = nn.Sequential(
                    _conv_bn(channels, width, 1, activation=nn.ReLU), _conv_bn(width, width, 3, stride, activation=nn.ReLU), _conv_bn(width, out, 1)
                )
            else:
                body = nn.Sequential(_conv_bn(channels, width, 3, stride, activation=nn.ReLU), _conv_bn(width, out, 3))
            same = stride == 1 and channels == out
            layers.append(_Residual(body, nn.Identity() if same else _conv_bn(channels, out, 1, stride)))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection: the block of MobileNetV2."""

    def __init__(self, i: int, o: int, stride: int, expansion: int):
        super().__init__()
        inner = i * expansion
        expand = [_conv_bn(i, inner, 1, activation=nn.ReLU6)] if expansion > 1 else []
        self.body = nn.Sequential(*expand, _conv_bn(inner, inner, 3, stride, inner, nn.ReLU6), _conv_bn(inner, o, 1))
        self.add = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.add else self.body(x)


def _mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [_conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
    channels = 32
    for expansion, out, repeats, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for block in range(repeats):
            layers.append(_InvertedResidual(channels, out, stride if block == 0 else 1, expansion))
            channels = out
    layers.append(_conv_bn(channels, 1280, 1, activation=nn.ReLU6))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, tokens, width))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps=1e-6), _Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _VisionTransformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int = 12, patch: int = 16, image: int = 224):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def noise_images(count: int, seed: int = 0) -> Tensor:
    """float32 [count, 3, 224, 224]: smooth noise plus fine noise, of unit size, different contrast in every image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(count, 3, 14, 14, generator=generator), size=(224, 224), mode="bilinear")
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    return contrast * (coarse + 0.5 * torch.randn(count, 3, 224, 224, generator=generator))


def _random_weights(model: nn.Module) -> nn.Module:
    """Kaiming weights; the statistics of the batch norms from a forward of noise images."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if isinstance(module, nn.Linear) else "relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over the batches
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.train()
        with torch.no_grad():
            model(noise_images(4))
    return model.eval()


def _efficientnet_lite0() -> nn.Module:
    from probquant.demo import efficientnet_lite0

    return efficientnet_lite0()


#: Networks by name; each call builds one, with input float32 [N, 3, 224, 224] and output [N, 1000].
NETWORKS = {
    "resnet18": lambda: _random_weights(_resnet((2, 2, 2, 2), bottleneck=False)),
    "resnet50": lambda: _random_weights(_resnet((3, 4, 6, 3), bottleneck=True)),
    "mobilenet_v2": lambda: _random_weights(_mobilenet_v2()),
    "efficientnet_lite0": _efficientnet_lite0,
    "vit_s16": lambda: _random_weights(_VisionTransformer(384, 6)),
    "vit_b16": lambda: _random_weights(_VisionTransformer(768, 12)),
}
