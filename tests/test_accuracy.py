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
# SSD


def message(*fields):
    """A protocol buffer message of (number, bytes or int)."""

    def varint(value):
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes(out) + bytes([value])

    parts = []
    for number, value in fields:
        parts.append(varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def graph_def(constants):
    """A TensorFlow GraphDef of float32 constants, among a node of another kind and an integer constant."""

    def constant(name, dtype, tensor_fields):
        return message((1, message((1, name.encode()), (2, b"Const"), (5, message((1, b"value"), (2, message((8, message((1, dtype), *tensor_fields)))))))))

    nodes = [message((1, message((1, b"x"), (2, b"Placeholder")))), constant("size", 3, [(7, 300)])]
    for name, value in constants.items():
        shape = message(*((2, message((1, size))) for size in value.shape))
        nodes.append(constant(name, 1, [(2, shape), (4, value.detach().contiguous().numpy().tobytes())]))
    return b"".join(nodes)


def test_ssd_takes_the_weights_of_a_frozen_graph(benchmarks, tmp_path):
    ssd = benchmarks("ssd")
    torch.manual_seed(5)
    source, constants = ssd.SSDMobileNetV2().eval(), {}
    for i, layer in enumerate(module for module in source.modules() if isinstance(module, ssd.Conv)):
        order = (2, 3, 0, 1) if layer.groups > 1 else (2, 3, 1, 0)
        kernel = layer.weight.detach()
        if layer.scope.startswith("BoxPredictor"):
            constants[layer.scope + "/biases"] = layer.bias
        else:  # gamma / sqrt(variance + epsilon) = 2, and a mean that the offset makes up for
            width = len(layer.bias)
            norm = {"gamma": torch.full((width,), 2.0), "beta": layer.bias + 0.5, "moving_mean": torch.full((width,), 0.25), "moving_variance": torch.full((width,), 0.999)}
            constants |= {f"{layer.scope}/BatchNorm/{leaf}": value for leaf, value in norm.items()}
            kernel = kernel / 2
        constants[layer.scope + ("/depthwise_weights" if layer.groups > 1 else "/weights")] = kernel.permute(order)
    (tmp_path / "graph.pb").write_bytes(graph_def(constants))
    loaded = ssd.ssd_mobilenet_v2(tmp_path / "graph.pb")
    x = torch.rand(1, 3, 300, 300) * 2 - 1
    with torch.no_grad():
        assert loaded(x).shape == (1, 1917, 94)
        torch.testing.assert_close(loaded(x), source(x), rtol=1e-4, atol=1e-4)
    del constants["BoxPredictor_3/ClassPredictor/biases"]
    (tmp_path / "short.pb").write_bytes(graph_def(constants))
    with pytest.raises(ValueError, match="short.pb holds no weights of BoxPredictor_3/ClassPredictor, want an SSD-MobileNetV2"):
        ssd.ssd_mobilenet_v2(tmp_path / "short.pb")
    (tmp_path / "text.pb").write_text("no protocol buffer at all")
    with pytest.raises(ValueError, match="text.pb (is not a TensorFlow graph|holds no weights)"):
        ssd.ssd_mobilenet_v2(tmp_path / "text.pb")


def test_ssd_boxes(benchmarks):
    ssd = benchmarks("ssd")
    anchors = ssd.anchors()
    assert anchors.shape == (1917, 4)
    # the first level's first cell: 1 / 38 from the corner; a square of 0.1, then twice as wide as high
    torch.testing.assert_close(anchors[:2], torch.tensor([[1 / 38, 1 / 38, 0.1, 0.1], [1 / 38, 1 / 38, 0.2 / 2**0.5, 0.2 * 2**0.5]]))
    torch.testing.assert_close(anchors[-1], torch.tensor([0.5, 0.5, 0.95**0.5, 0.95**0.5]))
    output = torch.full((1, 1917, 94), -20.0)
    output[..., :4] = 0
    cell = 1083 + 6 * (3 * 10 + 7)  # second level, row 3, column 7, the square of 0.35
    output[0, cell, :4] = torch.tensor([1.0, -2.0, 5 * np.log(0.5), 0.0])  # down by a tenth of its height, left by two, half as high
    output[0, cell, 4 + 16] = 3.0
    ((boxes, scores, classes),) = ssd.detections(output)
    y, x = 0.35 + 0.035, 0.75 - 0.07
    torch.testing.assert_close(boxes[0], 300 * torch.tensor([x - 0.175, y - 0.0875, x + 0.175, y + 0.0875]))
    assert len(boxes) == 1 and ssd.categories([])[int(classes[0])] == 17 and float(scores[0]) == pytest.approx(1 / (1 + np.exp(-3)))


def test_ssd_pictures(benchmarks):
    """As TensorFlow 1 resizes: pixel i from position i * H / 300."""
    ssd = benchmarks("ssd")
    picture = torch.randint(0, 256, (3, 600, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ssd.prepare(picture), picture[:, ::2])
    ramp = torch.arange(150, dtype=torch.uint8).expand(3, 20, 150)
    assert torch.equal(ssd.prepare(ramp)[0, 0, :298:2].int(), torch.arange(149, dtype=torch.int32)) and ssd.factors(600, 200) == (0.5, 1.5)
    assert float(ssd.network_input(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).max()) == 1.0


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
    task = tasks.Classification("t", torch.nn.Identity(), tasks.Preprocessing(8, 8), torch.zeros(0), torch.zeros(0), [0, 1, 2, 3], torch.zeros(0))
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
    task = tasks.coco("yolox_nano", str(tmp_path / "nano.onnx"), str(coco_folder), None, 5, None)
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
        tasks.coco("yolox_nano", str(tmp_path / "nano.onnx"), str(coco_folder), str(coco_folder / "val2017"), None, None)
    torch.save({"state_dict": benchmarks("resnet20").ResNet20().state_dict()}, tmp_path / "r.th")
    x = np.arange(20 * 32 * 32 * 3).reshape(20, 32, 32, 3) % 251
    np.savez(tmp_path / "c.npz", x=x.astype(np.uint8), y=np.zeros(20, dtype=np.uint8))
    task = tasks.cifar10(str(tmp_path / "r.th"), str(tmp_path / "c.npz"), 8, 0, None)
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


def last_range(history):
    """Of the network's first layer, what its next picture gets."""
    past = next(iter(history.past.values()))
    return min(lo for lo, _ in past), max(hi for _, hi in past)


def test_history_uses_the_ranges_of_the_pictures_before(benchmarks):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3), torch.nn.Conv2d(4, 2, 1)).eval()
    pictures = torch.randn(6, 3, 12, 12)
    dynamic = pq.quantize(model, [pictures], strategy="dynamic", progress=False)
    with torch.no_grad():
        for window in (None, 2):
            history = benchmarks("accuracy").History(dynamic, window)
            assert torch.equal(history(pictures[:1]), dynamic(pictures[:1]))  # nothing was before: its own range
            first = last_range(history)
            loud = history(10 * pictures[1:2])  # clipped to the quiet one's range
            assert float(loud.abs().max()) < 0.5 * float(dynamic(10 * pictures[1:2]).abs().max())
            if window is None:
                assert 1.5 * first[1] < last_range(history)[1] < 2.5 * first[1]  # a tenth of the way to a range ten times as large
            else:
                assert last_range(history)[1] > 5 * first[1]  # the extremes of the last two pictures
                history(pictures[:1])
                assert last_range(history)[1] > 5 * first[1]
                history(pictures[:1])  # the loud one is forgotten
                assert last_range(history) == first
            one_by_one, batched = (benchmarks("accuracy").History(dynamic, window) for _ in range(2))
            assert torch.equal(torch.cat([one_by_one(p[None]) for p in pictures]), batched(pictures))


