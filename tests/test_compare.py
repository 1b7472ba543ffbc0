"""compare(): its figures against numpy, its table, JSON and page."""

import json
import math
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

import probquant as pq
from probquant.compare import Comparison, compare, latency, mean_and_worst1, peak_activation_bytes, sqnr, write_text

ROW_KEYS = [
    "strategy", "shift", "top1", "agreement", "sqnr_mean", "sqnr_worst1", "clipped", "ms", "peak_activation_bytes",
]  # fmt: skip


def decibels(reference, approximation):
    reference, approximation = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (reference, approximation))
    return 10 * np.log10((reference**2).sum(1) / ((approximation - reference) ** 2).sum(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 16, 16, generator=generator) for n in (6, 6, 3)]


@pytest.fixture(scope="module")
def qmodels(model, batches):
    return {name: pq.quantize(model, batches[:1], strategy=name, progress=False) for name in ("static", "probabilistic")}


@pytest.fixture(scope="module")
def labels(model, batches):
    """The classes of float32, the first three wrong, the last unknown."""
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in batches])
    found[:3] = (found[:3] + 1) % 10
    found[-1] = -1
    return found.tolist()


@pytest.fixture(scope="module")
def result(model, qmodels, batches, labels):
    return compare(model, qmodels, iter(batches), labels, shift="test", layer_images=8, rounds=3, progress=False)


def test_sqnr_is_the_ratio_of_energies():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 3, 8, 8, generator=generator)
    approximation = reference + torch.logspace(-4, 1, 5).view(5, 1, 1, 1) * torch.randn(5, 3, 8, 8, generator=generator)
    np.testing.assert_allclose(sqnr(reference, approximation), decibels(reference, approximation), rtol=0, atol=1e-4)
    assert sqnr(torch.ones(1, 100), torch.full((1, 100), 1.1)).item() == pytest.approx(20, abs=1e-4)


