"""Small models in the style of the networks that quantize() has to take, with batch-norm statistics as after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, activation=None):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([activation] if activation else []))


class BasicBlock(nn.Module):
    """torchvision's: one ReLU module called twice, the second time behind the residual add."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = conv_bn(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride=1):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_bn(inputs, 4 * width, 1, stride) if stride != 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x):
        return self.relu(self.conv3(self.relu(self.conv2(self.relu(self.conv1(x))))) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2))
        self.layer2 = nn.Sequential(Bottleneck(32, 8), Bottleneck(32, 16, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(64, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride=1, expand=4):
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        layers = [conv_bn(inputs, hidden, 1, activation=nn.ReLU6(inplace=True)), conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6(inplace=True))]
        self.conv = nn.Sequential(*layers, conv_bn(hidden, outputs, 1))

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [InvertedResidual(8, 8), InvertedResidual(8, 16, 2), InvertedResidual(16, 16)]
        self.features = nn.Sequential(conv_bn(3, 8, 3, 2, activation=nn.ReLU6()), *blocks, conv_bn(16, 64, 1, activation=nn.ReLU6()))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1), nn.SiLU()

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.fc2(self.activation(self.fc1(scale)))) * x


class MBConv(nn.Module):
    def __init__(self, inputs, outputs, stride=1, expand=4):
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand, self.depthwise = conv_bn(inputs, hidden, 1, activation=nn.SiLU()), conv_bn(hidden, hidden, 5, stride, hidden, nn.SiLU())
        self.se, self.project = SqueezeExcite(hidden, max(1, inputs // 4)), conv_bn(hidden, outputs, 1)

    def forward(self, x):
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8, 3, 2, activation=nn.SiLU()), MBConv(8, 8), MBConv(8, 16, 2), conv_bn(16, 64, 1, activation=nn.SiLU()))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class InvertedResidualV3(nn.Module):
    """torchvision's block of MobileNetV3: squeeze-and-excitation with a hardsigmoid gate, hardswish."""

    def __init__(self, inputs, outputs, stride=1, expand=4):
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand = conv_bn(inputs, hidden, 1, activation=nn.Hardswish())
        self.depthwise = conv_bn(hidden, hidden, 5, stride, hidden, nn.Hardswish())
        self.avgpool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, hidden // 4, 1), nn.Conv2d(hidden // 4, hidden, 1)
        self.activation, self.scale_activation, self.project = nn.ReLU(), nn.Hardsigmoid(), conv_bn(hidden, outputs, 1)

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(y))))) * y
        return x + self.project(y) if self.residual else self.project(y)


class MobileNetV3(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8, 3, 2, activation=nn.Hardswish()), InvertedResidualV3(8, 8), InvertedResidualV3(8, 16, 2))
        self.last, self.avgpool = conv_bn(16, 64, 1, activation=nn.Hardswish()), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.last(self.features(x))), 1))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width=32, heads=4, patch=8, size=32):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02), nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks, self.norm, self.head = nn.Sequential(Block(width, heads), Block(width, heads)), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class CSP(nn.Module):
    """YOLO's: a split into two branches, joined along the channels, SiLU throughout."""

    def __init__(self, inputs, outputs):
        super().__init__()
        half = outputs // 2
        self.left, self.right = conv_bn(inputs, half, 1, activation=nn.SiLU()), conv_bn(inputs, half, 1, activation=nn.SiLU())
        self.inner = nn.Sequential(conv_bn(half, half, 1, activation=nn.SiLU()), conv_bn(half, half, 3, activation=nn.SiLU()))
        self.out = conv_bn(outputs, outputs, 1, activation=nn.SiLU())

    def forward(self, x):
        left = self.left(x)
        return self.out(torch.cat([left + self.inner(left), self.right(x)], 1))


class YoloBackbone(nn.Module):
    """Convolutions behind F.pad, CSP, a top-down path, an Inception-like block of pools and branches; three outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.stem, self.csp1, self.csp2 = nn.Conv2d(3, 16, 3, 2), CSP(16, 16), CSP(16, 32)
        self.down = conv_bn(16, 16, 3, 2, activation=nn.SiLU())
        self.lateral, self.fuse = conv_bn(32, 16, 1, activation=nn.SiLU()), CSP(32, 16)
        self.branch1, self.branch3 = conv_bn(32, 8, 1, activation=nn.ReLU()), conv_bn(32, 8, 3, activation=nn.ReLU())
        self.branch_pool, self.detect = conv_bn(32, 8, 1, activation=nn.ReLU()), nn.Conv2d(24, 6, 1)

    def forward(self, x):
        x = F.silu(self.stem(F.pad(x, (0, 1, 0, 1))))
        small = self.csp1(x)
        large = self.csp2(self.down(small))
        pooled = self.branch_pool(F.avg_pool2d(large, 3, 1, 1))
        joined = torch.cat([self.branch1(large), self.branch3(large), pooled], 1)
        small = self.fuse(torch.cat([F.interpolate(self.lateral(large), scale_factor=2), small], 1))
        return {"boxes": self.detect(joined), "features": [small, large]}


class TwoHeads(nn.Module):
    """Two inputs, two outputs; one module is called on both inputs."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.details, self.merge = nn.Linear(5, 16), nn.Conv2d(8, 16, 3, 2, 1)
        self.classes, self.box = nn.Linear(32, 7), nn.Sequential(nn.Linear(32, 16), nn.Hardswish(), nn.Linear(16, 4))

    def forward(self, image, meta, scale: float = 1.0):
        x = self.merge(self.shared(image) + self.shared(image.flip(3)))
        x = torch.cat([F.relu(x).mean((2, 3)), torch.sigmoid(self.details(meta))], 1)
        return self.classes(x), self.box(x) * scale


MODELS = {"resnet": ResNet, "mobilenet": MobileNetV2, "efficientnet": EfficientNet, "mobilenetv3": MobileNetV3, "vit": ViT, "yolo": YoloBackbone, "two_heads": TwoHeads}


def build(name: str) -> nn.Module:
    """A model in eval mode with weights and batch-norm statistics that keep activations alive."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    model.train()
    with torch.no_grad():
        for seed in range(8):
            model(*images(name, 16, seed=100 + seed))
    return model.eval()


def images(name: str, count: int, seed: int = 0, size: int = 32) -> tuple[torch.Tensor, ...]:
    """Inputs for a model: smooth images of differing brightness and contrast, and what else it takes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    x = F.interpolate(coarse, (size, size), mode="bicubic") + 0.2 * torch.randn(count, 3, size, size, generator=generator)
    contrast, brightness = (torch.rand(count, 1, 1, 1, generator=generator) for _ in range(2))
    x = x * (0.3 + contrast) + brightness - 0.5
    return (x, torch.randn(count, 5, generator=generator)) if name == "two_heads" else (x,)
