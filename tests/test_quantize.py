"""quantize(): whole networks in every strategy, its arguments and errors, files, copies, torch.compile and torch.export."""

import copy
import functools
import json
import os
import pickle
import warnings

import models
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import probquant as pq
from probquant.compare import sqnr

STRATEGIES = ["probabilistic", "static", "dynamic"]
EXACT = list(models.MODELS)


@functools.cache
def float_model(name):
    return models.build(name)


def quantized(name, strategy="probabilistic", **options):
    return _quantized(name, strategy, **options)


@functools.cache
def _quantized(name, strategy, **options):
    return pq.quantize(float_model(name), [models.images(name, 16, seed=s) for s in range(2)], strategy=strategy, progress=False, **options)


@functools.cache
def probe(name, count=6):
    return models.images(name, count, seed=50)


def run(model, inputs):
    with torch.no_grad():
        return pytree.tree_leaves(model(*inputs))


def same(actual, expected, what=""):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: output {i} is {a.dtype} {list(a.shape)}, want {b.dtype} {list(b.shape)}"
        assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), f"{what}: output {i} differs by up to {float((a - b).abs().max())}"


def close(actual, expected, decibels=30.0):
    for a, b in zip(actual, expected, strict=True):
        assert float(sqnr(b, a).mean()) > decibels


def pick(inputs, samples):
    return tuple(x[samples] for x in inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", models.MODELS)
def test_network_is_close_to_float_and_all_int8(name, strategy):
    model, qmodel, inputs = float_model(name), quantized(name, strategy), probe(name)
    with torch.no_grad():
        wanted, actual = model(*inputs), qmodel(*inputs)
    assert pytree.tree_structure(actual) == pytree.tree_structure(wanted)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        decibels = sqnr(b, a)
        assert float(decibels.mean()) > 30 and float(decibels.min()) > 20, decibels
    weighted = [layer for layer in qmodel.layers if layer.kind in ("conv2d", "linear")]
    assert all(layer.int8 for layer in weighted), [layer for layer in weighted if not layer.int8]
    called = {"two_heads": 1, "vit": 4}.get(name, 0)  # its shared convolution is called twice; query, key and value are layers of their own
    assert len(weighted) == called + sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", models.MODELS)
def test_an_image_is_the_same_alone_and_in_any_batch(name, strategy):
    qmodel, inputs = quantized(name, strategy), probe(name)
    whole = run(qmodel, inputs)
    for samples in ([0], [5], [4, 2, 2], [1, 0, 3, 5]):
        part, wanted = run(qmodel, pick(inputs, samples)), [out[samples] for out in whole]
        if name in EXACT:
            same(part, wanted, f"images {samples}")
        else:
            close(part, wanted, 60.0)


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_one_and_two_threads_agree(name):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(quantized(name), probe(name)))
    torch.set_num_threads(before)
    same(*results)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["resnet", "efficientnet", "yolo"])
def test_a_broken_image_stays_alone(name, strategy):
    qmodel, (x,) = quantized(name, strategy), probe(name)
    good, broken = run(qmodel, (x,)), x.clone()
    broken[2, 1, 7, 7] = torch.nan
    for a, b in zip(run(qmodel, (broken,)), good, strict=True):
        same([a[[0, 1, 3, 4, 5]]], [b[[0, 1, 3, 4, 5]]], "the other images")
        assert bool(a[2].isnan().all()), f"want NaN, got {a[2].flatten()[:4].tolist()}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", models.MODELS)
def test_batch_of_zero(name, strategy):
    inputs = pick(probe(name), slice(0, 0))
    wanted = run(float_model(name), inputs)
    assert [out.shape for out in run(quantized(name, strategy), inputs)] == [out.shape for out in wanted]


@pytest.mark.parametrize(
    "options",
    [{"surrogate": "gaussian"}, {"surrogate": "gaussian", "gamma": 1}, {"surrogate": "gaussian_channel"}, {"surrogate": "gaussian_channel", "gamma": 2}, {"surrogate": "channel"}, {"surrogate": "probe"}, {"gamma": 3}, {"criterion": "percentile", "percentile": 99.9}, {"criterion": "minmax"}, {"strategy": "static", "criterion": "percentile"}, {"strategy": "static", "criterion": "minmax"}, {"strategy": "static", "criterion": "entropy"}],
    ids=str,
)  # fmt: skip
def test_options(options):
    qmodel = quantized("mobilenet", **options)
    decibels = 12.0 if options.get("criterion") == "entropy" else 30.0  # it clips hard where values are few
    close(run(qmodel, probe("mobilenet")), run(float_model("mobilenet"), probe("mobilenet")), decibels)
    assert options.items() <= qmodel.settings.items()


