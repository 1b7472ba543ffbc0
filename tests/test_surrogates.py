"""Calibration: what ranges are fitted to, how candidates are judged, and what auto chooses."""

import math

import pytest
import torch
from torch import nn

import probquant as pq
from probquant import Strategy, surrogates
from probquant.compare import sqnr
from probquant.shifts import KINDS, Shifts


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Fits


def test_static_criteria_differ_where_there_are_outliers():
    fit = surrogates.StaticFit()
    values = normal(200_000)
    values[7] = 100.0
    for part in values.split(50_000):
        fit.update(part)
    ranges = {criterion: fit.fit(criterion, 99.9) for criterion in surrogates.CRITERIA}
    assert ranges["minmax"] == (float(values.min()), 100.0)
    assert 2.5 < ranges["percentile"][1] < 4.1 and -4.6 < ranges["percentile"][0] < -2.5  # the ends share the 0.1 %
    assert 3 < ranges["entropy"][1] < 90 and 3 < ranges["mse"][1] < 90  # both give the outlier up
    beyond = ((values < ranges["percentile"][0]) | (values > ranges["percentile"][1])).double().mean()
    assert beyond <= 0.0011


def test_entropy_is_of_what_is_not_zero():
    """Zeros behind a ReLU are a spike that a range, whatever its width, has a code for."""
    y = normal(400_000, seed=1).relu()
    fit, without = surrogates.StaticFit(), surrogates.StaticFit()
    fit.update(y)
    without.update(y[y > 0])
    assert fit.fit("entropy", 99.99) == without.fit("entropy", 99.99) and fit.fit("entropy", 99.99)[1] > 3.0


def test_range_fit_finds_the_least_error():
    """Against rounding the values themselves, for a pair of widths on each side of the chosen one, too."""
    y = normal(4, 30_000, seed=1)
    fit, outputs = surrogates.RangeFit(), surrogates.SampleOutputs(y)
    law = torch.tensor([[0.0, 1.0]]).expand(4, 1, 2)
    fit.update(surrogates.law_ranges(law, pq.Activation.CLAMP, None, None), outputs, torch.tensor([0, 0, 1, 1]))

    def noise(lo: float, hi: float) -> float:
        scale, zero_point = surrogates.static_predictor(lo, hi).tolist()
        codes = (torch.round(y / scale) + zero_point).clamp(0, 255)
        return float((((codes - zero_point) * scale - y) ** 2).sum(1).div((y**2).sum(1)).mean())

    alpha, beta = fit.fit("mse", 100.0)
    best = noise(-alpha, beta)
    assert all(best < noise(-alpha * a, beta * b) * 1.01 for a in (0.7, 1.0, 1.4) for b in (0.7, 1.0, 1.4))
    mean, rms, worst = fit.judge("mse", 100.0)
    assert mean == pytest.approx(best, rel=0.1) and worst >= rms >= mean
    below, above = fit.fit("minmax", 100.0)
    assert below >= -float(y.min()) and above >= float(y.max())


def test_what_samples_do_not_tell_stays_usual():
    """Below zero behind a ReLU, margins of a probe that saw everything, a layer that met no sample."""
    y = normal(2, 4, 5, 5).relu()
    relu = (pq.Activation.CLAMP, 0.0, None)
    law, probe, none = surrogates.RangeFit(), surrogates.RangeFit(surrogates.MARGINS, 0.1), surrogates.RangeFit()
    halves, outputs = torch.tensor([0, 1]), surrogates.SampleOutputs(y)
    law.update(surrogates.law_ranges(torch.tensor([[[0.0, 1.0]]] * 2), *relu), outputs, halves)
    probe.update(surrogates.probe_ranges(y, *relu), outputs, halves)
    assert law.fit("mse", 100.0)[0] == pytest.approx(4, rel=0.04)
    assert probe.fit("mse", 100.0) == pytest.approx((0.1, 0.1)) and none.fit("mse", 100.0) == pytest.approx((4, 4), rel=0.04)
    assert probe.judge("mse", 100.0)[0] > 0 and none.judge("mse", 100.0) == (math.inf,) * 3


