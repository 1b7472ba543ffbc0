"""folding.py: a traced graph computes what the model did, and what was folded runs in int8."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import probquant as pq
from probquant.compare import sqnr
from probquant.graph import trace


class Net(nn.Module):
    """A stem, whatever `body` makes of its 16 channels, and a head."""

    def __init__(self, body: nn.Module, channels: int = 16):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3, 2, 1), body, nn.Conv2d(channels, 8, 3)

    def forward(self, x):
        return self.head(self.body(F.relu(self.stem(x))))


class Dense(nn.Module):
    """A batch norm behind a concatenation (arXiv 1608.06993)."""

    def __init__(self):
        super().__init__()
        self.grow, self.norm = nn.Conv2d(16, 8, 3, 1, 1), nn.BatchNorm2d(24)

    def forward(self, x):
        return F.relu(self.norm(torch.cat([x, self.grow(x)], 1)))


class Split(nn.Module):
    """A convolution whose halves go different ways, as in YOLOv8's C2f. how: by chunk, split or slices."""

    def __init__(self, how):
        super().__init__()
        self.enter, self.norm, self.step, self.how = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Conv2d(16, 16, 3, 1, 1), how

    def forward(self, x):
        a, b = self.how(F.silu(self.norm(self.enter(x))))
        return torch.cat([a, b, b + self.step(b)], 1)


class Ghost(nn.Module):
    """A slice that takes all that there is, one that does not, and its rest that goes unread."""

    def __init__(self):
        super().__init__()
        self.step, self.wide = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 40, 1)

    def forward(self, x):
        return torch.cat([x, self.step(x)], 1)[:, :32] + self.wide(x)[:, :32]


class Added(nn.Module):
    """An addition in place, to a slice that takes all that there is: GhostNet's residual."""

    def __init__(self):
        super().__init__()
        self.step = nn.Conv2d(16, 16, 3, 1, 1)

    def forward(self, x):
        y = torch.cat([x, self.step(x)], 1)[:, :32]
        y += torch.cat([x, x], 1)
        return F.relu(y)


class ConvNeXt(nn.Module):
    """A block of arXiv 2201.03545: channels are last within it, its scale stands behind the permute."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Conv2d(16, 16, 7, 1, 3, groups=16), nn.LayerNorm(16)
        self.grow, self.shrink, self.gamma = nn.Linear(16, 64), nn.Linear(64, 16), nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        rows = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + self.gamma * self.shrink(F.gelu(self.grow(rows))).permute(0, 3, 1, 2)


class JoinedBias(nn.Module):
    """BEiT's: a query and a value have biases, a key has none (arXiv 2106.08254)."""

    def __init__(self):
        super().__init__()
        self.weight, self.query, self.value = (nn.Parameter(torch.randn(shape) / 4) for shape in ((48, 16), (16,), (16,)))
        self.register_buffer("key", torch.zeros(16), persistent=False)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        y = F.linear(rows, self.weight, torch.cat([self.query, self.key, self.value]))
        return y.transpose(1, 2).reshape(x.shape[0], 48, x.shape[2], x.shape[3])


