"""What benchmarks/accuracy.py is made of: the detector, its boxes, and the script's own rows."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probquant as pq
from probquant.corruptions import corrupt

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


# ----------------------------------------------------------------------------------------------------------------------
# Judging


def test_paired_interval(benchmarks):
    """Its coverage on simulated pairs; what did not change gives an interval around 0."""
    interval = benchmarks("tasks").paired_interval
    low, high = interval(0, 0, 500)
    assert low == pytest.approx(-high) and 0 < high < 0.005
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        lost, won, _ = rng.multinomial(500, [0.03, 0.01, 0.96])
        low, high = interval(int(lost), int(won), 500)
        inside += low <= 0.02 <= high
    assert 0.93 < inside / 2000 < 0.975


def test_classification_is_judged_by_pairs(benchmarks):
    tasks = benchmarks("tasks")
    task = tasks.Classification("t", torch.nn.Identity(), tasks.Preprocessing(8, 8), torch.zeros(0), torch.zeros(0), [0, 1, 2, 3])
    assert task.keep(torch.tensor([[0.1, 0.9], [2.0, 1.0]]), 0) == [1, 0]
    judged = task.judge([0, 1, 9, 9], [0, 8, 2, 8])
    assert judged["top1"] == (0.5, 0.5) and judged["agreement"] == (0.25, 1.0) and judged["drop"] == (0.0, 0.0)
    assert judged["drop_low"][0] < 0 < judged["drop_high"][0]


@pytest.fixture
def coco_folder(tmp_path):
    """Twenty pictures with one box each, in COCO's layout."""
    pytest.importorskip("pycocotools")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    pictures, boxes = [], []
    for i in range(20):
        Image.new("RGB", (100, 80), (i, 0, 0)).save(tmp_path / "val2017" / f"{i}.png")
        pictures.append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 80})
        boxes.append({"id": i + 1, "image_id": i, "category_id": 1, "bbox": [10, 20, 40, 30], "area": 1200, "iscrowd": 0})
    categories = [{"id": i + 1, "name": str(i)} for i in range(80)]
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps({"images": pictures, "annotations": boxes, "categories": categories}))
    return tmp_path


def test_detection_is_judged_by_coco(benchmarks, coco_folder, tmp_path):
    tasks, yolox = benchmarks("tasks"), benchmarks("yolox")
    onnx_of(convolutions(yolox.YoloxNano()), tmp_path / "nano.onnx")
    task = tasks.coco(str(tmp_path / "nano.onnx"), str(coco_folder), None, 5, None)
    assert len(task.evaluation) == 20 and len(task.calibration) == 5
    (batch,) = task.pictures(task.evaluation[:2], 8)
    assert batch.shape == (2, 3, 416, 416) and batch.dtype == torch.uint8

    output = torch.full((20, 3549, 85), -9.0)  # no box anywhere
    output[..., 4:] = 0
    factor, cell = 4.16, 5 * 52 + 7  # a box of 40 x 30 at (10, 20), of class 0
    centre = [(10 + 20) * factor / 8 - 7, (20 + 15) * factor / 8 - 5]
    output[:, cell, :6] = torch.tensor([*centre, np.log(40 * factor / 8), np.log(30 * factor / 8), 1.0, 0.9])
    perfect = task.keep(output, 0)
    assert [len(boxes) for boxes in perfect] == [1] * 20
    assert perfect[3][0]["image_id"] == 3 and perfect[3][0]["category_id"] == 1
    assert perfect[3][0]["bbox"] == pytest.approx([10, 20, 40, 30], abs=1e-3)
    judged = task.judge(perfect, perfect)
    assert judged["ap"] == pytest.approx((1.0, 1.0)) and judged["drop"][0] == judged["drop_low"][0] == judged["drop_high"][0] == 0
    tasks._GROUPS = 20  # a picture each: without one, what is left is judged, and nothing else
    only_first = task._precisions([perfect[0], *[[]] * 19])
    assert [ap for ap, _ in only_first] == pytest.approx([only_first[0][0], 0.0, *[only_first[2][0]] * 19]) and only_first[0][0] > 0
    half = task.judge([boxes if i % 2 else [] for i, boxes in enumerate(perfect)], perfect)
    assert half["ap"][0] == pytest.approx(0.5, abs=0.01) and half["drop"][0] == pytest.approx(0.5, abs=0.01)
    assert half["drop_low"][0] < half["drop"][0] < half["drop_high"][0] < 1
    assert task.judge([[]] * 20, perfect)["ap"] == (0.0, pytest.approx(1.0))


