"""The benchmarks run and write what they promise; their figures are nobody's business here."""

import csv
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = "tiny 3x3,conv2d,2,6,6,8,16,3,1,1,relu,image,1\ntiny linear,linear,1,5,1,16,8,1,1,1,none,token,1\n"


pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or os.uname().machine != "x86_64", reason="the peak probe needs x86-64 and a C++ compiler"
)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache folder for the compiled peak probe that is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run(script, *arguments, cwd):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if str(BENCHMARKS) in (getattr(module, "__file__", None) or "")]:
        del sys.modules[name]


@pytest.fixture
def tiny_shapes(tmp_path, benchmarks):
    path = tmp_path / "tiny.csv"
    path.write_text(",".join(benchmarks("shapes").COLUMNS) + "\n" + TINY)
    return path


def test_peak_is_plausible(benchmarks):
    peak = benchmarks("peak")
    int8, float32 = peak.probe_vnni_gmacs(1, 0.01), peak.probe_gmacs("fma_ymm", 1, 0.01)
    assert 1 < int8 < 5000
    assert float32 is None or 1 < float32 < int8
    assert peak.probe_gmacs("no such instruction") is None
    assert peak.probe_vnni_gmacs(2, 0.01) > 1
    for mode in ("read", "write", "copy"):
        assert 0.1 < peak.probe_bandwidth(mode, 16 << 10, 1, 0.01) < 5000


def test_layers_writes_rows(tiny_shapes, tmp_path):
    out = tmp_path / "layers.json"
    text = run("layers.py", "--shapes", tiny_shapes, "--contestants", "probquant", "--rounds", 1, "--turn-ms", 0.1, "--pairs", 4, "--json", out, cwd=tmp_path)
    assert "probquant probabilistic / probquant static" in text
    rows = json.loads(out.read_text())
    ours = ["probquant static", "probquant probabilistic", "probquant dynamic"]
    assert [(row["shape"], row["contestant"]) for row in rows] == [(shape, name) for shape in ("tiny 3x3", "tiny linear") for name in ours]
    for row in rows:
        assert list(row) == ["shape", "threads", "contestant", "us_min", "us_median", "percent_of_peak"]
        assert row["threads"] == 1
        assert 0 < row["us_min"] <= row["us_median"]
        assert 0 < row["percent_of_peak"] < 150
    context = json.loads((tmp_path / "layers.run.json").read_text())
    assert context["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(context)
    assert not any(layer["skipped"] for layer in context["layers"])

    run("report.py", out, "--out", tmp_path / "results", cwd=tmp_path)
    assert "tiny 3x3" in (tmp_path / "results" / "layers.md").read_text()


def test_wrong_results_are_not_timed(benchmarks):
    shapes, contestants, common = benchmarks("shapes"), benchmarks("contestants"), benchmarks("common")
    problem = contestants.Problem(shapes.Shape("tiny", "conv2d", 1, 6, 6, 8, 16, 3))
    runner = contestants.build("probquant static", problem, 1)
    runner.reference = runner.reference.clone()
    runner.reference[0, 0, 0, 0] += 3 * problem.y_scale
    with pytest.raises(common.Skip, match="wrong result"):
        contestants.check(runner)


def test_shape_files_are_complete(benchmarks):
    shapes = benchmarks("shapes")
    for path in shapes.FOLDER.glob("*.csv"):
        read = shapes.read_shapes(path.stem)
        assert len({shape.name for shape in read}) == len(list(csv.DictReader(path.open()))), f"{path.name}: a name appears twice"
    macs = {name: sum(shape.macs * shape.count for shape in shapes.read_shapes(name)) / 1e9 for name in ("resnet50", "mobilenet_v2", "vit_b16")}
    assert math.isclose(macs["resnet50"], 4.09, abs_tol=0.05)
    assert math.isclose(macs["mobilenet_v2"], 0.30, abs_tol=0.02)
    assert math.isclose(macs["vit_b16"], 16.9, abs_tol=0.3)


def test_every_script_explains_itself(tmp_path):
    for script in ("peak.py", "layers.py", "models.py", "overhead.py", "accuracy.py", "report.py", "shapes.py"):
        assert "python benchmarks/" in run(script, "--help", cwd=tmp_path)