# ----------------------------------------------------------------------------------------------------------------------
# What happens to the float model


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_float_model_is_left_untouched(name):
    model = models.build(name).train()
    next(model.children()).eval()  # a mixed state has to survive, too
    next(model.parameters()).requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    modules = [type(m) for m in model.modules()]
    qmodel = pq.quantize(model, [models.images(name, 8)], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads and all(p.grad is None for p in model.parameters())
    assert [type(m) for m in model.modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    same(run(qmodel, probe(name)), run(pq.quantize(model.eval(), [models.images(name, 8)], progress=False), probe(name)), "quantized in train mode")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_are_left_untouched(strategy):
    """Even where the float model normalizes them in place: calibration goes through them more than once, and backwards."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x.sub_(0.45).div_(0.22)
            return x, self.b(self.a(x).relu())

    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.rand(8, 3, 12, 12)
    kept, wanted = x.clone(), run(model, (x.clone(),))
    qmodel = pq.quantize(model, [x], strategy=strategy, progress=False)
    close(run(qmodel, (x,)), wanted)
    assert torch.equal(x, kept)
    pq.capture(model, x)
    assert torch.equal(x, kept)


def test_int8_model_does_not_follow_the_float_model():
    model = models.build("vit")
    qmodel = pq.quantize(model, [models.images("vit", 8)], progress=False)
    before = run(qmodel, probe("vit"))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    same(run(qmodel, probe("vit")), before)


# ----------------------------------------------------------------------------------------------------------------------
# Summary, include, exclude


def test_summary_tells_everything():
    text = str(quantized("resnet", surrogate="gaussian").summary())
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "int8" in lines["conv1"] and "gaussian" in lines["conv1"] and "relu" in lines["conv1"] and "alpha" in lines["conv1"]
    assert "add + relu" in lines["layer1.0.conv2"] and "rho" in lines["layer1.0.conv2"]
    assert "float32 output" in lines["fc"]
    assert text.splitlines()[-1] == "14 of 14 layers with weights run in int8, 0 stay float"
    assert "token" in str(quantized("vit").summary())
    names = [layer.name for layer in quantized("two_heads").layers]
    assert "shared.0" in names and "shared.0#2" in names
    assert "probabilistic" in repr(quantized("resnet"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["efficientnet", "mobilenetv3"])
def test_squeeze_and_excitation_has_no_float_island(name, strategy):
    """The gate's sigmoid or hardsigmoid is the layer's own, the product is an int8 op: floats enter once and leave once."""
    qmodel = quantized(name, strategy)
    assert all(layer.int8 for layer in qmodel.layers) and sum(layer.kind == "mul" for layer in qmodel.layers) == 2
    called = [node.target for node in qmodel.graph.nodes if node.op == "call_function"]
    assert called.count(pq.ops.quantize.default) == 1 and pq.ops.dequantize.default not in called
    possible = {"static": {"fixed"}, "dynamic": {"dynamic"}}.get(strategy, {"fixed", "gaussian", "dynamic"})
    assert {layer.strategy for layer in qmodel.layers if layer.kind == "mul"} <= possible
    close(run(qmodel, probe(name)), run(float_model(name), probe(name)), 20.0)


def test_products_that_are_no_int8_op_stay_float():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 8, 1) for _ in range(3))

        def forward(self, x):
            rows = self.a(x).mean(2, keepdim=True)  # one value per column
            return self.c(((self.a(x) * rows) * 0.5)[:, :3])

    model, x = Products().eval(), torch.randn(4, 3, 6, 6)
    qmodel = pq.quantize(model, [x], progress=False)
    assert not any(layer.kind == "mul" for layer in qmodel.layers)
    close(run(qmodel, (x,)), run(model, (x,)))


def test_heads_that_are_flattened_channels_last():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

        def forward(self, x):
            return self.head(self.stem(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3)

    model, x = Head().eval(), torch.randn(4, 3, 6, 6)
    close(run(pq.quantize(model, [x], progress=False), (x,)), run(model, (x,)))


@pytest.mark.parametrize("standing", ["behind a layer", "alone", "of a layer that others read"])
def test_hardsigmoid(standing):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.first(x) * 4
            z = F.hardsigmoid(F.relu(y) if standing == "alone" else self.first(x))
            return self.second(z + y if standing == "of a layer that others read" else z)

    torch.manual_seed(0)
    model, x = Gate().eval(), 3 * torch.randn(8, 3, 8, 8)
    qmodel = pq.quantize(model, [x], progress=False)
    if standing == "behind a layer":
        assert "clamp(0.0, 1.0)" in next(layer.fused for layer in qmodel.layers if layer.name.startswith("first") and layer.fused)
    close(run(qmodel, (x,)), run(model, (x,)))


def test_include_and_exclude():
    model, inputs = float_model("resnet"), probe("resnet")
    calibration = [models.images("resnet", 8)]
    qmodel = pq.quantize(model, calibration, include=["layer1.*", "fc"], exclude=["*.conv2"], progress=False)
    int8 = {layer.name for layer in qmodel.layers if layer.int8 and layer.kind in ("conv2d", "linear")}
    assert int8 == {"layer1.0.conv1", "layer1.1.conv1", "layer1.1.downsample.0", "fc"}
    reasons = {layer.name: layer.reason for layer in qmodel.layers if not layer.int8}
    assert reasons["conv1"] == reasons["layer1.0.conv2"] == "excluded by the caller"
    assert str(qmodel.summary()).splitlines()[-1] == "4 of 14 layers with weights run in int8, 10 stay float"
    close(run(qmodel, inputs), run(model, inputs))
    one = pq.quantize(model, calibration, include=["layer2.0.conv2.0"], progress=False)
    assert sum(layer.int8 for layer in one.layers) == 1
    close(run(one, inputs), run(model, inputs), 38.0)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_must_match(argument):
    with pytest.raises(ValueError, match=rf"{argument} pattern 'conv9' matches no layer; layers are conv1, .*fc"):
        pq.quantize(float_model("resnet"), [models.images("resnet", 2)], **{argument: ["fc", "conv9"]}, progress=False)
    with pytest.raises(ValueError, match=f"{argument} is the string 'fc', want a list"):
        pq.quantize(float_model("resnet"), [models.images("resnet", 2)], **{argument: "fc"}, progress=False)


@pytest.mark.parametrize(
    "make, options, reason",
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), {}, "nothing to quantize in the model: it has no convolution or linear layer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {"exclude": ["*"]}, "nothing to quantize in the model: excluded by the caller"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), {"include": []}, "nothing to quantize in the model: excluded by the caller"),
    ],
)
def test_nothing_to_quantize(make, options, reason):
    model = make()
    model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=reason):
        pq.quantize(model, [torch.randn(4, 3, 8, 8)], progress=False, **options)


@pytest.mark.parametrize("layer, shape", [(nn.ConvTranspose2d(8, 8, 2, 2), None), (nn.Conv1d(8, 8, 3), (4, 8, 64)), (nn.Conv3d(8, 8, 1), (4, 8, 4, 4, 4))])
def test_layers_that_cannot_be_int8_are_told(layer, shape):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.last = nn.Conv2d(3, 8, 3, padding=1), layer, nn.LazyLinear(4)

        def forward(self, x):
            y = self.conv(x)
            return self.last(self.other(y if shape is None else y.reshape(-1, *shape[1:])).flatten(1))

    model, x = Mixed().eval(), torch.randn(4, 3, 8, 8)
    wanted = run(model, (x,))
    qmodel = pq.quantize(model, [x], progress=False)
    told = {info.name: info for info in qmodel.layers}
    assert not told["other"].int8 and told["other"].reason
    assert "2 of 3 layers with weights run in int8, 1 stay float" in str(qmodel.summary())
    assert "2 int8 layers" in str(qmodel) and "\n" not in str(qmodel)
    close(run(qmodel, (x,)), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments and calibration data


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "fixed"}, "strategy is 'fixed', want one of 'probabilistic', 'static', 'dynamic'"),
        ({"surrogate": "laplace"}, "surrogate is 'laplace', want one of 'auto', 'gaussian', 'gaussian_channel', 'channel', 'probe'"),
        ({"criterion": "kl"}, "criterion is 'kl', want one of 'mse', 'percentile', 'minmax', 'entropy'"),
        ({"gamma": -1}, "gamma is -1, want an integer >= 0"),
        ({"gamma": True}, "gamma is True, want an integer >= 0"),
        ({"gamma": 1.5}, "gamma is 1.5, want an integer >= 0"),
        ({"percentile": 0.0}, r"percentile is 0.0, want a share in % in \(0, 100\]"),
        ({"percentile": 100.5}, r"percentile is 100.5, want a share in % in \(0, 100\]"),
        ({"percentile": float("nan")}, r"percentile is nan, want a share in % in \(0, 100\]"),
        ({"criterion": "entropy"}, "criterion 'entropy' is for static ranges, strategy is 'probabilistic'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        pq.quantize(float_model("mobilenet"), [models.images("mobilenet", 2)], progress=False, **options)


@pytest.mark.parametrize("make", [lambda: lambda x: x, lambda: quantized("mobilenet")], ids=["function", "QuantizedModel"])
def test_not_a_float_module(make):
    with pytest.raises(TypeError, match="model is a (function|QuantizedModel), want a float torch.nn.Module"):
        pq.quantize(make(), [torch.zeros(1, 3)], progress=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["first", "later"])
def test_calibration_data_must_be_finite(value, place):
    good, bad = models.images("mobilenet", 2)[0], models.images("mobilenet", 2)[0].clone()
    bad[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="a calibration batch holds values that are not finite"):
        pq.quantize(float_model("mobilenet"), [bad] if place == "first" else [good, bad], progress=False)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "calibration_batches is empty, want at least one batch"),
        ([torch.zeros(0, 3, 32, 32)], "a calibration batch is empty, want at least one sample"),
        ([models.images("mobilenet", 2)[0], torch.zeros(0, 3, 32, 32)], "a calibration batch is empty, want at least one sample"),
        ([{"x": torch.zeros(1)}], "a calibration batch is a dict, want a tensor or a tuple of the model's inputs"),
        (torch.zeros(2, 3, 32, 32), r"calibration_batches is a tensor \[2, 3, 32, 32\], want an iterable of batches"),
        ([["cat", "dog"]], "a calibration batch is a list, want a tensor or a tuple of the model's inputs"),
    ],
    ids=["none", "empty", "empty later", "dict", "a tensor", "strings"],
)
def test_calibration_batches_are_checked(batches, message):
    with pytest.raises(ValueError, match=message):
        pq.quantize(float_model("mobilenet"), batches, progress=False)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_calibration_does_not_depend_on_the_batching(name):
    """Labels are ignored, a generator is read once, and batches of 16, 8, 5 or 1 images tell the same."""
    (x,), inputs = models.images(name, 16), probe(name)

    def calibrated(*sizes):
        labels = torch.zeros(max(sizes), dtype=torch.long)
        return pq.quantize(float_model(name), ((part, labels[: len(part)]) for part in x.split(list(sizes))), progress=False)

    wanted = calibrated(16)
    for sizes in ((8, 8), (5, 11), (1, 15)):
        other = calibrated(*sizes)
        assert [layer.predictor for layer in other.layers] == [layer.predictor for layer in wanted.layers], sizes
        same(run(other, inputs), run(wanted, inputs), f"calibrated in batches of {sizes}")


def test_constant_and_tiny_calibration_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    for x in (torch.zeros(2, 3, 8, 8), torch.full((1, 3, 8, 8), 7.0), 1e-30 * torch.randn(2, 3, 8, 8)):
        for strategy in STRATEGIES:
            qmodel = pq.quantize(model, [x], strategy=strategy, progress=False)
            assert all(bool(out.isfinite().all()) for out in run(qmodel, (x,)))


def test_weights_must_be_finite():
    model = models.build("mobilenet")
    with torch.no_grad():
        model.classifier[1].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="weight or bias of layer 'classifier.1' is not finite"):
        pq.quantize(model, [models.images("mobilenet", 2)], progress=False)


@pytest.mark.parametrize("spoilt", ["nan", "inf"])
def test_what_the_model_computes_must_be_finite(spoilt):
    class Spoilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.second(torch.log(self.first(x)) if spoilt == "nan" else torch.relu(self.first(x)).reciprocal())

    with pytest.raises(ValueError, match="output of 'second' is not finite for a calibration sample, or a shifted copy of one"):
        pq.quantize(Spoilt().eval(), [torch.rand(4, 3, 8, 8)], strategy="static", progress=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(dtype, strategy):
    """With float layers and norms among the int8 ones: each gets what it computes in, and the outputs are of the float model's dtype."""

    class Islands(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(), nn.ConvTranspose2d(16, 16, 2, 2)
            self.second, self.norms, self.rows = nn.Conv2d(16, 8, 3), nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)]), nn.Linear(8, 8)

        def forward(self, x):
            x = torch.relu(self.second(self.up(self.act(self.first(x))))).flatten(2).mT
            x = self.rows(self.norms[0](x)) + x
            return x.mean(1), self.rows(self.norms[1](x)) + x

    torch.manual_seed(0)
    model, x = Islands().eval().to(dtype), torch.rand(8, 3, 12, 12).to(dtype)
    qmodel = pq.quantize(model, [x], strategy=strategy, progress=False)
    actual, expected = run(qmodel, (x,)), run(model, (x,))
    assert [y.dtype for y in actual] == [dtype, dtype]
    close(actual, expected)


