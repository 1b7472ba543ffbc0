"""Second-order rounding against exhaustive search, plain rounding, and through quantize()."""

import itertools

import pytest
import torch
from torch import nn

import probquant as pq
from probquant import rounding
from probquant.compare import sqnr
from probquant.rounding import RoundingFit
from probquant.surrogates import BiasFit, quantize_weight

CONV = {"stride": [2, 1], "padding": [1, 0, 1, 2], "dilation": [1, 2]}


def correlated(*shape):
    """Images whose channels and neighbouring pixels resemble each other, none negative."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(shape[1], shape[1], generator=generator)
    x = torch.einsum("nchw,dc->ndhw", torch.randn(*shape, generator=generator), mix).relu()
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1).contiguous()


def conv(x, weight, groups):
    x = torch.nn.functional.pad(x, (1, 2, 1, 0))  # left, right, top, bottom of CONV's padding
    return torch.nn.functional.conv2d(x, weight.permute(0, 3, 1, 2), None, [2, 1], 0, [1, 2], groups)


def spread(y):
    """Mean square around each output channel's mean: what bias correction leaves."""
    return (y - y.mean((0, 2, 3), keepdim=True)).square().mean().item()


@pytest.mark.parametrize(("groups", "channels", "outputs", "least"), [(1, 16, 24, 1.0), (4, 16, 8, 1.0), (16, 16, 16, 1.0)])
def test_convolutions_lose_less(groups, channels, outputs, least):
    x = correlated(16, channels, 12, 12)
    weight = torch.randn(outputs, 3, 3, channels // groups, generator=torch.Generator().manual_seed(2))
    nearest, scale = quantize_weight(weight)
    fit = RoundingFit(weight.shape, {**CONV, "groups": groups}, centred=True)
    for part in x.split(5):
        fit.update(part, torch.ones(len(part), dtype=torch.float64))
    codes = fit.fit(weight, scale)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.is_contiguous()
    errors = [spread(conv(x, c.float() * scale.reshape(-1, 1, 1, 1) - weight, groups)) for c in (nearest, codes)]
    assert 10 * torch.log10(torch.tensor(errors[0] / errors[1])) >= least


@pytest.mark.parametrize("centred", [False, True])
def test_linear_layer_comes_near_the_best_of_all_roundings(centred):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 50, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 2
    weight = torch.randn(6, 5, generator=generator)
    nearest, scale = quantize_weight(weight)
    fit = RoundingFit(weight.shape, {"groups": 1}, centred)
    fit.update(x, torch.ones(len(x), dtype=torch.float64))
    rows = x.reshape(-1, 5)
    rows = rows - rows.mean(0) if centred else rows

    def error(codes):
        return ((codes * scale[:, None] - weight) @ rows.T).square().mean(1)

    every = torch.stack([(weight / scale[:, None]).floor().clamp(-127, 126) + torch.tensor(up) for up in itertools.product((0.0, 1.0), repeat=5)])
    best = torch.stack([error(codes) for codes in every]).amin(0)
    found = error(fit.fit(weight, scale).float())
    assert found.mean() < 0.5 * (error(nearest.float()).mean() + best.mean())  # more than half of the way


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_learnt_without_profiles_serves_with_them(groups):
    x, profile = correlated(24, 8, 9, 9) + 0.5, torch.linspace(0.1, 1.0, 8)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(8, 3, 3, 8 // groups, generator=generator)
    codes, scale = quantize_weight(weight)
    samples, options = torch.rand(24, dtype=torch.float64, generator=generator), {**CONV, "groups": groups}
    found = []
    for values, over in ((x, profile), (x / profile.reshape(-1, 1, 1), None)):
        fits = RoundingFit(weight.shape, options, centred=True), BiasFit(weight.shape, options)
        for fit in fits:
            fit.update(values, samples)
        found.append((fits[0].fit(weight, scale, over), fits[1].fit(weight, codes, scale, over)))
    (a, bias_a), (b, bias_b) = found
    assert (a != b).float().mean() < 0.02 and (a != codes).float().mean() > 0.1  # float32 sums may tip a weight that is half way
    assert torch.allclose(bias_a, bias_b, rtol=1e-4, atol=1e-6)


def test_little_is_made_of_few_positions():
    """From four positions H says that most errors do not matter, which holds on these alone; where they are repeated often, it is believed."""
    generator = torch.Generator().manual_seed(6)
    few, others = torch.randn(4, 32, generator=generator), torch.randn(4096, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    nearest, scale = quantize_weight(weight)
    errors = []
    for repeats in (1, 1000):
        fit = RoundingFit(weight.shape, {"groups": 1}, centred=True)
        fit.update(few.repeat(repeats, 1), torch.ones(4 * repeats, dtype=torch.float64))
        errors.append(((fit.fit(weight, scale) * scale[:, None] - weight) @ others.T).square().mean())
    usual = ((nearest * scale[:, None] - weight) @ others.T).square().mean()
    assert errors[0] < 1.1 * usual and errors[1] > 1.3 * usual


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    nearest, scale = quantize_weight(weight)
    fit = RoundingFit(weight.shape, {"groups": 1}, centred=True)
    fit.update(torch.zeros(3, 6), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(fit.fit(weight, scale), nearest)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU6(), nn.Conv2d(24, 32, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)).eval()


@pytest.mark.parametrize("strategy", ["static", "dynamic", "probabilistic"])
def test_quantize_rounds_every_layer(network, strategy, tmp_path):
    batches = [correlated(8, 3, 16, 16)]
    models = {how: pq.quantize(network, batches, strategy=strategy, weight_rounding=how, progress=False) for how in ("nearest", "gptq")}
    assert {layer.rounding for layer in models["gptq"].layers if layer.kind in ("conv2d", "linear")} == {"gptq"}
    assert "gptq" in str(models["gptq"].summary()) and "gptq" not in str(models["nearest"].summary())
    weights = [{name: w for name, w in model.state_dict().items() if name.endswith(".weight") and w.dtype == torch.int8} for model in models.values()]
    assert len(weights[0]) == 4
    for name, nearest in weights[0].items():
        changed = (weights[1][name].int() - nearest.int()).abs()
        assert 0 < changed.float().mean() < 1 and changed.max() <= 4
    with torch.no_grad():  # activations have most of the error in so small a network
        nearest, gptq = (sqnr(network(batches[0]), model(batches[0])).mean() for model in models.values())
    assert gptq > nearest - 1.5  # the outputs are biases for the most part: a decibel either way is chance
    pq.save(models["gptq"], tmp_path / "model.safetensors")
    assert torch.equal(pq.load(tmp_path / "model.safetensors")(batches[0]), models["gptq"](batches[0]))


def test_large_layers_are_rounded_to_nearest_and_say_so(network, monkeypatch):
    monkeypatch.setattr(rounding, "LARGEST", 27)
    qmodel = pq.quantize(network, [correlated(4, 3, 16, 16)], strategy="static", weight_rounding="gptq", progress=False)
    told = {layer.name: layer.rounding for layer in qmodel.layers if layer.kind in ("conv2d", "linear")}
    assert told == {"0": "gptq", "2": "gptq", "4": "gptq", "8": "rounded to nearest: 128 weights per output, gptq takes 27"}


def test_unknown_rounding_is_an_error(network):
    with pytest.raises(ValueError, match="weight_rounding is 'up', want one of 'nearest', 'gptq'"):
        pq.quantize(network, [torch.zeros(1, 3, 16, 16)], weight_rounding="up")


@pytest.mark.parametrize("how", ["nearest", "gptq"])
def test_loud_samples_do_not_set_what_quiet_ones_get(how):
    torch.manual_seed(5)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1, bias=False)).eval()
    x = correlated(32, 3, 12, 12)
    x[::4] = 100 * x[::4].flip(1)  # of other colours, too
    with torch.no_grad():
        wanted = network(x)
        plain, corrected = (
            sqnr(wanted, pq.quantize(network, [x], strategy="dynamic", weight_rounding=how, bias_correction=correct, progress=False)(x)) for correct in (False, True)
        )
    assert corrected.mean() > plain.mean() - 0.1
    assert corrected[1::4].mean() > plain[1::4].mean() - 0.1


def test_one_flat_picture_does_not_decide_alone():
    """Filters that see edges have next to no signal in it, and so nothing to lose."""
    torch.manual_seed(6)
    edges = nn.Conv2d(3, 32, 3, padding=1, bias=False)
    with torch.no_grad():
        edges.weight -= edges.weight.mean((1, 2, 3), keepdim=True)
    network = nn.Sequential(edges, nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False)).eval()
    x = correlated(24, 3, 16, 16)
    x[0] = 0.5 + 1e-3 * x[0]
    with torch.no_grad():
        wanted = network(x)
        plain, corrected = (
            sqnr(wanted, pq.quantize(network, [x], strategy="dynamic", weight_rounding="nearest", bias_correction=correct, progress=False)(x))[1:].mean()
            for correct in (False, True)
        )
    assert corrected > plain - 0.1
