"""Layer shapes: read from CSV files (shapes/*.csv), or written from a network (`python benchmarks/shapes.py resnet50`).

Columns: name, op (conv2d or linear), batch, height, width, in, out (channels), kernel, stride, groups, activation (none, relu, relu6),
scales (image: one per image; token: one per row), count (how often the network has the layer). A linear layer reads
[batch, height, in]: its width is 1. Convolutions are padded by kernel / 2, but those whose stride is their kernel not at all.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("shapes")
COLUMNS = ["name", "op", "batch", "height", "width", "in", "out", "kernel", "stride", "groups", "activation", "scales", "count"]


@dataclass(frozen=True)
class Shape:
    name: str
    op: str
    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str = "none"
    scales: str = "image"
    count: int = 1

    def __post_init__(self):
        for column, value, known in (
            ("op", self.op, ("conv2d", "linear")),
            ("activation", self.activation, ("none", "relu", "relu6")),
            ("scales", self.scales, ("image", "token")),
        ):
            if value not in known:
                raise ValueError(f"shape {self.name!r}: {column} is {value!r}, want one of {', '.join(known)}")
        if self.op == "conv2d" and self.scales != "image":
            raise ValueError(f"shape {self.name!r}: a convolution has a scale for every image")
        if min(self.batch, self.height, self.width, self.in_channels, self.out_channels, self.kernel, self.stride, self.groups) < 1:
            raise ValueError(f"shape {self.name!r}: sizes must be at least 1")

    @property
    def padding(self) -> int:
        return 0 if self.stride == self.kernel else self.kernel // 2

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with padding included."""
        positions = self.batch * self.out_height * self.out_width
        return positions * self.out_channels * self.kernel**2 * (self.in_channels // self.groups)


def read_shapes(path: str | Path) -> list[Shape]:
    """The shapes of a CSV file; `path` may also be the name of one in shapes/, without .csv."""
    path = Path(path)
    if not path.exists():
        path = FOLDER / f"{path.name}.csv"
    if not path.exists():
        raise SystemExit(f"no such file of shapes; there are: {', '.join(sorted(p.stem for p in FOLDER.glob('*.csv')))}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise SystemExit(f"{path.name}: the first line must be {','.join(COLUMNS)}")
        return [
            Shape(row["name"], row["op"], *(int(row[c]) for c in COLUMNS[2:10]), row["activation"], row["scales"], int(row["count"])) for row in reader
        ]


def network_shapes(name: str) -> list[Shape]:
    """The convolutions and linear layers of a network of networks.py at batch 1, equal ones counted."""
    import torch
    from torch import nn

    from networks import NETWORKS

    model = NETWORKS[name]().eval()
    found: Counter[Shape] = Counter()
    modules = dict(model.named_modules())
    followers = activations_behind(model)

    def hook(layer_name):
        def run(module, inputs, output):
            x, activation = inputs[0], followers.get(layer_name, "none")
            if isinstance(module, nn.Conv2d):
                o, i, k, s, g = module.out_channels, module.in_channels, module.kernel_size[0], module.stride[0], module.groups
                kind = "depthwise " if g == i > 1 else ""
                text = f"{kind}{k}x{k}{f' s{s}' if s > 1 else ''} {x.shape[2]}x{x.shape[3]} {i}->{o}{f' {activation}' if activation != 'none' else ''}"
                # Padding that an implementation adds on its own (to get "same" sizes) is counted as padding.
                size = output.shape[2] * s if s < k else x.shape[2]
                found[Shape(text, "conv2d", 1, size, size, i, o, k, s, g, activation)] += 1
            else:
                rows = x.numel() // x.shape[-1]
                scales = "token" if x.dim() > 2 else "image"
                text = f"linear {rows}x{module.out_features}x{module.in_features}"
                found[Shape(text, "linear", 1, rows, 1, module.in_features, module.out_features, activation=activation, scales=scales)] += 1

        return run

    for layer_name, module in modules.items():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook(layer_name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return [Shape(*astuple(shape)[:-1], count) for shape, count in found.items()]


def activations_behind(model) -> dict[str, str]:
    """Layer name -> relu or relu6, for every layer that a ReLU follows (a batch norm or a residual addition between them apart)."""
    from probquant.graph import find_units, trace
    import torch

    result = {}
    for unit in find_units(trace(model, (torch.zeros(2, 3, 224, 224),))):
        bounds = (unit.activation_min, unit.activation_max)
        result[unit.name] = {(0.0, None): "relu", (0.0, 6.0): "relu6"}.get(bounds, "none")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="example: python benchmarks/shapes.py resnet50 > resnet50.csv"
    )
    parser.add_argument("network", help="a network of networks.py")
    args = parser.parse_args()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(shape) for shape in network_shapes(args.network))


if __name__ == "__main__":
    main()
