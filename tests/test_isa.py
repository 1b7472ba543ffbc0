"""Every instruction set gives the same bytes: one process per value of PROBQUANT_ISA runs the same calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import op_cases as cases
import pytest
import torch
from oracle import Geometry

import probquant
from probquant import ops

ISAS = ["reference", "avx2", "avx512vnni", "amx"]
RUN = "import sys; sys.path.insert(0, sys.argv[1]); import test_isa; test_isa.main(sys.argv[2])"
ACTIVATIONS = [{}, {"activation_min": 0.0}, {"activation_min": 0.0, "activation_max": 6.0}, {"activation": 1}, {"activation": 2}, {"activation": 3}, {"activation": 4}]


def random_geometry(rng, kernel_limit=5) -> tuple[Geometry, int, int]:
    """A geometry and an image that it fits."""
    kernel, dilation = rng.integers(1, kernel_limit + 1, 2), rng.choice([1, 1, 2, 3], 2)
    padding = rng.choice([0, 1, 1, 2, 4], 4)
    needed = dilation * (kernel - 1) + 1 - padding.reshape(2, 2).sum(1)
    height, width = (max(int(n), int(extra)) for n, extra in zip(needed, rng.integers(1, 14, 2)))
    as_ints = (tuple(int(v) for v in part) for part in (kernel, rng.choice([1, 1, 2, 3], 2), padding, dilation))
    return Geometry(*as_ints), height, width


def layer_calls(rng, count):
    for index in range(count):
        kind = rng.choice(["conv2d", "depthwise", "pointwise", "rows"])
        strategy, wild = int(rng.integers(len(cases.STRATEGIES))), bool(rng.random() < 0.2)
        geometry, height, width = random_geometry(rng)
        inputs, outputs, batch = int(rng.choice(cases.SIZES)), int(rng.choice(cases.SIZES)), int(rng.integers(1, 4))
        if kind == "conv2d":
            geometry = geometry._replace(groups=int(rng.choice([1, 1, 2, 4])))
            inputs, outputs = min(inputs, 40), min(outputs, 40)
        elif kind == "depthwise":
            geometry, inputs, outputs = geometry._replace(groups=inputs), 1, int(rng.choice([1, 1, 1, 2, 3]))
        else:
            geometry = Geometry(stride=(1, 1) if kind == "rows" else geometry.stride)
            batch, height, width = (int(rng.choice(cases.SIZES)), 1, 1) if kind == "rows" else (batch, height, width)
        x = cases.random_codes(rng, (batch, height, width, inputs * geometry.groups), wild, strategy == cases.STRATEGIES["channel"])
        layer = cases.random_layer(rng, outputs * geometry.groups, inputs, geometry, bool(rng.integers(2)))
        options = dict(ACTIVATIONS[rng.integers(len(ACTIVATIONS))])
        shape = (batch, *geometry.out_size(height, width), outputs * geometry.groups)
        residual = cases.random_codes(rng, shape, wild) if "activation" not in options and rng.random() < 0.4 else None
        predictor = cases.random_predictor(rng, strategy, layer, cases.spread_of(x, layer), wild)
        options.update(strategy=strategy, gamma=int(rng.integers(5)), channel_stats=bool(rng.integers(2)))
        outputs = cases.run_conv2d(x, layer, residual, predictor, **options)
        yield f"{index} {kind} {x.q.shape} {geometry} {options}", outputs if isinstance(outputs, tuple) else (outputs,)
        if strategy in cases.LAWS:
            arguments = (*cases.image(x), len(layer.weight), *cases.geometry_arguments(geometry), geometry.groups, *(cases.image(residual) if residual else ()))
            law = ops.surrogate_law(*arguments, strategy=strategy, predictor=torch.from_numpy(predictor), gamma=options["gamma"])
            yield f"{index} surrogate_law {kind}", (law.numpy(),)


def other_calls(rng, count):
    for index in range(count):
        strategy, wild, channel_stats = int(rng.integers(1, 4)), bool(rng.random() < 0.3), bool(rng.integers(2))
        shape = (int(rng.integers(1, 4)), *(int(v) for v in rng.integers(1, 10, 2)), int(rng.choice(cases.SIZES)))
        a, b = (cases.random_codes(rng, shape, wild) for _ in range(2))
        x, y = cases.image(a), cases.image(b)
        fixed = torch.tensor([0.3, 77.0]) if strategy == 1 else None
        widths = torch.tensor([4.0, 3.0, 0.25]) if strategy == 3 else fixed
        options = {"strategy": strategy, "predictor": fixed, "channel_stats": channel_stats}
        values = torch.from_numpy(rng.normal(0.3, 1, shape).astype(np.float32)).permute(0, 3, 1, 2)
        if wild:
            values[0, 0, 0, 0] = float(rng.choice([np.nan, np.inf, 1e38]))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for view in (values, values.contiguous(), values.transpose(2, 3)):
                yield f"{index} quantize {dtype}", ops.quantize(view.to(dtype), channel_stats=channel_stats)
            yield f"{index} dequantize {dtype}", (ops.dequantize(*x[:3], dtype=dtype),)
        given = (torch.tensor([0.01]), torch.tensor([33], dtype=torch.int32))
        yield f"{index} quantize fixed", ops.quantize(values, 1, *given, channel_stats)
        yield f"{index} quantize rows", ops.quantize(values.contiguous(), 3)
        yield f"{index} moments", (ops.moments(x[0], 1, channel_stats),)
        yield f"{index} add", ops.add(*x, *y, *((0.0, 6.0) if wild else ()), strategy=strategy, predictor=widths, channel_stats=channel_stats)
        gate, factors = ops.adaptive_avg_pool2d(*y[:3], [1]), widths[:2] if strategy == 3 else widths
        for other in (y, gate):
            yield f"{index} mul", ops.mul(*x, *other, strategy=strategy, predictor=factors, channel_stats=channel_stats)
        for kind in range(5):
            yield f"{index} activation {kind}", ops.activation(*x[:3], kind, **options)
        yield f"{index} concat", ops.concat([x[0], y[0], x[0]], [x[1], y[1], x[1]], [x[2], y[2], x[2]], **options)
        kernel = min(3, shape[1], shape[2])
        yield f"{index} max_pool2d", ops.max_pool2d(*x[:3], [kernel], [2], [kernel // 2], [1], channel_stats)
        yield f"{index} avg_pool2d", ops.avg_pool2d(*x[:3], [kernel], [1], [kernel // 2], bool(rng.integers(2)), **options)
        yield f"{index} upsample_nearest2d", ops.upsample_nearest2d(*x[:3], [2, 1], channel_stats)
        yield f"{index} adaptive_avg_pool2d", ops.adaptive_avg_pool2d(*x[:3], [int(rng.integers(1, 6))], **options)


def transformer_calls(rng, count):
    for index in range(count):
        strategy, wild, channel_stats = int(rng.integers(1, 4)), bool(rng.random() < 0.3), bool(rng.integers(2))
        batch, queries, keys, heads, dim = (
            int(v) for v in (rng.integers(1, 3), rng.integers(1, 60), rng.choice([*cases.SIZES, 197]), rng.integers(1, 4), rng.integers(1, 70))
        )
        options = {"strategy": strategy, "predictor": torch.tensor([0.3, 77.0]) if strategy == 1 else None, "channel_stats": channel_stats}

        def tokens(count, channels):
            x = cases.random_codes(rng, (batch * count, 1, 1, channels), wild)
            return [torch.from_numpy(part).reshape(batch, count, *([channels] if part is x.q else [])) for part in x[:3]]

        query, key, value = (tokens(count, heads * dim) for count in (queries, keys, keys))
        yield f"{index} attention", ops.attention(*query, *key, *value, heads, float(rng.uniform(1e-5, 1)), **options)
        residual, weight = (torch.from_numpy(rng.normal(0, 1, (*shape, heads * dim)).astype(np.float32)) for shape in ((batch, queries), ()))
        yield f"{index} layer_norm", ops.layer_norm(*query, residual if index % 2 else None, weight, weight, 1e-6, True, **options)
        yield f"{index} layer_norm to float", ops.layer_norm(residual, None, None, residual if index % 2 else None, weight, None, 1e-6, True, 0)


def as_bytes(outputs) -> list[np.ndarray]:
    """Floats as integers: NaNs have to agree bit for bit, too."""
    result = []
    for part in outputs:
        part = part.contiguous().view(torch.int16).numpy() if isinstance(part, torch.Tensor) and part.dtype == torch.bfloat16 else np.ascontiguousarray(part)
        result.append(part.view(f"uint{8 * part.itemsize}") if part.dtype.kind == "f" else part)
    return result


def main(path: str) -> None:
    """What a process with one PROBQUANT_ISA does: writes its results."""
    torch.set_num_threads(1)
    rng, names, arrays = np.random.default_rng(2024), [], {}
    with np.errstate(all="ignore"):
        for calls in (layer_calls(rng, 700), other_calls(rng, 60), transformer_calls(rng, 60)):
            for name, outputs in calls:
                for i, part in enumerate(as_bytes(outputs)):
                    arrays[str(len(names))] = part
                    names.append(f"{name}: output {i}")
    np.savez(path, **arrays)
    Path(path).with_suffix(".json").write_text(json.dumps({"isa": probquant.cpu_info()["isa_used"], "names": names}))


def environment(isa: str | None) -> dict[str, str]:
    base = {name: value for name, value in os.environ.items() if name != "PROBQUANT_ISA"}
    return base if isa is None else {**base, "PROBQUANT_ISA": isa}


def results(isa: str, folder: Path) -> tuple[dict, np.lib.npyio.NpzFile]:
    path = folder / f"{isa}.npz"
    done = subprocess.run([sys.executable, "-c", RUN, str(Path(__file__).parent), str(path)], env=environment(isa), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.with_suffix(".json").read_text()), np.load(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    about, arrays = results("reference", tmp_path_factory.mktemp("reference"))
    assert about["isa"] == "reference"
    return about, arrays


@pytest.mark.parametrize("isa", ISAS[1:])
def test_same_bytes_as_the_reference(isa, reference, tmp_path):
    cpu = probquant.cpu_info()
    for what in ("compiled", "detected"):
        if ISAS.index(cpu[f"isa_{what}"]) < ISAS.index(isa):
            pytest.skip(f"{'this build' if what == 'compiled' else 'this CPU'} goes up to {cpu[f'isa_{what}']}")
    about, arrays = results(isa, tmp_path)
    assert about["isa"] == isa
    assert about["names"] == reference[0]["names"]
    for i, name in enumerate(about["names"]):
        cases.assert_same_array(arrays[str(i)], reference[1][str(i)], f"{isa}: {name}")


def test_environment_cannot_raise_the_isa():
    code = "import probquant; print(probquant.cpu_info()['isa_used'])"
    used = [subprocess.run([sys.executable, "-c", code], env=environment(isa), capture_output=True, text=True).stdout.strip() for isa in (None, "amx")]
    cpu = probquant.cpu_info()
    assert used == [min(cpu["isa_compiled"], cpu["isa_detected"], key=ISAS.index)] * 2


def test_unknown_isa_is_named_by_the_first_op():
    code = "import torch, probquant; probquant.ops.moments(torch.zeros(1, 1, dtype=torch.uint8))"
    done = subprocess.run([sys.executable, "-c", code], env=environment("sse9"), capture_output=True, text=True)
    assert done.returncode == 1  # an exception, not a crash
    assert "RuntimeError: probquant: the environment variable PROBQUANT_ISA is 'sse9', wanted reference, avx2, avx512vnni or amx" in done.stderr
