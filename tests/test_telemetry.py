"""Telemetry: its counts against the ops' own stats, under threads, torch.compile, export and a saved model; the alarm."""

import threading

import pytest
import torch
from models import MobileNetV2, ResNet
from torch import nn

import probquant as pq
from probquant.quantize import capture


class Tokens(nn.Module):
    """Layers with a scale per token."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return x + self.second(torch.nn.functional.gelu(self.first(self.norm(x))))


def images(seed, *shape, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Windows(nn.Module):
    """A linear layer whose rows, and a convolution whose images, are more than the model's images."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):  # [N, 2, 4, 6, 8]
        x = self.linear(x.reshape(-1, 8)).relu().reshape(-1, 4, 6, 8)
        return self.head(self.conv(x).mean((2, 3))).reshape(-1, 2, 3)


SHAPES = {Windows: (2, 4, 6, 8), ResNet: (3, 32, 32), MobileNetV2: (3, 32, 32), Tokens: (10, 24)}


def quantized(make, strategy="static"):
    torch.manual_seed(0)
    return pq.quantize(make().eval(), [images(1, 8, *SHAPES[make])], strategy=strategy, criterion="mse", progress=False)


@pytest.fixture(scope="module")
def qmodel():
    return quantized(ResNet)


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("strategy", ["static", "probabilistic", "dynamic"])
def test_counts_are_those_of_the_ops(make, strategy):
    qmodel = quantized(make, strategy)
    telemetry = qmodel.telemetry()
    batches = [images(2, 5, *SHAPES[make], spread=3.0), images(3, 2, *SHAPES[make])]
    clipped, values = {}, {}
    for batch in batches:
        assert torch.equal(telemetry(batch), qmodel(batch))
        for name, layer in capture(qmodel, batch)[1].items():
            if layer.clipped is not None:
                clipped[name] = clipped.get(name, 0) + int(layer.clipped.sum())
                values[name] = values.get(name, 0) + layer.value.numel()
    rows = {row["layer"]: row for row in telemetry.rows()}
    assert set(rows) == set(clipped)
    for name, row in rows.items():
        assert (row["images"], row["values"], row["invalid"]) == (7, values[name], 0)
        assert row["clipped"] == clipped[name] / values[name]
    assert strategy != "static" or any(row["clipped"] > 0 for row in rows.values())


@pytest.mark.parametrize(("make", "samples"), [(ResNet, 1), (Tokens, 2)])
def test_invalid_samples_are_counted_and_do_not_clip(make, samples):
    telemetry = quantized(make, "probabilistic").telemetry()
    batch = images(2, 4, *SHAPES[make])
    batch[1].view(-1)[0] = float("nan")  # one image; of tokens the first ...
    batch[1].view(-1)[-1] = float("inf")  # ... and the last
    telemetry(batch)
    for row in telemetry.rows():
        assert row["invalid"] == samples
        assert row["clipped"] is not None and row["clipped"] >= 0
    assert [row["layer"] for row in telemetry.drifted()] == [row["layer"] for row in telemetry.rows()]


def test_reset_starts_again(qmodel):
    telemetry = qmodel.telemetry()
    telemetry(images(2, 2, 3, 32, 32))
    telemetry.reset()
    assert all(row["images"] == row["values"] == 0 and row["clipped"] is None for row in telemetry.rows())


def test_threads_lose_nothing(qmodel):
    telemetry, batch = qmodel.telemetry(), images(2, 2, 3, 32, 32, spread=3.0)
    telemetry(batch)
    once = telemetry.rows()
    telemetry.reset()
    threads = [threading.Thread(target=lambda: [telemetry(batch) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row, one in zip(telemetry.rows(), once, strict=True):
        assert (row["images"], row["values"]) == (80, 40 * one["values"])
        assert row["clipped"] == one["clipped"]


def test_saved_model_has_the_calibrated_shares(qmodel, tmp_path):
    pq.save(qmodel, tmp_path / "model.safetensors")
    batch = images(2, 3, 3, 32, 32, spread=3.0)
    found = []
    for model in (qmodel, pq.load(tmp_path / "model.safetensors")):
        telemetry = model.telemetry()
        telemetry(batch)
        found.append(telemetry.rows())
    assert found[0] == found[1]
    assert all(row["calibrated"] is not None for row in found[0])


def test_calibrated_share_is_that_of_the_calibration_images(qmodel):
    telemetry = qmodel.telemetry()
    telemetry(images(1, 8, 3, 32, 32))
    assert all(row["clipped"] == row["calibrated"] for row in telemetry.rows())
    assert telemetry.drifted(factor=1.0) == []


def test_drift_shows(qmodel):
    telemetry = qmodel.telemetry()
    telemetry(images(2, 8, 3, 32, 32, spread=4.0))
    drifted = telemetry.drifted(factor=4.0)
    assert drifted and all(row["clipped"] > 4 * row["calibrated"] for row in drifted)


@pytest.mark.parametrize(("factor", "floor"), [(0.0, 0.1), (float("nan"), 0.1), (1.0, -0.1)])
def test_senseless_alarms_are_errors(qmodel, factor, floor):
    with pytest.raises(ValueError, match="want a factor > 0 and a floor >= 0"):
        qmodel.telemetry().drifted(factor, floor)


def test_compiled_and_exported_graphs_count_the_same(qmodel):
    batch = images(2, 3, 3, 32, 32, spread=3.0)
    plain = qmodel.telemetry()
    expected = plain(batch)

    compiled = qmodel.telemetry(lambda graph: torch.compile(graph, fullgraph=True, backend="aot_eager"))
    assert torch.equal(compiled(batch), expected)
    assert compiled.rows() == plain.rows()

    program = torch.export.export(plain.graph, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    exported = qmodel.telemetry()
    for part in (batch[:2], batch[2:]):
        _, counts = program(part)
        exported.update(counts, part)
    assert exported.rows() == plain.rows()


def test_other_counts_are_an_error(qmodel):
    with pytest.raises(ValueError, match="counts is torch.int64"):
        qmodel.telemetry().update(torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, 3, 32, 32))


def test_empty_batch_counts_nothing(qmodel):
    telemetry = qmodel.telemetry()
    telemetry(torch.zeros(0, 3, 32, 32))
    assert all(row["images"] == row["values"] == 0 for row in telemetry.rows())


def test_model_without_quantized_outputs():
    model = nn.Conv2d(3, 4, 3).eval()
    telemetry = pq.quantize(model, [images(1, 2, 3, 8, 8)], progress=False).telemetry()
    assert telemetry(images(2, 2, 3, 8, 8)).shape == (2, 4, 6, 6)
    assert telemetry.rows() == [] and telemetry.drifted() == []