def test_models_of_double_precision():
    with pytest.raises(ValueError, match="nothing to quantize in the model: it computes in float64, int8 layers take float32, float16 and bfloat16"):
        pq.quantize(nn.Conv2d(3, 4, 3).double(), [torch.zeros(2, 3, 8, 8).double()], progress=False)


def test_progress_bar(capfd):
    pq.quantize(float_model("mobilenet"), [models.images("mobilenet", 4)], progress=True)
    assert "calibrating: 4 images" in capfd.readouterr().err
    pq.quantize(float_model("mobilenet"), [models.images("mobilenet", 4)], progress=False)
    assert capfd.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------------------
# Graphs that are easy to get wrong


class Graph(nn.Module):
    """A stem, what `function` makes of it and of a second convolution, and a convolution behind."""

    def __init__(self, function):
        super().__init__()
        self.stem, self.other, self.last, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.LazyConv2d(4, 3), function

    def forward(self, x):
        stem = self.stem(x)
        return self.last(self.function(stem, self.other(stem)))


GRAPHS = {
    "double": lambda a, b: b + b,
    "twice": lambda a, b: (a + b) + b,
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
    "scalar": lambda a, b: b + 1,
    "broadcast": lambda a, b: a + b.mean((2, 3), keepdim=True),
    "relu before add": lambda a, b: F.relu(a) + F.relu(b),
    "silu after add": lambda a, b: F.silu(a + b),
    "gelu tanh": lambda a, b: F.gelu(b, approximate="tanh"),
    "used before its activation": lambda a, b: F.relu(b) + b,
    "in place": lambda a, b: b.add_(a).relu_(),
    "leaky": lambda a, b: F.leaky_relu(b) + a,
    "clamp": lambda a, b: b.clamp(min=-0.3),
    "hardtanh": lambda a, b: F.hardtanh(b, -0.5, 0.25),
    "sigmoid product": lambda a, b: b * torch.sigmoid(b),
    "ceil pool": lambda a, b: F.max_pool2d(b, 3, 2, ceil_mode=True),
    "ceil average": lambda a, b: F.avg_pool2d(b, 3, 2, ceil_mode=True),
    "average without padding": lambda a, b: F.avg_pool2d(b, 3, 1, 1, count_include_pad=False),
    "divisor": lambda a, b: F.avg_pool2d(b, 2, divisor_override=3),
    "adaptive": lambda a, b: F.adaptive_avg_pool2d(b, (5, 3)),
    "other cat": lambda a, b: torch.cat([a, b], 2),
    "cat with itself": lambda a, b: torch.cat([a, a, b], 1),
    "cat with the float": lambda a, b: torch.cat([a * 2, b], 1),
    "transpose": lambda a, b: b.transpose(2, 3) + a,
    "constant pad": lambda a, b: F.pad(b, (1, 1, 2, 2), value=0.5),
    "reflect pad": lambda a, b: F.pad(b, (1, 1, 2, 2), mode="reflect"),
    "negative pad": lambda a, b: F.pad(b, (-1, 1, 0, 2)),
    "zero pad": lambda a, b: F.pad(b, (3, 0, 0, 1)),
    "padded and read": lambda a, b: F.pad(b, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + a,
    "interpolate": lambda a, b: F.interpolate(b, scale_factor=2),
    "interpolate to a size": lambda a, b: F.interpolate(b, (26, 39), mode="nearest-exact"),
    "interpolate by a fraction": lambda a, b: F.interpolate(b, scale_factor=1.5) + F.interpolate(a, (19, 19)),
    "interpolate bilinearly": lambda a, b: F.interpolate(b, scale_factor=2, mode="bilinear"),
    "slices": lambda a, b: b[:, :4] + a[:, 4:],
    "chunks": lambda a, b: torch.cat(b.chunk(2, 1)[::-1], 1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name):
    torch.manual_seed(0)
    model = Graph(GRAPHS[name]).eval()
    x = models.images("resnet", 6, size=13)[0]
    wanted = run(model, (x,))
    qmodel = pq.quantize(model, [x], progress=False)
    close(run(qmodel, (x,)), wanted)
    same(run(qmodel, (x[4:5],)), [run(qmodel, (x,))[0][4:5]], "alone")
    assert {layer.name for layer in qmodel.layers if layer.int8} >= {"stem", "other", "last"}


def test_flatten_keeps_the_order_of_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 15 * 15, 20), nn.Sigmoid(), nn.Linear(20, 5)).eval()
    x = models.images("resnet", 6)[0]
    for strategy in STRATEGIES:
        qmodel = pq.quantize(model, [x], strategy=strategy, progress=False)
        close(run(qmodel, (x,)), run(model, (x,)))


