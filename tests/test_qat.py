"""Quantization-aware training: the int8 graph's own bytes forward, straight-through gradients backward."""

import functools

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import probquant as pq
from probquant import qat
from probquant.compare import sqnr


@functools.cache
def float_model(name):
    return models.build(name)


@functools.cache
def quantized(name, **options):
    return pq.quantize(float_model(name), [models.images(name, 16, seed=s) for s in range(2)], progress=False, **options)


def leaves(output):
    return pytree.tree_leaves(output)


def distillation(name, batches=4, size=8):
    """Inputs with the float model's outputs as targets."""
    inputs = [models.images(name, size, seed=200 + i) for i in range(batches)]
    with torch.no_grad():
        return [(x, float_model(name)(*x)) for x in inputs]


CASES = [
    ("resnet", {"strategy": "static"}), ("resnet", {}), ("resnet", {"surrogate": "gaussian_channel", "gamma": 2}), ("mobilenet", {"surrogate": "channel"}),
    ("mobilenet", {"surrogate": "probe"}), ("yolo", {}), ("efficientnet", {"strategy": "dynamic"}), ("two_heads", {"weight_rounding": "gptq"}), ("vit", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES])
def test_forward_is_the_int8_graph(name, options, monkeypatch):
    """To the bit, before and after training; and the float function beside each op is within one code of it where it is not clipped."""
    seen, checked = [], []
    straight_through, run_op = qat._StraightThrough.apply, qat._run_op

    def watched_straight_through(real, exact, inside):
        seen.append((real, exact, inside))
        return straight_through(real, exact, inside)

    def watched_op(target, args, kwargs):
        result = run_op(target, args, kwargs)
        if isinstance(result, tuple) and isinstance(result[0], qat._Codes):
            (real, exact, inside), scale = seen[-1], result[1]
            step = scale.reshape(*scale.shape, *[1] * (exact.dim() - scale.dim()))
            codes_off = ((real.detach() - exact).abs() / step)[inside]
            assert float(codes_off.max()) < 1.0, f"{target}: {float(codes_off.max())} codes off"
            checked.append(target)
        return result

    qmodel = quantized(name, **options)
    trainable = qat.Trainable(qmodel)
    x = models.images(name, 4, seed=50)
    monkeypatch.setattr(qat._StraightThrough, "apply", watched_straight_through)
    monkeypatch.setattr(qat, "_run_op", watched_op)
    assert all(torch.equal(a, b) for a, b in zip(leaves(trainable(*x)), leaves(qmodel(*x)), strict=True))
    assert len(checked) >= sum(layer.int8 for layer in qmodel.layers if layer.strategy != "float32 output")
    optimizer = torch.optim.Adam(trainable.parameters(), lr=0.7)
    sum(part.square().mean() for part in leaves(trainable(*x))).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool(p.grad.any()) for p in trainable.layers.parameters())
    optimizer.step()
    trained = trainable.convert()
    assert all(torch.equal(a, b) for a, b in zip(leaves(trainable(*x)), leaves(trained(*x)), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(leaves(trained(*x)), leaves(qmodel(*x)), strict=True))


def test_gradients_pass_straight_through():
    """Against the chain rule by hand: rounding has slope 1, what was clipped slope 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 5)).eval()
    x, c = 3 * torch.randn(40, 12), torch.randn(40, 5)
    qmodel = pq.quantize(model, [torch.randn(64, 12)], strategy="static", progress=False)
    trainable = qat.Trainable(qmodel)
    (trainable(x) * c).sum().backward()
    first, second = trainable.layers.values()
    w1, w2 = (layer.weight.detach() * layer.scale[:, None] for layer in (first, second))  # nothing is trained yet: they are codes
    x_codes = pq.ops.quantize(x)
    inputs = pq.ops.dequantize(*x_codes[:3])
    real = F.linear(inputs, w1, first.first_bias)
    fixed = qmodel.get_submodule("int8_layers").get_submodule(next(iter(trainable.layers))).fixed
    low, high = (-fixed[1] - 0.5) * fixed[0], (255.5 - fixed[1]) * fixed[0]
    inside = ((real >= low) & (real <= high)).float()
    assert 0.02 < 1 - float(inside.mean()) < 0.9
    hidden = pq.capture(qmodel, x)[1]["0"].value
    torch.testing.assert_close(second.weight.grad, second.scale[:, None] * (c.T @ hidden))
    torch.testing.assert_close(first.weight.grad, first.scale[:, None] * (((c @ w2) * inside).T @ inputs))
    torch.testing.assert_close(first.bias.grad, first.bias_step * ((c @ w2) * inside).sum(0))


@pytest.mark.parametrize("options", [{"strategy": "static"}, {"surrogate": "gaussian_channel"}], ids=["static", "predicted"])
def test_training_closes_in_on_the_float_model(options):
    """From weights that noise has moved by several codes, judged on images that were not trained on."""
    trainable = qat.Trainable(quantized("mobilenet", **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in trainable.layers.values():
            layer.weight += 0.1 * layer.weight.std() * torch.randn_like(layer.weight)  # about 4 codes
    moved = trainable.convert()
    losses = qat.train(trainable, distillation("mobilenet", 8), F.mse_loss, epochs=6, learning_rate=0.2, progress=False)
    assert losses[-1] < 0.5 * losses[0], losses
    x = models.images("mobilenet", 32, seed=60)
    with torch.no_grad():
        reference = float_model("mobilenet")(*x)
        before, after = (float(sqnr(reference, model(*x)).mean()) for model in (moved, trainable.convert()))
    assert after > before + 3.0, (before, after)


def test_training_repeats_itself_and_leaves_the_generator(tmp_path):
    batches = torch.utils.data.DataLoader([(x[0][0], y[0]) for x, y in distillation("resnet", 6, 1)], 2, shuffle=True)
    results = []
    for _ in range(2):
        trainable = qat.Trainable(quantized("resnet"))
        state = torch.random.get_rng_state()
        losses = qat.train(trainable, batches, F.mse_loss, epochs=2, seed=5, progress=False)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.rand(3)
        results.append((losses, trainable.convert()))
    assert results[0][0] == results[1][0] and len(results[0][0]) == 2
    x = models.images("resnet", 4)
    assert torch.equal(results[0][1](*x), results[1][1](*x))
    pq.save(results[0][1], tmp_path / "trained.safetensors")
    assert torch.equal(pq.load(tmp_path / "trained.safetensors")(*x), results[0][1](*x))


def test_errors():
    with pytest.raises(TypeError, match="Trainable wants a QuantizedModel, got Linear"):
        qat.Trainable(nn.Linear(2, 2))
    trainable = qat.Trainable(quantized("resnet"))
    with pytest.raises(ValueError, match="batches is empty"):
        qat.train(trainable, [], F.mse_loss)
    with pytest.raises(ValueError, match="epochs is 0"):
        qat.train(trainable, distillation("resnet", 1), F.mse_loss, epochs=0)
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 1"):
        qat.train(trainable, distillation("resnet", 1), lambda y, t: y.sum() * float("nan"), progress=False)