def test_no_picture_both_calibrates_and_is_evaluated(benchmarks, coco_folder, tmp_path):
    tasks, yolox = benchmarks("tasks"), benchmarks("yolox")
    onnx_of(convolutions(yolox.YoloxNano()), tmp_path / "nano.onnx")
    with pytest.raises(ValueError, match="20 pictures would calibrate and be evaluated"):
        tasks.coco(str(tmp_path / "nano.onnx"), str(coco_folder), str(coco_folder / "val2017"), None, None)
    torch.save({"state_dict": benchmarks("resnet20").ResNet20().state_dict()}, tmp_path / "r.th")
    x = np.arange(20 * 32 * 32 * 3).reshape(20, 32, 32, 3) % 251
    np.savez(tmp_path / "c.npz", x=x.astype(np.uint8), y=np.zeros(20, dtype=np.uint8))
    task = tasks.cifar10(str(tmp_path / "r.th"), str(tmp_path / "c.npz"), 8, None)
    assert len(task.calibration) == 8 and len(task.evaluation) == 12
    assert not {p.numpy().tobytes() for p in task.calibration} & {p.numpy().tobytes() for p in task.evaluation}


# ----------------------------------------------------------------------------------------------------------------------
# Shifts and strategies


def test_parse_shift(benchmarks):
    parse = benchmarks("accuracy").parse_shift
    assert [parse(text) for text in ("clean", "dark", "fog:5", "mixed", "size:160")] == [("clean", 3), ("dark", 3), ("fog", 5), ("mixed", 3), ("size", 160)]
    for wrong in ("snow", "dark:6", "dark:x", "clean:2", "size", "dark:0"):
        with pytest.raises(ValueError, match=f"shift '{wrong}'"):
            parse(wrong)


def test_mixed_gives_every_picture_its_own_shift(benchmarks):
    mixed = benchmarks("accuracy")._mixed
    picture = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    choice = random.Random(5)
    from probquant.corruptions import CORRUPTIONS

    assert torch.equal(mixed(picture, 5), corrupt(picture, choice.choice(["clean", *CORRUPTIONS]), choice.randint(1, 5)))
    assert len({mixed(picture, i).numpy().tobytes() for i in range(20)}) > 10


def test_history_uses_the_ranges_of_the_pictures_before(benchmarks):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3), torch.nn.Conv2d(4, 2, 1)).eval()
    pictures = torch.randn(6, 3, 12, 12)
    dynamic = pq.quantize(model, [pictures], strategy="dynamic", progress=False)
    with torch.no_grad():
        history = benchmarks("accuracy").History(dynamic)
        assert torch.equal(history(pictures[:1]), dynamic(pictures[:1]))  # nothing was before: its own range
        (first,) = {node: r for node, r in history.ranges.items() if node.name == next(iter(history.ranges)).name}.values()
        again = benchmarks("accuracy").History(dynamic)
        again(pictures[:1])
        loud = again(10 * pictures[1:2])  # clipped to the quiet one's range
        assert float(loud.abs().max()) < 0.5 * float(dynamic(10 * pictures[1:2]).abs().max())
        (second,) = {node: r for node, r in again.ranges.items() if node.name == next(iter(again.ranges)).name}.values()
        assert second[1] > 1.5 * first[1]  # a tenth of the way to a range ten times as large
        one_by_one = benchmarks("accuracy").History(dynamic)
        assert torch.equal(torch.cat([one_by_one(p[None]) for p in pictures]), benchmarks("accuracy").History(dynamic)(pictures))


def test_the_script(benchmarks, tmp_path):
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in benchmarks("resnet20").ResNet20().state_dict().items()}}, tmp_path / "r.th")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", x=rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), y=rng.integers(0, 10, 24))
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--task", "classification", "--models", "resnet20", "--cifar", "c.npz", "--calibration", "8"]
    options = ["--strategies", "static:minmax,dynamic:profile", "history", "probabilistic:gamma=2:gaussian_channel", "--shifts", "clean,mixed", "size:40"]
    done = subprocess.run([*command, "--weights", "r.th", *options, "--json", "a.json"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 4 * 3 * 7
    for row in rows:
        assert list(row) == ["task", "model", "strategy", "shift", "metric", "value", "float32", "n"] and row["n"] == 16
    assert all(row["value"] > 15 for row in rows if row["metric"] == "sqnr_mean" and row["strategy"] != "history")
    report = [sys.executable, str(BENCHMARKS / "report.py"), "a.json", "--out", "results"]
    assert subprocess.run(report, cwd=tmp_path, timeout=300, check=False).returncode == 0
    page = (tmp_path / "results" / "accuracy.md").read_text()
    assert "## resnet20" in page and "calibrated on 8 pictures: held out" in page and page.count("| float32 |") == 3
    assert page.count("| dynamic:profile |") == 3 and (tmp_path / "results" / "accuracy-resnet20.svg").exists()
    for wrong, says in ((["--strategies", "statik"], "strategy is 'statik'"), (["--shifts", "snow"], "shift 'snow'"), ([], "resnet20 needs --weights")):
        extra = ["--weights", "r.th"] if wrong else []
        failed = subprocess.run([*command, *extra, *wrong], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
        assert failed.returncode == 1 and says in failed.stderr and "Traceback" not in failed.stderr