def test_the_script(benchmarks, tmp_path):
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in benchmarks("resnet20").ResNet20().state_dict().items()}}, tmp_path / "r.th")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", x=rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), y=rng.integers(0, 10, 24))
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--task", "classification", "--models", "resnet20", "--cifar", "c.npz", "--calibration", "8"]
    strategies = ["static:minmax,dynamic:profile", "history", "probabilistic:gamma=2:gaussian_channel", "history:delayed:window=3", "qat:static"]
    options = ["--strategies", *strategies, "--train", "6", "--epochs", "1", "--shifts", "clean,mixed", "size:40"]
    done = subprocess.run([*command, "--weights", "r.th", *options, "--json", "a.json"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 6 * 3 * 7
    for row in rows:
        assert list(row) == ["task", "model", "strategy", "shift", "metric", "value", "float32", "n"] and row["n"] == 10
    assert all(row["value"] > 15 for row in rows if row["metric"] == "sqnr_mean" and not row["strategy"].startswith("history"))
    report = [sys.executable, str(BENCHMARKS / "report.py"), "a.json", "--out", "results"]
    assert subprocess.run(report, cwd=tmp_path, timeout=300, check=False).returncode == 0
    page = (tmp_path / "results" / "accuracy.md").read_text()
    assert "## resnet20" in page and "calibrated on 8 pictures: held out; qat: 1 epochs on 6 pictures, learning rate 0.01" in page and page.count("| float32 |") == 3
    assert page.count("| dynamic:profile |") == 3 and (tmp_path / "results" / "accuracy-resnet20.svg").exists()
    for wrong, says in ((["--strategies", "statik"], "strategy is 'statik'"), (["--shifts", "snow"], "shift 'snow'"), ([], "resnet20 needs --weights")):
        extra = ["--weights", "r.th"] if wrong else []
        failed = subprocess.run([*command, *extra, *wrong], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
        assert failed.returncode == 1 and says in failed.stderr and "Traceback" not in failed.stderr


def test_ablations(benchmarks, tmp_path, monkeypatch):
    """Rows of every setting, and their tables."""
    ablations, tasks, report = benchmarks("ablations"), benchmarks("tasks"), benchmarks("report")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (30, 3, 12, 12), dtype=torch.uint8, generator=generator)
    task = tasks.Classification("t", model, tasks.Preprocessing(12, 12), pictures[:20], pictures[20:], [0] * 10, pictures[:20])
    monkeypatch.setattr(ablations, "task_with_pictures", lambda *_: task)
    monkeypatch.setattr(ablations, "_PICTURES", 16)
    reduced = {name: {setting: (min(count, 16), options) for setting, (count, options) in list(settings.items())[:2]} for name, settings in ablations.ABLATIONS.items()}
    monkeypatch.setattr(ablations, "ABLATIONS", reduced)
    ablations.main(["--imagenet", "x", "--shifts", "clean", "dark", "--json", str(tmp_path / "ablations.json")])
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert len(rows) == 6 * 2 * (2 * 7 + 2)
    share = {row["strategy"]: row["value"] for row in rows if row["ablation"] == "gamma" and row["metric"] == "predictor_share"}
    assert set(share) == {"gamma 0", "gamma 1"} and all(0 < value < 1 for value in share.values())
    assert all(0.2 < row["value"] < 20 for row in rows if row["metric"] == "time")
    report.main([str(tmp_path / "ablations.json"), "--out", str(tmp_path)])
    page = (tmp_path / "accuracy.md").read_text()
    assert page.count("### ") == 6 and page.count("| gamma 1 |") == 1 and "predictors, %" in page
    model[0].weight.data *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
    with ablations.equalization():
        qmodel = pq.quantize(model, [torch.randn(8, 3, 12, 12, generator=generator)], strategy="static", channel_profile=True, progress=False)
    profile = next(module.profile for module in qmodel.modules() if getattr(module, "profile", None) is not None)
    writes, reads = model[0].weight.abs().amax((1, 2, 3)), model[2].weight.abs().amax((0, 2, 3))
    assert profile.amax() > 5 * profile.amin() and torch.allclose(writes / profile, reads * profile, rtol=1e-4)
    with pytest.raises(SystemExit, match="20 pictures to calibrate on, want 256"):
        monkeypatch.setattr(ablations, "ABLATIONS", {"calibration": {"fixed": (256, {})}})
        ablations.main(["--imagenet", "x", "--ablations", "calibration"])