def test_channel_factors_make_the_variance_right():
    weight, x = normal(12, 3, 3, 8, seed=2), normal(6, 8, 20, 20, seed=3).abs().cumsum(3)  # neighbours depend on each other
    y = nn.functional.conv2d(x, weight.permute(0, 3, 1, 2))
    fit = surrogates.ChannelFit(weight, None, 1)
    fit.update(x, y)
    within, between = fit.fit()
    assert 0.01 < within < 100 and 0.01 < between < 100 and (within, between) != (1.0, 1.0)
    predictor = torch.cat([torch.tensor([1.0, 1.0, 0.0]), surrogates.channel_laws(weight, None, 1, within, between)])
    options = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    law = surrogates.conv2d_law(pq.ops.quantize(x, channel_stats=True), 12, options, (), Strategy.CHANNEL, predictor, 0)
    assert float((law[:, 0, 1] ** 2).sum()) == pytest.approx(float(y.flatten(1).var(1).sum()), rel=0.2)


# ----------------------------------------------------------------------------------------------------------------------
# Shifts


def test_shifts_depend_on_the_sample_and_its_number_alone():
    x = normal(9, 3, 6, 5)
    shift = Shifts(x)
    whole = shift(x, 2)
    assert torch.equal(torch.cat([shift(x[:4], 2), shift(x[4:], 6)]), whole)
    assert bool((whole <= x.amax((0, 2, 3), keepdim=True)).all()) and bool((whole >= x.amin((0, 2, 3), keepdim=True)).all())
    assert all(not torch.equal(a, b) for a, b in zip(whole, x, strict=True)) and KINDS == 4
    assert Shifts(normal(5, 7))(normal(5, 7), 0).shape == (5, 7)


# ----------------------------------------------------------------------------------------------------------------------
# auto


@pytest.fixture(scope="module")
def chosen():
    """A layer that follows its input's gain, a bounded one that always fills its range, one of fewer than 64 positions."""
    gain = 2.0 ** torch.linspace(-3, 3, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    images = normal(24, 3, 20, 20, seed=4) * gain.reshape(-1, 1, 1, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU6(), nn.Conv2d(64, 64, 3, 4), nn.Conv2d(64, 4, 1))
    with torch.no_grad():
        model[1].weight.mul_(1000.0)
    return model, images, pq.quantize(model, [images], surrogate="auto", progress=False)


def test_auto_fixes_what_is_bounded_and_predicts_what_is_not(chosen):
    _, _, qmodel = chosen
    by_name = {layer.name: layer for layer in qmodel.layers}
    assert by_name["0"].strategy != "fixed"  # its range follows the gain
    assert by_name["0"].judged["fixed"][0] < max(mean for mean, _ in by_name["0"].judged.values()) - 3
    assert by_name["1"].strategy == "fixed" and by_name["1"].predictor == {"lo": 0.0, "hi": 6.0}
    assert set(by_name["0"].judged) == {"fixed", "gaussian", "gaussian_channel", "channel", "gaussian (gamma 4)", "probe", "dynamic"}
    assert "dB, worst" in by_name["1"].choice and by_name["1"].choice in str(qmodel.summary())
    assert by_name["0"].cost > 0 and by_name["0"].saved > 0 and by_name["1"].cost == by_name["1"].saved == 0
    assert str(qmodel.summary()).splitlines()[-1].startswith("auto: ") and " us per sample over fixed ones" in str(qmodel.summary())
    assert not by_name["4"].judged and by_name["4"].choice == ""  # a float output has no range
    assert all(math.isfinite(value) for layer in qmodel.layers for pair in layer.judged.values() for value in pair)


def test_autos_predictors_stay_small(chosen):
    _, _, qmodel = chosen
    state = qmodel.state_dict()
    predictors = sum(4 * tensor.numel() for name, tensor in state.items() if name.endswith(".predictor"))
    assert predictors <= 0.02 * sum(tensor.numel() for name, tensor in state.items() if name.endswith(".weight"))


def test_auto_repeats_itself_and_is_saved_with_its_reasons(chosen, tmp_path):
    model, images, qmodel = chosen
    with torch.inference_mode():
        again = pq.quantize(model, [part.clone() for part in images.split(5)], surrogate="auto", progress=False)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {k: v.tolist() for k, v in qmodel.state_dict().items()} and again.layers == qmodel.layers
    pq.save(qmodel, tmp_path / "model")
    assert str(pq.load(tmp_path / "model").summary()) == str(qmodel.summary())


def test_auto_takes_exact_ranges_where_nothing_else_will_do():
    """Images of equal moments whose largest value differs by 16, at a position that a probe seldom meets."""
    spikes = (torch.tensor([1, 4, 16, 64, 256]).repeat(5)).tolist()
    at = [torch.randperm(1024, generator=torch.Generator().manual_seed(i))[:n] for i, n in enumerate(spikes)]
    images = torch.stack([torch.zeros(1, 1024).index_fill_(1, places, 1.0) / len(places) ** 0.5 for places in at]).reshape(-1, 1, 32, 32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 4, 1, bias=False)).eval()
    qmodel = pq.quantize(model, [images], surrogate="auto", progress=False)
    assert qmodel.layers[0].strategy == "dynamic" and qmodel.layers[0].predictor == {}
    gaussian, exact = (pq.quantize(model, [images], progress=False, channel_profile=True, **options) for options in ({"surrogate": "gaussian"}, {"strategy": "dynamic"}))
    with torch.no_grad():
        ours, predicted, best = (float(sqnr(model(images), q(images)).mean()) for q in (qmodel, gaussian, exact))
    assert ours > predicted + 3 and ours > best - 0.1


