"""Channel profiles: which tensors can have one, that the network stays what it computes, and when one is chosen."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probquant as pq
from probquant import profiles
from probquant.compare import sqnr
from probquant.graph import choose_int8, find_units, trace
from probquant.influence import Look, Seen
from probquant.profiles import Component, find_components


class Net(nn.Module):
    """Two branches whose function joins them, and a layer that reads the result."""

    def __init__(self, function, channels: int = 8, features: int = 8):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 1), nn.Conv2d(8, channels, 1)
        self.last, self.function = nn.Conv2d(features, 5, 1), function

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(self.function(self.left(x), self.right(x)))


def net(function, **sizes) -> Net:
    torch.manual_seed(0)
    return Net(function, **sizes).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def components(model: nn.Module) -> list[Component]:
    units = find_units(trace(model, (images(2),)))
    choose_int8(units, lambda name: True)
    return find_components(units)


def uneven(model: Net) -> Net:
    """Channels that the branches write 1 to 64 times as large; the layer behind divides, so they matter as much."""
    with torch.no_grad():
        factors = 2.0 ** torch.linspace(0, 6, model.left.out_channels)
        for branch in (model.left, model.right):
            branch.weight *= factors.reshape(-1, 1, 1, 1)
            branch.bias *= factors
        repeats = model.last.in_channels // len(factors)
        model.last.weight /= factors.repeat(repeats).reshape(1, -1, 1, 1)
    return model


def sum_and_part(a, b):
    return torch.cat([a + b, b], 1)


# What joins the branches: (function, features that it gives for 8 channels)
JOINED = {
    "silu": (lambda a, b: F.silu(a), 8),
    "gelu": (lambda a, b: F.gelu(a), 8),
    "hardswish": (lambda a, b: F.hardswish(a), 8),
    "relu6": (lambda a, b: F.relu6(a), 8),
    "add": (lambda a, b: F.silu(a) + F.silu(b), 8),
    "relu behind add": (lambda a, b: F.relu(a + b), 8),
    "product": (lambda a, b: F.silu(a) * F.sigmoid(b), 8),
    "gate": (lambda a, b: F.silu(a) * F.sigmoid(b).mean((2, 3), keepdim=True), 8),
    "concat": (lambda a, b: torch.cat([F.silu(a), F.silu(b)], 1), 16),
    "concat of a sum": (lambda a, b: sum_and_part(F.silu(a), F.silu(b)), 16),
    "max pool": (lambda a, b: F.max_pool2d(F.silu(a), 2), 8),
    "average pool": (lambda a, b: F.avg_pool2d(F.silu(a), 2), 8),
    "upsample": (lambda a, b: F.interpolate(F.silu(a), scale_factor=2, mode="nearest"), 8),
    "upsampled concat": (lambda a, b: torch.cat([F.interpolate(F.max_pool2d(F.silu(a), 2), scale_factor=2, mode="nearest"), F.silu(b)], 1), 16),
}


@pytest.mark.parametrize("name, strategy", [*((name, "dynamic") for name in JOINED), *((name, "probabilistic") for name in ("silu", "relu6", "add", "concat")), ("silu", "static")])  # fmt: skip
def test_uneven_channels_keep_their_precision(name, strategy):
    function, features = JOINED[name]
    model = uneven(net(function, features=features))
    x = images(12) / 8 if name == "relu6" else images(12)
    plain, profiled = (
        pq.quantize(model, [x], strategy=strategy, channel_profile=wanted, progress=False) for wanted in (False, True)
    )  # fmt: skip
    with torch.no_grad():
        wanted, before, after = model(x), plain(x), profiled(x)
    gain = float((sqnr(wanted, after) - sqnr(wanted, before)).mean())
    assert gain > (3 if name == "relu6" else 6), gain
    for key, captured in profiled.capture(x)[1].items():  # in real units, whatever the codes stand for
        reference = pq.capture(model, x, like=profiled)[1][key].value
        assert float(sqnr(reference, captured.value).mean()) > 15, key


def test_flatten_repeats_the_profile():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.MaxPool2d(5), nn.Flatten(), nn.Linear(6 * 4, 5)).eval()
    with torch.no_grad():
        factors = 2.0 ** torch.arange(6.0)
        model[0].weight *= factors.reshape(-1, 1, 1, 1)
        model[4].weight /= factors.repeat_interleave(4)
    (component,) = components(model)
    assert list(component.tensors.values())[-1] == [(component.producers[0][1], 4)]
    plain, profiled = (pq.quantize(model, [images(8)], strategy="dynamic", channel_profile=wanted, progress=False) for wanted in (False, True))
    with torch.no_grad():
        assert float((sqnr(model(images(8)), profiled(images(8))) - sqnr(model(images(8)), plain(images(8)))).mean()) > 6


def test_a_concatenation_has_the_profiles_of_its_inputs():
    function, features = JOINED["concat of a sum"]
    stem, joined = sorted(components(net(function, features=features)), key=lambda c: len(c.tensors))
    assert len(stem.tensors) == 1 and len(stem.consumers) == 2
    # the sum has both branches' profile, so the concatenation has it twice
    assert len({v for _, v in joined.producers}) == 1 and len(joined.consumers) == 1
    assert [len(segments) for segments in joined.tensors.values()] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "function, features",
    [
        (lambda a, b: torch.tanh(a) + b, 8),  # a float op reads it
        (lambda a, b: F.sigmoid(F.relu(a) + b), 8),  # a table bends it
        (lambda a, b: torch.cat([a, torch.tanh(b)], 1), 16),  # one part is float
        (lambda a, b: F.relu6(F.silu(a) + F.silu(b)), 8),  # the bounds of an add that stands alone are not per channel
    ],
)
def test_tensors_that_cannot_have_one(function, features):
    found = components(net(function, features=features))
    assert [len(component.consumers) for component in found] == [2]  # the stem's, which both branches read


def test_a_residual_of_a_float_output_has_none():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = F.silu(self.a(x))
            return self.b(x) + x

    model = Residual().eval()
    assert components(model) == []
    qmodel = pq.quantize(model, [images(8)], channel_profile=True, progress=False)
    with torch.no_grad():
        assert float(sqnr(model(images(8)), qmodel(images(8))).mean()) > 30


NONE = (0.0, 0.0)


def powers(component: Component, largest: torch.Tensor, weighed: int | None = None, sources: int | None = None, worth: torch.Tensor | None = None) -> tuple[float, float]:
    """Chosen for samples whose channels reach `largest` [samples, channels], in a network of two layers; those behind the first `weighed` are
    shifted, and known by their extremes alone. sources: how many pictures they are made of, in turn. worth: what noise in each channel is worth; None: what the weights behind make of it."""
    (node,), (unit,) = component.tensors, component.consumers
    largest, weight = largest.double(), unit.weight.double().flatten(1, 2)
    zeros, ones = torch.zeros_like(largest), torch.ones_like(largest)
    x = Seen(zeros, largest, zeros, largest**2 / 3, ones, ones, (weight.square().sum((0, 1)) if worth is None else worth.double()).expand_as(largest), ones)
    outputs = torch.ones(len(largest), len(weight), dtype=torch.float64)
    y = Seen(*[outputs] * len(dataclasses.fields(Seen)))
    number = torch.arange(len(largest))
    known = number < (len(largest) if weighed is None else weighed)
    look = Look(number % (sources or len(number)), (~known).long(), known, {node: x, unit.anchor: y})
    return profiles.choose_powers([component], look, profiles.usual_noise([component], look))[0]


def test_no_power_from_one_image_and_little_where_channels_change_from_image_to_image():
    (component, *_) = [c for c in components(uneven(net(lambda a, b: F.silu(a)))) if len(c.consumers) == 1]
    generator = torch.Generator().manual_seed(0)
    steady = (2.0 ** torch.linspace(0, 5, 8)).repeat(12, 1)
    assert powers(component, steady[:1]) == NONE
    assert powers(component, steady)[0] > 0.5 and powers(component, steady, 8)[0] > 0.5  # of the ceilings
    shuffled = torch.stack([row[torch.randperm(8, generator=generator)] for row in steady])
    assert powers(component, shuffled)[0] == 0.0


def test_a_channel_that_matters_and_is_mostly_small_gets_finer_codes():
    (component, *_) = [c for c in components(net(lambda a, b: F.silu(a))) if len(c.consumers) == 1]
    largest, worth = torch.ones(24, 8), torch.ones(8)
    largest[:, 0] = 2.0 ** torch.linspace(-2, 0, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert powers(component, largest, worth=worth)[1] == 0.0
    worth[0] = 200.0
    assert powers(component, largest, worth=worth)[1] > 0.0
    rows = dataclasses.replace(component, axes=dict.fromkeys(component.axes, -1))  # with a scale each, of which only the largest is known
    assert powers(rows, largest, worth=worth)[1] == 0.0
    assert powers(component, torch.ones(24, 8), worth=worth) == NONE  # where it is as large as all others, they would lose what it gains


def test_a_gain_that_may_be_chance_is_none(monkeypatch):
    """Noise is worth the same in all channels: where it is not, powers gain more than chance does."""
    (component, *_) = [c for c in components(uneven(net(lambda a, b: F.silu(a)))) if len(c.consumers) == 1]
    spread = torch.randn(12, 8, generator=torch.Generator().manual_seed(7))
    largest = 2.0 ** (torch.linspace(0, 2, 8) + 0.5 * spread)
    assert powers(component, largest, worth=torch.ones(8)) == NONE
    monkeypatch.setattr(profiles, "_CERTAIN", 0.0)
    assert powers(component, largest, worth=torch.ones(8)) != NONE


def test_copies_of_a_picture_are_no_further_pictures():
    """Six pictures seen four times: what they gain would be certain if it were that of 24."""
    (component, *_) = [c for c in components(uneven(net(lambda a, b: F.silu(a)))) if len(c.consumers) == 1]
    spread = torch.randn(6, 8, generator=torch.Generator().manual_seed(7)).repeat(4, 1)
    largest = 2.0 ** (torch.linspace(0, 2, 8) + 0.5 * spread)
    assert powers(component, largest) != NONE
    assert powers(component, largest, sources=6) == NONE


def test_a_surrogate_is_not_worse_for_profiles():
    """Channels that are large in turns: exact ranges and weights gain from a profile, one law for all of them does not."""
    model = uneven(net(lambda a, b: F.relu(a)))
    x = images(24) * 2.0 ** torch.linspace(-2, 2, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(2))].reshape(-1, 1, 1, 1)
    for surrogate in ("gaussian", "probe"):
        default, forced, without = (pq.quantize(model, [x], surrogate=surrogate, channel_profile=profile, progress=False) for profile in (None, True, False))
        with torch.no_grad():
            ours, *others = (float(sqnr(model(x), qmodel(x)).mean()) for qmodel in (default, forced, without))
        assert ours > max(others) - 0.3 and ours in others
        assert default.settings["channel_profile"] is None


def test_saved_with_its_profile(tmp_path):
    function, features = JOINED["concat"]
    model = uneven(net(function, features=features))
    qmodel = pq.quantize(model, [images(8)], channel_profile=True, progress=False)
    assert any(name.endswith("left.profile") for name in qmodel.state_dict())
    pq.save(qmodel, tmp_path / "model")
    loaded = pq.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(images(8)), qmodel(images(8)))
    for key, captured in loaded.capture(images(8))[1].items():
        assert torch.equal(captured.value, qmodel.capture(images(8))[1][key].value), key
