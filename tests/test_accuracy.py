"""What benchmarks/accuracy.py is made of: the detector, its boxes, and the script's own rows."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if str(BENCHMARKS) in (getattr(module, "__file__", None) or "")]:
        del sys.modules[name]


# ----------------------------------------------------------------------------------------------------------------------
# YOLOX


def onnx_of(layers, path):
    """An ONNX file whose convolutions have the given layers' weights, one behind the other."""
    onnx = pytest.importorskip("onnx")
    tensors, nodes = [], []
    for i, layer in enumerate(layers):
        tensors += [onnx.numpy_helper.from_array(value.detach().numpy(), f"{leaf}{i}") for leaf, value in (("w", layer.weight), ("b", layer.bias))]
        nodes.append(onnx.helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"x{i + 1}"]))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "convolutions", [], [], tensors)), path)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]


def test_yolox_takes_the_weights_of_an_onnx_file(benchmarks, tmp_path):
    yolox = benchmarks("yolox")
    torch.manual_seed(3)
    source = yolox.YoloxNano().eval()
    onnx_of(convolutions(source), tmp_path / "nano.onnx")
    loaded = yolox.yolox_nano(tmp_path / "nano.onnx")
    x = torch.rand(2, 3, 416, 416)
    with torch.no_grad():
        assert loaded(x).shape == (2, 3549, 85) and torch.equal(loaded(x), source(x))
    onnx_of(convolutions(source)[1:], tmp_path / "short.onnx")
    with pytest.raises(ValueError, match="short.onnx has 112 convolutions, YOLOX-nano has 113"):
        yolox.yolox_nano(tmp_path / "short.onnx")
    onnx_of(convolutions(source)[::-1], tmp_path / "reversed.onnx")
    with pytest.raises(ValueError, match=r"reversed.onnx: convolution 0 has weight and bias \[\[1, 64, 1, 1\], \[1\]\], YOLOX-nano \[\[16, 12, 3, 3\]"):
        yolox.yolox_nano(tmp_path / "reversed.onnx")


def test_yolox_modules_stand_in_the_order_they_run_in(benchmarks):
    model, order = benchmarks("yolox").YoloxNano().eval(), []
    for layer in convolutions(model):
        layer.register_forward_hook(lambda layer, *_: order.append(layer))
    with torch.no_grad():
        model(torch.zeros(1, 3, 416, 416))
    assert len(order) == len(convolutions(model)) and all(a is b for a, b in zip(order, convolutions(model)))


def test_letterbox(benchmarks):
    yolox = benchmarks("yolox")
    picture = torch.full((3, 200, 320), 7, dtype=torch.uint8)
    canvas, factor = yolox.letterbox(picture)
    assert factor == 1.3 and canvas.shape == (3, 416, 416) and canvas.dtype == torch.uint8
    assert bool((canvas[:, :260] == 7).all()) and bool((canvas[:, 260:] == 114).all())


def test_decode(benchmarks):
    """A cell's box is centred on its corner plus the offset, in steps of its stride; its extent is an exponential."""
    yolox = benchmarks("yolox")
    output = torch.zeros(1, 3549, 85)
    cell = 52 * 52 + 3 * 26 + 5  # stride 16, row 3, column 5
    output[0, cell, :6] = torch.tensor([0.5, 0.25, 0.0, torch.log(torch.tensor(2.0)), 0.5, 0.75])
    boxes, scores = yolox.decode(output)
    assert torch.allclose(boxes[0, cell], torch.tensor([5.5 * 16 - 8, 3.25 * 16 - 16, 5.5 * 16 + 8, 3.25 * 16 + 16]))
    assert float(scores[0, cell, 0]) == 0.375 and int((scores > 0).sum()) == 1


def test_non_maximum_suppression(benchmarks):
    yolox = benchmarks("yolox")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores = torch.zeros(4, 80)
    scores[:, 3] = torch.tensor([0.5, 0.9, 0.8, 0.0005])  # the first overlaps the second by 0.9, the third by 0.5
    scores[0, 7] = 0.4  # another class is no rival
    kept, found, classes = yolox.non_maximum_suppression(boxes, scores)
    assert torch.equal(kept, boxes[[1, 2, 0]]) and found.tolist() == pytest.approx([0.9, 0.8, 0.4]) and classes.tolist() == [3, 3, 7]
    assert [len(part) for part in yolox.non_maximum_suppression(boxes, scores, limit=2)] == [2, 2, 2]
    assert [len(part) for part in yolox.non_maximum_suppression(boxes, torch.zeros(4, 80))] == [0, 0, 0]