@pytest.mark.parametrize("padding", ["same", "valid", "reflect", "circular"])
def test_convolution_paddings(padding):
    torch.manual_seed(0)
    mode = {"padding": padding} if padding in ("same", "valid") else {"padding": 1, "padding_mode": padding}
    model = nn.Sequential(nn.Conv2d(3, 8, (4, 3), dilation=(1, 2), **mode), nn.ReLU(), nn.Conv2d(8, 4, 3, **mode)).eval()
    x = models.images("resnet", 4)[0]
    qmodel = pq.quantize(model, [x], progress=False)
    close(run(qmodel, (x,)), run(model, (x,)))


def test_zero_padding_in_front_becomes_the_convolutions():
    targets = [str(node.target) for node in quantized("yolo").graph.nodes]
    assert not [target for target in targets if "pad" in target]


def test_no_float_island_in_a_detector():
    """One quantize at its start; what goes back to float are its outputs and what no layer reads in 8 bits."""
    calls = [node.target for node in quantized("yolo").graph.nodes if node.op == "call_function"]
    assert calls.count(pq.ops.quantize.default) == 1 and calls.count(pq.ops.upsample_nearest2d.default) == 1
    assert not [target for target in calls if str(target).startswith("aten.")]


def test_names_of_layers_may_be_names_of_the_library():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.settings = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            self.capture, self.summary, self.int8_layers, self.float_layers = (nn.LayerNorm(8) for _ in range(4))

        def forward(self, x):
            return self.float_layers(self.int8_layers(self.summary(self.capture(self.settings(self.layers(x))))))

    model, x = Names().eval(), torch.randn(4, 3, 8)
    qmodel = pq.quantize(model, [x], progress=False)
    close(run(qmodel, (x,)), run(model, (x,)))
    assert [layer.name for layer in qmodel.layers if layer.kind == "linear"] == ["layers.1", "settings.0"]
    same(run(copy.deepcopy(qmodel), (x,)), run(qmodel, (x,)))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_size_is_told(batch):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

        def forward(self, x):
            return self.convs(x).reshape(batch, 288)

    model = Fixed().eval()
    with pytest.warns(UserWarning, match=f"Fixed fixes its batch size at {batch}"):
        qmodel = pq.quantize(model, [torch.randn(batch, 3, 8, 8) for _ in range(3)], progress=False)
    assert "dB" in qmodel.meta["choice"]
    x = torch.randn(batch, 3, 8, 8)
    close(run(qmodel, (x,)), run(model, (x,)))