class PositionBias(nn.Module):
    """What a small network makes of constants alone (arXiv 2111.09883), a convolution of a parameter among it."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 16))
        self.prior, self.conv = nn.Parameter(torch.randn(1, 4, 8, 8)), nn.Conv2d(4, 16, 3, 1, 1)

    def forward(self, x):
        axis = torch.linspace(-1, 1, 8)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        return x + self.mlp(grid).permute(2, 0, 1) + self.conv(self.prior)


FOLDED = {
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, 1, 1)), 16, {"stem", "body", "head"}),
    "norm behind a concatenation": (Dense, 24, {"stem", "body.grow", "body.norm", "head"}),
    "norm behind a pool": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(16, affine=False), nn.ReLU()), 16, {"stem", "body.1", "head"}),
    "chunks": (lambda: Split(lambda y: y.chunk(2, 1)), 48, {"stem", "body.enter.channels_0_16", "body.enter.channels_16_32", "body.step", "head"}),
    "splits": (lambda: Split(lambda y: y.split([16, 16], 1)), 48, {"stem", "body.enter.channels_0_16", "body.enter.channels_16_32", "body.step", "head"}),
    "slices": (lambda: Split(lambda y: (y[:, :-16], y[:, 16:])), 48, {"stem", "body.enter.channels_0_16", "body.enter.channels_16_32", "body.step", "head"}),
    "a slice of everything": (Ghost, 32, {"stem", "body.step", "body.wide", "head"}),
    "an addition to a slice of everything": (Added, 32, {"stem", "body.step", "head"}),
    "a scale behind a permute": (ConvNeXt, 16, {"stem", "body.mix", "body.grow", "body.shrink", "head"}),
    "a joined bias": (JoinedBias, 48, {"stem", "body", "head"}),
}


def network(name):
    torch.manual_seed(0)
    make, channels, _ = FOLDED[name]
    model = Net(make(), channels).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_folding(name):
    model, wanted = network(name), FOLDED[name][2]
    x = torch.randn(6, 3, 16, 16)
    traced = trace(model, (x,))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(traced(x), expected, atol=1e-5, rtol=1e-4)
        qmodel = pq.quantize(model, [x], surrogate="gaussian", progress=False)
        assert float(sqnr(expected, qmodel(x)).mean()) > 28
    assert {layer.name for layer in qmodel.layers if layer.int8} >= wanted, str(qmodel.summary())
    assert {layer.name for layer in qmodel.layers if layer.kind in ("conv2d", "linear")} == wanted, str(qmodel.summary())


def test_no_float_island_is_left():
    for name in ("norm behind a concatenation", "norm behind a pool", "chunks", "slices", "an addition to a slice of everything"):
        qmodel = pq.quantize(network(name), [torch.randn(4, 3, 16, 16)], surrogate="gaussian", progress=False)
        assert not [node for node in qmodel.graph.nodes if str(node.target).startswith("aten.")], name


def test_a_scale_behind_a_permute_goes_into_the_layer():
    traced = trace(network("a scale behind a permute"), (torch.randn(4, 3, 16, 16),))
    assert not [node for node in traced.graph.nodes if node.target is torch.ops.aten.mul.Tensor]


def test_constants_are_computed_once():
    torch.manual_seed(0)
    model, x = Net(PositionBias()).eval(), torch.randn(4, 3, 16, 16)
    qmodel = pq.quantize(model, [x], progress=False)
    with torch.no_grad():
        assert float(sqnr(model(x), qmodel(x)).mean()) > 28
    assert {layer.name for layer in qmodel.layers if layer.kind in ("conv2d", "linear")} == {"stem", "head"}
    assert not [node for node in qmodel.graph.nodes if node.target in (torch.ops.aten.linspace.default, torch.ops.aten.linear.default)]


class Overlapping(nn.Module):
    """Split() where parts overlap, or begin before the first channel."""

    def __init__(self, first, second):
        super().__init__()
        self.enter, self.first, self.second = nn.Conv2d(16, 32, 1), first, second

    def forward(self, x):
        y = self.enter(x)
        return torch.cat([y[:, self.first], F.relu(y[:, self.second])], 1)


@pytest.mark.parametrize("first, second, layers", [(slice(None, 24), slice(8, None), 3), (slice(-50, 16), slice(16, None), 4)])
def test_parts_are_what_slices_are(first, second, layers):
    torch.manual_seed(0)
    model, x = Net(Overlapping(first, second), 48 if layers == 3 else 32).eval(), torch.randn(4, 3, 16, 16)
    traced = trace(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-4)
    assert sum(node.target is torch.ops.aten.conv2d.default for node in traced.graph.nodes) == layers


def test_a_norm_behind_a_linear_layer_may_be_of_its_rows():
    """BatchNorm1d of [N, L, C] has L channels, the layer in front of it has C."""
    torch.manual_seed(0)
    for model, x in ((nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(5)), torch.randn(4, 5, 16)), (nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12)), torch.randn(4, 16))):
        model[1].running_var.uniform_(0.5, 2)
        traced = trace(model.eval(), (x,))
        with torch.no_grad():
            torch.testing.assert_close(traced(x), model(x))


def test_a_buffer_that_the_model_writes_is_no_constant():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.conv(x) * (self.calls + 1)

    x = torch.randn(2, 3, 8, 8)
    traced = trace(Counting().eval(), (x,))
    with torch.no_grad():
        first, second = traced(x), traced(x)
    torch.testing.assert_close(second * 2, first * 3)


def test_a_lone_norm_in_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)).eval().bfloat16()
    model[2].float()
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    traced = trace(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), atol=0.05, rtol=0.05)


def test_what_differs_from_call_to_call_is_no_constant():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(16, 1, 1)

    x = torch.randn(2, 3, 16, 16)
    traced = trace(Net(Noisy()).eval(), (x,))
    with torch.no_grad():
        assert not torch.equal(traced(x), traced(x))


def test_a_norm_of_the_networks_input_stays():
    """As a layer it would round the picture a second time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    qmodel = pq.quantize(model, [torch.randn(4, 3, 16, 16)], progress=False)
    assert [layer.name for layer in qmodel.layers] == ["1", "3"]


def test_all_parts_of_a_layer_go_by_its_name():
    qmodel = pq.quantize(network("chunks"), [torch.randn(4, 3, 16, 16)], surrogate="gaussian", exclude=["body.enter"], progress=False)
    assert {layer.name for layer in qmodel.layers if layer.reason == "excluded by the caller"} == {"body.enter.channels_0_16", "body.enter.channels_16_32"}
