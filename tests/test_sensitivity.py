"""sensitivity(): finds the layer that int8 hurts, and what it proposes does what it says."""

import pytest
import torch
from torch import nn

import probquant as pq
from probquant.compare import joined_outputs, sqnr


@pytest.fixture(scope="module")
def network():
    """Two like layers in turn; the weights of layer 2 are spread so widely within each output that int8 loses most of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        model[2].weight[:, 0] = 0  # a channel without effect ...
        model[0].weight[0] = 0
        model[0].bias[0] = 0
        model[2].weight[:, 0] = 40.0  # ... whose weights take the whole range of every output
    return model.eval()


@pytest.fixture(scope="module")
def batches():
    return [torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


SETTINGS = {"strategy": "static", "channel_profile": False}


@pytest.fixture(scope="module")
def found(network, batches):
    return pq.sensitivity(network, SETTINGS, batches, images=8, rounds=1, progress=False)


def output_sqnr(network, qmodel, images):
    with torch.no_grad():
        return sqnr(network(images), joined_outputs(qmodel(images), len(images))).mean().item()


def test_finds_the_layer_that_int8_hurts(found):
    assert found.rows[0]["layer"] == "2" and found.exclude[0] == "2"
    assert found.rows[0]["gain"] > 3 > found.rows[1]["gain"]
    assert [row["gain"] for row in found.rows] == sorted((row["gain"] for row in found.rows), reverse=True)
    assert {row["layer"] for row in found.rows} == {"0", "2", "4", "6"}
    assert sum(row["weights"] for row in found.rows) == pytest.approx(1)


def test_proposal_is_what_quantize_gives(found, network, batches):
    images = torch.cat(batches)[:8]
    assert found.sqnr == pytest.approx(output_sqnr(network, pq.quantize(network, batches, progress=False, **SETTINGS), images), abs=1e-3)
    kept = pq.quantize(network, batches, progress=False, exclude=found.exclude, **SETTINGS)
    assert found.sqnr_excluded == pytest.approx(output_sqnr(network, kept, images), abs=1e-3)
    assert found.sqnr_excluded > found.sqnr + 3


def test_model_is_left_alone_and_gives_the_settings(network, batches):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    qmodel = pq.quantize(network, batches, exclude=["6"], progress=False, **SETTINGS)
    again = pq.sensitivity(network, qmodel, batches, layers=["[02]"], most=1, minimum_gain=100.0, images=8, rounds=1, progress=False)
    assert {row["layer"] for row in again.rows} == {"0", "2"}
    assert again.exclude == [] and again.sqnr_excluded is None and "No layer" in again.table()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_table_says_what_the_proposal_buys(found):
    text = found.table()
    assert f"exclude={found.exclude}" in text and f"{found.sqnr_excluded:.2f} dB" in text and "of the weights stay float" in text


def test_report_has_a_section(found, network, batches, tmp_path):
    qmodel = pq.quantize(network, batches[:1], progress=False, **SETTINGS)
    result = pq.compare(network, qmodel, batches[:1], rounds=1, progress=False)
    result.to_html(tmp_path / "report.html", sensitivity=found)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Layers kept in float" in text and f"{found.sqnr_excluded:.2f} dB" in text
    result.to_html(tmp_path / "report.html")
    assert "Layers kept in float" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_such_layer_is_an_error(network, batches):
    with pytest.raises(ValueError, match=r"layers is \['nothing'\], want patterns that match int8 layers: \['0', '2', '4', '6'\]"):
        pq.sensitivity(network, SETTINGS, batches, layers=["nothing"], progress=False)


def test_arguments_in_the_wrong_order(network, batches):
    with pytest.raises(TypeError, match="settings is a Sequential, want a QuantizedModel, or keyword arguments"):
        pq.sensitivity(network, network, batches, progress=False)


def test_one_layer_is_nothing_to_compare():
    with pytest.raises(ValueError, match="0 is the only int8 layer"):
        pq.sensitivity(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), SETTINGS, [torch.randn(2, 3, 8, 8)], progress=False)


def test_never_proposes_every_layer(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 2)).eval()
    found = pq.sensitivity(model, SETTINGS, batches, most=9, minimum_gain=-100.0, images=8, rounds=1, progress=False)
    assert len(found.exclude) == 1