def test_any_number_of_inputs():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x, *others):
            return self.conv(x), sum(others) * x.shape[0]

    model, inputs = Several().eval(), (torch.rand(4, 3, 8, 8), torch.rand(4, 2), torch.rand(4, 2))
    qmodel = pq.quantize(model, [inputs], strategy="dynamic", progress=False)
    some = pick(inputs, slice(3))
    close(run(qmodel, some), run(model, some))


class Sized(nn.Module):
    """Two convolutions and what makes images, or rows, of theirs."""

    def __init__(self, end):
        super().__init__()
        self.first, self.second, self.end = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), end

    def forward(self, x):
        fine = torch.relu(self.first(x))
        return self.end(x, fine, torch.relu(self.second(fine)))


@pytest.mark.parametrize(
    "end",
    [
        lambda x, fine, coarse: coarse.mean((2, 3)),
        lambda x, fine, coarse: fine + F.interpolate(coarse, size=fine.shape[2:]),  # a feature pyramid's
        lambda x, fine, coarse: torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1),
    ],
    ids=["mean", "size", "factor"],
)
def test_images_of_other_sizes(end):
    model, x = Sized(end).eval(), torch.rand(8, 3, 16, 16)
    qmodel = pq.quantize(model, [x, torch.rand(8, 3, 24, 16)], strategy="dynamic", progress=False)
    assert qmodel.sizes is None
    for size in ((16, 16), (40, 24)):
        image = torch.rand(2, 3, *size)
        close(run(qmodel, (image,)), run(model, (image,)))


