"""ResNet-20 for CIFAR-10 (arXiv 1512.03385, section 4.2) in plain torch, for the weights of akamaster/pytorch_resnet_cifar10."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.stride = stride
        # Shortcut "A": every second pixel, zeros for the new channels. Written as the 1x1 convolution that it is, it runs in int8.
        selection = F.pad(torch.eye(i), (0, 0, (o - i) // 2, (o - i) // 2)).reshape(o, i, 1, 1)
        self.register_buffer("selection", selection if stride > 1 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.selection is None else F.conv2d(x, self.selection, stride=self.stride)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """float32 [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (i, o) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            setattr(self, f"layer{number}", nn.Sequential(Block(i, o, 1 + (i != o)), Block(o, o, 1), Block(o, o, 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet20(weights: str | Path) -> nn.Module:
    """The network in eval mode with the weights of a checkpoint of akamaster/pytorch_resnet_cifar10."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()