def test_sqnr_edges():
    reference = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    other = torch.tensor([[1.0, 2.0], [0.0, 1.0], [math.nan, 2.0], [1.0, math.inf], [1e30, 0.0]])
    exact, no_signal, *broken = sqnr(reference, other).tolist()
    assert exact == 138.5 and math.isnan(no_signal) and broken == [-138.5] * 3
    assert sqnr(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        sqnr(torch.ones(1, 2), torch.ones(1, 3))


def test_worst_hundredth():
    assert mean_and_worst1([3.0, 1.0, 2.0]) == (2.0, 1.0)
    assert mean_and_worst1([float(v) for v in range(500)]) == (249.5, 2.0)
    assert mean_and_worst1([5.0, math.nan]) == (5.0, 5.0)
    assert mean_and_worst1([math.nan]) == mean_and_worst1([]) == (None, None)


def test_rows_against_numpy(result, model, qmodels, batches, labels):
    assert [row["strategy"] for row in result.rows] == ["float32", "static", "probabilistic"]
    known = np.array(labels) >= 0
    with torch.no_grad():
        reference = np.concatenate([model(batch).numpy() for batch in batches])
        for row, network in zip(result.rows, (model, *qmodels.values())):
            assert list(row) == ROW_KEYS and row["shift"] == "test"
            output = np.concatenate([network(batch).numpy() for batch in batches])
            assert row["top1"] == np.mean(output.argmax(1)[known] == np.array(labels)[known])
            assert row["agreement"] == np.mean(output.argmax(1) == reference.argmax(1))
            assert row["ms"] > 0 and row["peak_activation_bytes"] > 0
            if network is model:
                assert row["agreement"] == 1 and row["top1"] == 11 / 14
                assert row["sqnr_mean"] is row["sqnr_worst1"] is row["clipped"] is None
            else:
                expected = decibels(reference, output)
                assert row["sqnr_mean"] == pytest.approx(expected.mean(), abs=1e-3)
                assert row["sqnr_worst1"] == pytest.approx(expected.min(), abs=1e-3)
                np.testing.assert_allclose(result.image_sqnr[row["strategy"], "test"], expected, atol=1e-3)
    assert result.setup["images"] == 15 and result.setup["layer_images"] == 12 and result.setup["batch"] == 1


@torch.no_grad()
def test_layers_against_capture(result, model, qmodels, batches):
    seen = torch.cat(batches[:2])  # the batches that hold the first 8 images
    for row in result.rows[1:]:
        _, reference = pq.capture(model, seen, like=qmodels[row["strategy"]])
        _, captured = pq.capture(qmodels[row["strategy"]], seen)
        told = {layer["layer"]: layer for layer in result.layers if layer["strategy"] == row["strategy"]}
        assert set(told) == set(captured) & set(reference) and told
        kinds = {layer.name: layer.kind for layer in qmodels[row["strategy"]].layers}
        clipped = written = 0
        for name, layer in captured.items():
            expected = decibels(reference[name].value, layer.value)
            assert told[name]["sqnr_mean"] == pytest.approx(np.nanmean(expected), abs=1e-3)
            assert told[name]["sqnr_worst1"] == pytest.approx(np.nanmin(expected), abs=1e-3)
            assert told[name]["kind"] == kinds.get(name, "")
            if layer.clipped is not None:
                assert told[name]["clipped"] == int(layer.clipped.sum()) / layer.value.numel()
                clipped, written = clipped + int(layer.clipped.sum()), written + layer.value.numel()
        assert row["clipped"] == clipped / written


def test_one_model_without_labels(model, qmodels, batches):
    result = compare(model, qmodels["static"], batches, rounds=1, progress=False)
    assert [row["strategy"] for row in result.rows] == ["float32", "static"]
    assert [row["top1"] for row in result.rows] == [None, None]
    assert [row["shift"] for row in result.rows] == ["clean", "clean"]


def test_wrong_arguments_are_named(model, qmodels, batches):
    with pytest.raises(ValueError, match="3 labels for 15 images"):
        compare(model, qmodels, batches, [1, 2, 3], rounds=1, progress=False)
    with pytest.raises(ValueError, match="no images"):
        compare(model, qmodels, [], progress=False)
    with pytest.raises(ValueError, match="float32"):
        compare(model, {"float32": qmodels["static"]}, batches, progress=False)
    with pytest.raises(ValueError, match="at least one"):
        compare(model, {}, batches, progress=False)
    with pytest.raises(TypeError, match="qmodels is a list, want a QuantizedModel, or a dict of them by name"):
        compare(model, [qmodels["static"]], batches, progress=False)
    with pytest.raises(TypeError, match="model is a QuantizedModel, want a float torch.nn.Module"):
        compare(qmodels["static"], qmodels, batches, progress=False)


def test_batches_may_come_with_labels(model, qmodels, batches, result):
    """As a DataLoader gives them: lists of images and labels."""
    labelled = [[batch, torch.zeros(len(batch))] for batch in batches]
    found = compare(model, qmodels, labelled, shift="test", layer_images=8, rounds=1, progress=False)
    assert found.image_sqnr == result.image_sqnr


def test_table_json_and_joining(result, tmp_path):
    lines = result.table().splitlines()
    assert len(lines) == 1 + 1 + len(result.rows)
    assert "top-1" in lines[0] and "probabilistic" in lines[-1] and "78.6 %" in lines[2]
    assert {layer["layer"] for layer in result.layers} <= set(result.layer_table().split())

    file = tmp_path / "rows.json"
    assert json.loads(result.to_json(file)) == result.rows == json.loads(file.read_text())

    other = Comparison([{**row, "shift": "dark"} for row in result.rows], [], {("static", "dark"): [1.0]}, {}, result.setup)
    joined = Comparison.joined([result, other])
    assert joined.rows == result.rows + other.rows
    assert joined.image_sqnr == {**result.image_sqnr, ("static", "dark"): [1.0]} and joined.setup == result.setup


def test_page_is_self_contained(result, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "report.html"
    result.to_html(file, "A <title>", ["Some & text."])
    text = file.read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in text and "Some &amp; text." in text
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s>)]+)', text)
    assert len(sources) == 3 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in text and "@import" not in text
    for layer in result.layers:
        assert f">{layer['layer']}<" in text


def test_files_are_written_in_one_step(tmp_path):
    file = tmp_path / "x.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "n" * 100_000 + "\ud800")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    write_text(file, "new")
    assert file.read_text() == "new"


def test_peak_memory_counts_what_lives_at_once():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(5):
                x = torch.neg(x)  # the old and the new one live together, except at first, when the old one is the input
            return x

    class Tree(nn.Module):
        def forward(self, x):
            return torch.neg(x), torch.neg(x), torch.neg(x)

    x = torch.zeros(1000)
    assert peak_activation_bytes(Chain(), x) == 8000
    assert peak_activation_bytes(Tree(), x) == 12000
    assert peak_activation_bytes(nn.Identity(), x) == 0


def test_latency_is_per_image_and_in_order():
    class Sleep(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            time.sleep(self.seconds)

    times = latency({"slow": Sleep(0.02), "fast": Sleep(0.004)}, (torch.zeros(2, 1),), rounds=3)
    for name, wanted in (("slow", 10), ("fast", 2)):
        median, minimum = times[name]
        assert wanted <= minimum <= median < 5 * wanted