@pytest.mark.parametrize(
    "end",
    [
        lambda x, fine, coarse: coarse.sum((2, 3)) / (coarse.shape[2] * coarse.shape[3]),
        lambda x, fine, coarse: coarse.sum((2, 3)) / torch.tensor(coarse.shape[2:]).prod(),
        lambda x, fine, coarse: F.avg_pool2d(coarse, coarse.shape[2:]),
        lambda x, fine, coarse: F.interpolate(coarse, size=x.shape[2:], mode="bilinear"),
        lambda x, fine, coarse: F.max_pool2d(fine, 3, 2, ceil_mode=True),
        lambda x, fine, coarse: coarse.reshape(x.shape[0], 8, 16).mean(2),
    ],
    ids=["count", "constant", "window", "size", "ceil_mode", "reshape"],
)
def test_images_of_other_sizes_than_the_model_computes_with(end, tmp_path):
    """Wrong results without an error are the worst there is."""
    model, x = Sized(end).eval(), torch.rand(8, 3, 16, 16)
    qmodel = pq.quantize(model, [x], strategy="dynamic", progress=False)
    assert qmodel.sizes == [[None, 3, 16, 16]]
    close(run(qmodel, (x[:3],)), run(model, (x[:3],)))
    pq.save(qmodel, tmp_path / "sized.safetensors")
    message = r"the call has shape \[2, 3, 16, 20\] for input 0, want \[any, 3, 16, 16\]"
    for call in (qmodel, pq.load(tmp_path / "sized.safetensors"), copy.deepcopy(qmodel), lambda x: qmodel(x=x), qmodel.capture):
        with pytest.raises(ValueError, match=message):
            call(torch.rand(2, 3, 16, 20))
    with pytest.raises(ValueError, match=r"a calibration batch has shape \[8, 3, 18, 18\] for input 0, want \[any, 3, 16, 16\]"):
        pq.quantize(model, [x, torch.rand(8, 3, 18, 18)], strategy="dynamic", progress=False)


def test_sizes_are_checked_beside_other_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(288, 4)

        def forward(self, x, scale):
            return self.head(self.conv(x).flatten(1)) * scale

    qmodel = pq.quantize(Scaled().eval(), [(torch.rand(4, 3, 8, 8), 2.0)], strategy="dynamic", progress=False)
    for call in (lambda x: qmodel(x, 2.0), lambda x: qmodel(scale=2.0, x=x)):
        with pytest.raises(ValueError, match=r"the call has shape \[2, 3, 9, 9\] for input 0, want \[any, 3, 8, 8\]"):
            call(torch.rand(2, 3, 9, 9))