def test_auto_is_close_to_float(chosen):
    model, images, qmodel = chosen
    with torch.no_grad():
        assert float(sqnr(model(images), qmodel(images)).mean()) > 20


# ----------------------------------------------------------------------------------------------------------------------
# Channel profiles


def profiled(surrogate: str, activation: type[nn.Module] = nn.SiLU, **options):
    """(model, images, int8 model) whose first tensor has a profile: its channels differ by up to 2 ** 7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        factors = 2.0 ** torch.arange(8.0)
        model[0].weight *= factors.reshape(-1, 1, 1, 1) / 8
        model[0].bias *= factors / 8
        model[2].weight /= factors.reshape(1, -1, 1, 1) / 8
    images = normal(16, 3, 20, 20, seed=5)
    return model, images, pq.quantize(model, [images], surrogate=surrogate, channel_profile=True, progress=False, **options)


def leaf(qmodel, name: str) -> torch.Tensor:
    (tensor,) = [value for key, value in qmodel.state_dict().items() if key.startswith("int8_layers.000") and key.endswith("." + name)]
    return tensor


@pytest.mark.parametrize("surrogate", ["gaussian", "gaussian_channel", "channel", "probe", "auto"])
def test_ranges_are_of_the_output_over_its_profile(surrogate):
    """No profile, or one that the fit knows nothing of, would lose far more than predicting does."""
    model, images, qmodel = profiled(surrogate)
    assert float(leaf(qmodel, "profile").max() / leaf(qmodel, "profile").min()) > 8
    exact = pq.quantize(model, [images], strategy="dynamic", channel_profile=True, progress=False)
    wanted = pq.capture(model, images, like=qmodel)[1]["0"].value
    ours, best = (float(sqnr(wanted, q.capture(images)[1]["0"].value).mean()) for q in (qmodel, exact))
    assert ours > best - 1.5, (ours, best)
    with torch.no_grad():
        assert float(sqnr(model(images), qmodel(images)).mean()) > float(sqnr(model(images), exact(images)).mean()) - 2


def test_channel_factors_are_of_the_output_over_its_profile():
    model, images, qmodel = profiled("channel", weight_rounding="nearest")
    profile = leaf(qmodel, "profile")
    weight = leaf(qmodel, "weight").float() * (leaf(qmodel, "weight_scale") / profile).reshape(-1, 1, 1, 1)
    fit = surrogates.ChannelFit(weight, model[0].bias.detach() / profile, 1)
    with torch.no_grad():
        for x in (images[:8], Shifts(images[:8])(images[:8], 0)):
            fit.update(x, model[0](x) / profile.reshape(-1, 1, 1))
    assert leaf(qmodel, "predictor")[5:7].tolist() == pytest.approx(fit.fit(), rel=1e-4)


def test_a_probe_stays_within_a_bounded_activation_over_its_profile():
    _, images, qmodel = profiled("probe", nn.ReLU6)
    profile = leaf(qmodel, "profile")
    y = qmodel.capture(images)[1]["0"].value
    assert float(y.min()) >= 0 and float((y / profile.reshape(-1, 1, 1)).max()) <= 6 / float(profile.min()) * 1.01
    ranges = surrogates.probe_ranges(100 * normal(2, 8, 20, 20), pq.Activation.CLAMP, 0.0, 6.0, profile)
    assert float(ranges[0].min()) == 0 and float(ranges[1].max()) == pytest.approx(6 / float(profile.min()))