def test_what_cannot_be_exported_is_told():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) > 0 else self.conv(-x)

    with pytest.raises(RuntimeError, match="torch.export cannot capture Branches"):
        pq.quantize(Branches(), [torch.randn(4, 3, 8, 8)], progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# Looking inside


@pytest.mark.parametrize("name", ["resnet", "vit", "two_heads"])
def test_capture(name):
    model, qmodel, inputs = float_model(name), quantized(name), probe(name)
    output, layers = qmodel.capture(*inputs)
    same(pytree.tree_leaves(output), run(qmodel, inputs))
    wanted, reference = pq.capture(model, *inputs, like=qmodel)
    close(pytree.tree_leaves(wanted), run(model, inputs), 90.0)  # its batch norms are folded
    assert list(layers) == list(reference) == [layer.name for layer in qmodel.layers if layer.int8]
    for key, captured in layers.items():
        assert captured.value.dtype == torch.float32, key
        assert float(sqnr(reference[key].value.flatten(1), captured.value.flatten(1)).mean()) > 20, key
        if captured.clipped is not None:
            assert captured.clipped.shape == (6,) and int(captured.clipped.min()) >= 0, key
    assert list(pq.capture(model, *inputs)[1]) == list(layers)


def test_int8_models_do_not_train():
    qmodel = quantized("mobilenet")
    assert not qmodel.training
    with pytest.raises(RuntimeError, match="a QuantizedModel is for inference"):
        qmodel.train()
    assert qmodel.eval() is qmodel


def test_validate():
    qmodel = copy.deepcopy(quantized("mobilenet", "static"))
    pq.validate(qmodel)
    unit = next(iter(qmodel.int8_layers.children()))
    for leaf, index, value, message in (
        ("weight_scale", 0, torch.nan, "weight_scale holds a value that is not finite"),
        ("weight_scale", 0, -1.0, "weight_scale has a minimum of -1.0, want scales > 0"),
        ("bias", 1, torch.inf, "bias holds a value that is not finite"),
        ("weight", (0, 0, 0, 0), -128, r"weight holds -128, want codes in \[-127, 127\]"),
        ("fixed", 0, 0.0, "fixed is scale 0.0, zero point .*, want scale > 0"),
        ("fixed", 1, 256.0, "zero point 256.0, want scale > 0 and zero point in 0..255"),
    ):
        tensor = getattr(unit, leaf)
        before = tensor[index].clone()
        tensor[index] = value
        with pytest.raises(ValueError, match=message):
            pq.validate(qmodel)
        tensor[index] = before
    pq.validate(qmodel)


# ----------------------------------------------------------------------------------------------------------------------
# Files and copies


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    pq.save(quantized("mobilenet", surrogate="gaussian"), path)  # whose predictors are as long as any
    return path


@pytest.mark.parametrize("name", models.MODELS)
def test_save_and_load(name, tmp_path):
    for strategy in STRATEGIES:
        qmodel = quantized(name, strategy)
        pq.save(qmodel, tmp_path / "new folder" / "model.safetensors")
        loaded = pq.load(tmp_path / "new folder" / "model.safetensors")
        assert loaded.layers == qmodel.layers and loaded.settings == qmodel.settings
        assert str(loaded.summary()) == str(qmodel.summary())
        for count in (1, 6):
            inputs = pick(probe(name), slice(0, count))
            same(run(loaded, inputs), run(qmodel, inputs), strategy)
            with torch.no_grad():
                assert pytree.tree_structure(loaded(*inputs)) == pytree.tree_structure(qmodel(*inputs))
        assert list(loaded.capture(*inputs)[1]) == list(qmodel.capture(*inputs)[1])
    assert os.listdir(tmp_path / "new folder") == ["model.safetensors"]
    pq.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    same(run(pq.load(tmp_path / "again"), inputs), run(qmodel, inputs), "saved twice")


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_load_needs_a_file_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pq.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        pq.load(tmp_path)
    (tmp_path / "text").write_text("not a model")
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle")
    for name in ("text", "empty", "pickle"):
        with pytest.raises(ValueError, match=f"{name} is not a safetensors file"):
            pq.load(tmp_path / name)
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other was not written by probquant.save"):
        pq.load(tmp_path / "other")


def test_truncated_files(saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "cut"
    for length in (1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut is not a safetensors file"):
            pq.load(path)


def first(tensors, leaf):
    return next(name for name in tensors if name.endswith(f".{leaf}"))


def first_node(header, op):
    return next(node for node in header["nodes"] if node["op"] == op)


CODE = "__import__('os').abort()"
DAMAGES = {
    "format": lambda h, t: h.update(format=99),
    "no nodes": lambda h, t: h.pop("nodes"),
    "no layers": lambda h, t: h.update(layers=None),
    "an unknown op": lambda h, t: next(n for n in h["nodes"] if "conv2d" in n["target"]).update(target="op:probquant.conv9d.default"),
    "an unknown function": lambda h, t: next(n for n in h["nodes"] if "conv2d" in n["target"]).update(target="os:system"),
    "a function that calls": lambda h, t: first_node(h, "call_function").update(target="operator:call"),
    "a function that finds anything": lambda h, t: first_node(h, "call_function").update(target="operator:attrgetter"),
    "a method": lambda h, t: first_node(h, "call_function").update(op="call_method", target="numpy"),
    "a file": lambda h, t: first_node(h, "call_function").update(target="op:aten.from_file.default"),
    "no overload": lambda h, t: first_node(h, "call_function").update(target="op:aten.add.__call__"),
    "code as a node's name": lambda h, t: first_node(h, "call_function").update(name=f"x={CODE}"),
    "code as an input": lambda h, t: first_node(h, "placeholder").update(target=f"x={CODE}"),
    "code as an argument": lambda h, t: h["pytree"].update(arguments=[f"x={CODE}"]),
    "code as a keyword": lambda h, t: h["pytree"].update(
        arguments=["x", "y"], in_spec=pytree.treespec_dumps(pytree.tree_structure(((0,), {f"y':{CODE},'": 0})))
    ),
    "code as an option": lambda h, t: first_node(h, "call_function").update(kwargs={"dict": {f"x={CODE}": {"value": 1}}}),
    "code as a tensor's name": lambda h, t: first_node(h, "get_attr").update(target=f'a"+{CODE}+"'),
    "an unknown node": lambda h, t: h["nodes"][-1].update(args={"tuple": [{"node": "nobody"}]}),
    "an unknown value": lambda h, t: h["nodes"][-1].update(args={"tuple": [{"pickle": "x"}]}),
    "a wrong tree": lambda h, t: h["pytree"].update(in_spec="[]"),
    "a list": lambda h, t: [1, 2],
    "a missing tensor": lambda h, t: t.pop(first(t, "weight")),
    "a missing predictor": lambda h, t: t.pop(first(t, "predictor")),
    "a wrong dtype": lambda h, t: t.update({first(t, "weight"): t[first(t, "weight")].float()}),
    "a wrong shape": lambda h, t: t.update({first(t, "weight"): t[first(t, "weight")][..., :1, :1].contiguous()}),
    "a short predictor": lambda h, t: t.update({first(t, "predictor"): t[first(t, "predictor")][:3].clone()}),
    "a short scale": lambda h, t: t.update({first(t, "weight_scale"): torch.ones(1)}),
    "NaN": lambda h, t: t[first(t, "predictor")].fill_(torch.nan),
    "a zero scale": lambda h, t: t[first(t, "weight_scale")].zero_(),
    "-128": lambda h, t: t[first(t, "weight")].fill_(-128),
}
MISFITS = {"a wrong shape": "packed_weight has shape", "a short predictor": "predictor has 3 values"}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files(what, saved, tmp_path):
    with safetensors.safe_open(saved, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["probquant"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edited = DAMAGES[what](header, tensors)
    header = edited if what == "a list" else header
    path = tmp_path / "damaged"
    safetensors.torch.save_file(tensors, path, metadata={"probquant": json.dumps(header)})
    if what in MISFITS:  # sizes against each other are every op's to check
        with pytest.raises(RuntimeError, match=f"probquant: conv2d: {MISFITS[what]}"):
            pq.load(path)(*probe("mobilenet"))
    else:
        with pytest.raises(ValueError, match="probquant: "):
            pq.load(path)


def test_header_that_is_no_json(saved, tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "damaged", metadata={"probquant": "{"})
    with pytest.raises(ValueError, match="damaged is damaged or from another version"):
        pq.load(tmp_path / "damaged")


def test_saving_never_leaves_half_a_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(saved.read_bytes())

    def fail(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", fail)
        for target in (path, tmp_path / "new"):
            with pytest.raises(OSError, match="no space left"):
                pq.save(quantized("mobilenet"), target)
    assert os.listdir(tmp_path) == ["model"] and path.read_bytes() == saved.read_bytes()
    with pytest.raises(TypeError, match="save wants a QuantizedModel, got ResNet"):
        pq.save(float_model("resnet"), path)
    assert path.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", models.MODELS)
def test_copies(name):
    qmodel, inputs = quantized(name), probe(name, 2)
    wanted = run(qmodel, inputs)
    copied = copy.deepcopy(qmodel)
    same(run(copied, inputs), wanted, "deepcopy")
    same(run(pickle.loads(pickle.dumps(qmodel)), inputs), wanted, "pickle")
    with torch.no_grad():
        for tensor in copied.buffers():
            tensor.zero_()
    same(run(qmodel, inputs), wanted, "after its copy was overwritten")
    assert copied.layers == qmodel.layers and copied.layers is not qmodel.layers


def test_state_dict_round_trip():
    qmodel, inputs = quantized("mobilenet"), probe("mobilenet")
    other = copy.deepcopy(qmodel)
    other.load_state_dict(qmodel.state_dict())
    same(run(other, inputs), run(qmodel, inputs))


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile, torch.export


def test_compile():
    qmodel, inputs = quantized("resnet"), probe("resnet")
    compiled = torch.compile(qmodel, fullgraph=True, dynamic=True)
    for count in (6, 3):
        part = pick(inputs, slice(0, count))
        same(run(compiled, part), run(qmodel, part), "compiled")


@pytest.mark.parametrize("name", ["resnet", "two_heads"])
def test_export_with_a_dynamic_batch(name):
    qmodel, inputs = quantized(name), probe(name)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(qmodel, inputs, dynamic_shapes=shapes).module()
    for count in (6, 2, 5):
        part = pick(inputs, slice(0, count))
        same(run(exported, part), run(qmodel, part), "exported")


class LinearOnImage(nn.Module):
    """A linear layer over the width of a convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.linear(self.conv(x))


class SharedFloatInput(nn.Module):
    """One float tensor that a convolution reads as an image and a linear layer as rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.tanh(x)
        return torch.cat([self.conv(x).flatten(1), self.linear(x).flatten(1)], 1)


class ImageOfRows(nn.Module):
    """A convolution on a linear layer's 4-d output."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 16), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.conv(self.linear(x))


@pytest.mark.parametrize("strategy", ["static", "dynamic", "probabilistic"])
@pytest.mark.parametrize("network", [LinearOnImage, SharedFloatInput, ImageOfRows])
def test_images_and_rows_of_one_tensor(network, strategy):
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(4, 3, 16, 16)
    y, wanted = pq.quantize(model, [x], strategy=strategy, progress=False)(x), model(x)
    assert 10 * torch.log10(wanted.pow(2).sum() / (y - wanted).pow(2).sum()) > 30


def test_static_input_range_is_calibrated_where_nothing_else_is():
    model = nn.Sequential(nn.AvgPool2d(2), nn.Tanh(), nn.Conv2d(3, 4, 3)).eval()  # float in front, and a float output
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    qmodel = pq.quantize(model, [x], strategy="static", bias_correction=False, progress=False)
    with torch.no_grad():
        assert float(sqnr(model(x), qmodel(x)).min()) > 30
