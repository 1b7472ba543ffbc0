"""torch.library.opcheck, fakes that give the kernels' shapes, dtypes and strides, torch.compile and torch.export of every op."""

import functools
import warnings

import numpy as np
import op_cases as cases
import pytest
import torch
from oracle import Geometry
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from probquant import ops

STRATEGIES = list(cases.STRATEGIES.values())


@functools.cache
def layers():
    rng = np.random.default_rng(0)
    dense, depthwise = Geometry((3, 3), (2, 1), (1, 1, 1, 0)), Geometry((3, 3), padding=(1, 1, 1, 1), groups=6)
    return cases.random_layer(rng, 8, 6, dense), cases.random_layer(rng, 12, 1, depthwise), cases.random_layer(rng, 5, 6)


def predictor(strategy, layer, seed=1):
    return cases.predictor_tensor(cases.random_predictor(np.random.default_rng(seed), strategy, layer, 100.0))


def samples(batch=3):
    """(name, op, arguments, keyword arguments) of every op in every strategy, on images and on rows."""
    rng = np.random.default_rng(batch)
    codes = cases.random_codes(rng, (batch, 7, 6, 6), channel_stats=True)
    x, y = cases.image(codes), cases.image(cases.random_codes(rng, (batch, 7, 6, 6)))
    tokens = cases.rows(codes, [batch], [batch, 42, 6])
    flat = cases.random_codes(rng, (batch * 4, 1, 1, 6), channel_stats=True)
    per_token = cases.rows(flat, [batch, 4], [batch, 4, 6])
    values = torch.from_numpy(rng.normal(0, 1, (batch, 6, 7, 5)).astype(np.float32))
    given = (torch.tensor([0.01]), torch.tensor([7], dtype=torch.int32))
    for channel_stats in (False, True):
        yield "quantize image", ops.quantize, (values, 1, None, None, channel_stats), {}
        yield "quantize rows", ops.quantize, (values, 2, None, None, channel_stats), {}
        yield "moments image", ops.moments, (x[0], 1, channel_stats), {}
        yield "moments rows", ops.moments, (per_token[0], 2, channel_stats), {}
    yield "quantize channels_last", ops.quantize, (values.contiguous(memory_format=torch.channels_last),), {}
    yield "quantize fixed half", ops.quantize, (values.half(), 1, *given), {}
    for dtype in (None, torch.float16, torch.bfloat16):
        yield "dequantize image", ops.dequantize, x[:3], {"dtype": dtype}
        yield "dequantize rows", ops.dequantize, per_token[:3], {"dtype": dtype}
    for groups in (1, 2):
        weight = torch.ones(4, 3, 3, 5, dtype=torch.int8)
        yield "pack_weight conv2d", ops.pack_weight, (weight, torch.ones(4), torch.ones(4), groups), {}
    yield "pack_weight with a profile", ops.pack_weight, (weight, torch.ones(4), None, 1, torch.ones(4)), {}
    yield "pack_weight linear", ops.pack_weight, (torch.ones(4, 7, dtype=torch.int8), torch.ones(4)), {}
    dense, depthwise, linear = layers()
    for strategy in STRATEGIES:
        for name, layer in (("conv2d", dense), ("depthwise", depthwise)):
            g, channels = layer.geometry, len(layer.weight)
            arguments = (*x, cases.packed(layer), channels, *cases.geometry_arguments(g), g.groups)
            options = {"strategy": strategy, "predictor": predictor(strategy, layer), "gamma": 2}
            residual = cases.image(cases.random_codes(rng, (batch, *g.out_size(7, 6), channels)))
            yield f"{name} {strategy}", ops.conv2d, arguments, {**options, "activation": 1, "channel_stats": True}
            yield f"{name} {strategy} with a residual", ops.conv2d, (*arguments, *residual), {**options, "activation_min": 0.0}
            if strategy in cases.LAWS:
                yield f"surrogate_law {name} {strategy}", ops.surrogate_law, (*arguments[:4], *arguments[5:]), options
        options = {"strategy": strategy, "predictor": predictor(strategy, linear)}
        for rows in (tokens, per_token, [part.flatten(0, 1) for part in per_token]):
            yield f"linear {strategy}", ops.linear, (*rows, cases.packed(linear), 5), {**options, "channel_stats": True, "activation_max": 6.0}
    for strategy in (1, 2, 3):
        fixed = predictor(1, linear) if strategy == 1 else None
        options = {"strategy": strategy, "predictor": fixed}
        for a, b in ((x, y), (tokens, tokens)):
            yield f"add {strategy}", ops.add, (*a, *b), {"strategy": strategy, "predictor": torch.ones(3) if strategy == 3 else fixed, "channel_stats": True}
            yield f"mul {strategy}", ops.mul, (*a, *b), {"strategy": strategy, "predictor": torch.ones(2) if strategy == 3 else fixed, "channel_stats": True}
            yield f"activation {strategy}", ops.activation, (*a[:3], 2), options
            yield f"concat {strategy}", ops.concat, tuple([part, other] for part, other in zip(a[:3], b[:3])), options
        gate = ops.adaptive_avg_pool2d(*x[:3], [1])
        yield f"mul {strategy} per channel", ops.mul, (*x, *gate), {"strategy": strategy, "predictor": torch.ones(2) if strategy == 3 else fixed}
        yield f"avg_pool2d {strategy}", ops.avg_pool2d, (*x[:3], [3, 2], [2], [1, 0, 1, 1]), options
        yield f"adaptive_avg_pool2d {strategy}", ops.adaptive_avg_pool2d, (*x[:3], [2, 3]), options
    for factor in ([2], [3, 1]):
        yield "upsample_nearest2d", ops.upsample_nearest2d, (*x[:3], factor, factor == [2]), {}
    yield "max_pool2d", ops.max_pool2d, (*x[:3], [3], [2], [1], [1], True), {}
    added, gain = torch.from_numpy(rng.normal(0, 1, (batch, 4, 6)).astype(np.float32)), torch.ones(6)
    for strategy in (0, 1, 2, 3):
        options = {"strategy": strategy, "predictor": predictor(strategy, linear) if strategy == 1 else None}
        yield f"layer_norm {strategy}", ops.layer_norm, (*per_token[:3], added, gain, gain, 1e-6, True), {**options, "channel_stats": True}
        yield f"layer_norm {strategy} of floats", ops.layer_norm, (added, None, None, None, None, None), options
        if strategy:
            yield f"attention {strategy}", ops.attention, (*per_token[:3] * 3, 2, 0.5), {**options, "channel_stats": True}


SAMPLES = list(samples())


@pytest.mark.parametrize("number", range(len(SAMPLES)), ids=[f"{i} {sample[0]}" for i, sample in enumerate(SAMPLES)])
def test_opcheck(number):
    _, op, arguments, options = SAMPLES[number]
    torch.library.opcheck(op.default, arguments, options, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("op", sorted({sample[1].__name__.split("::")[-1] for sample in SAMPLES}))
def test_opcheck_traces_with_dynamic_sizes(op):
    """The slow check of opcheck, for the first and the last sample of each op."""
    own = [sample for sample in SAMPLES if sample[1].__name__.split("::")[-1] == op]
    for _, function, arguments, options in (own[0], own[-1]):
        torch.library.opcheck(function.default, arguments, options, test_utils=("test_aot_dispatch_dynamic",))


def layout(outputs):
    """Shape, dtype and strides; the stride of a dimension of size 1 means nothing."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(tuple(t.shape), t.dtype, tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) if t.numel() else None) for t in outputs]


@pytest.mark.parametrize("batch", [1, 2, 5, 0])
def test_fakes_give_the_layout_of_the_kernels(batch):
    for name, op, arguments, options in samples(batch):
        real = layout(op(*arguments, **options))
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (arguments, options))
            assert layout(op(*fakes[0], **fakes[1])) == real, name


def test_fakes_sweep_over_window_geometries():
    rng = np.random.default_rng(3)
    for _ in range(150):
        kernel, stride, dilation = (tuple(int(v) for v in rng.integers(1, 4, 2)) for _ in range(3))
        padding = [int(v) for v in rng.integers(0, 3, rng.choice([1, 2, 4]))]
        top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
        geometry = Geometry(kernel, stride, (top, bottom, left, right), dilation)
        height, width, channels, batch = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        if min(geometry.out_size(height, width)) < 1:
            continue
        x = cases.image(cases.random_codes(rng, (batch, height, width, channels)))
        layer = cases.random_layer(rng, int(rng.integers(1, 4)), channels, geometry)
        calls = [(ops.conv2d, (*x, cases.packed(layer), len(layer.weight), list(kernel), list(stride), padding, list(dilation), 1))]
        if all(p < k for p, k in zip((top, bottom, left, right), (kernel[0], kernel[0], kernel[1], kernel[1]))):
            calls.append((ops.max_pool2d, (*x[:3], list(kernel), list(stride), padding, list(dilation))))
            if min(geometry._replace(dilation=(1, 1)).out_size(height, width)) > 0:
                calls.append((ops.avg_pool2d, (*x[:3], list(kernel), list(stride), padding)))
        for op, arguments in calls:
            real = layout(op(*arguments))
            with FakeTensorMode() as mode:
                fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                assert layout(op(*fakes)) == real, (op, x[0].shape, geometry)


def test_fakes_keep_a_symbolic_batch():
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    for name, op, arguments, options in samples(3):
        if op is ops.pack_weight:
            continue
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:

            def fake(t, counter=iter(range(1000))):
                if t.dim() == 0 or t.shape[0] != 3:
                    return mode.from_tensor(t)
                dims = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (t.dim() - 1)
                return mode.from_tensor(t, source=ConstantSource(f"t{next(counter)}"), symbolic_context=StatelessSymbolicContext(dims))

            fakes = pytree.tree_map_only(torch.Tensor, fake, (arguments, options))
            outputs = op(*fakes[0], **fakes[1])
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            if isinstance(pytree.tree_leaves(fakes)[0].shape[0], torch.SymInt):  # not the rows that were joined to 12
                assert isinstance(first.shape[0], torch.SymInt), f"{name} fixes the batch at {first.shape[0]}"


# ----------------------------------------------------------------------------------------------------------------------
# One function that uses every op


class EveryOp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.geometries = [(len(layer.weight), *cases.geometry_arguments(layer.geometry), layer.geometry.groups) for layer in layers()]
        for i, layer in enumerate(layers()):
            self.register_buffer(f"weight{i}", torch.from_numpy(layer.weight))
            self.register_buffer(f"scale{i}", torch.from_numpy(layer.weight_scale))
            self.register_buffer(f"packed{i}", cases.packed(layer))
            for strategy in (1, 3, 4, 5, 6):
                self.register_buffer(f"predictor{i}_{strategy}", predictor(strategy, layer))
        self.register_buffer("widths", torch.tensor([4.0, 4.0, 0.5]))

    def forward(self, image):
        x = ops.quantize(image, channel_stats=True)
        results = []
        for strategy in STRATEGIES:
            outputs = []
            for i in (0, 1):
                chosen = getattr(self, f"predictor{i}_{strategy}", None)
                outputs.append(ops.conv2d(*x, getattr(self, f"packed{i}"), *self.geometries[i], strategy=strategy, predictor=chosen))
            results.append(outputs[0][0])
            if strategy == 0:
                results.append(outputs[1][0])
                continue
            y, chosen = outputs[1], self.predictor1_1 if strategy == 1 else None
            plain = min(strategy, 3)
            widths = self.widths if plain == 3 else chosen
            y = ops.add(*y, *y, strategy=plain, predictor=widths)
            gate = ops.adaptive_avg_pool2d(*y[:3], [1])
            y = ops.mul(*y, *gate, strategy=plain, predictor=self.widths[:2] if plain == 3 else chosen)
            y = ops.activation(*y[:3], 1, strategy=plain, predictor=chosen)
            y = ops.concat([y[0], x[0]], [y[1], x[1]], [y[2], x[2]], strategy=plain, predictor=chosen)
            y = ops.upsample_nearest2d(*y[:3], [2])
            y = ops.max_pool2d(*y[:3], [2], [1], [0], [1])
            y = ops.avg_pool2d(*y[:3], [2], [1], [0], strategy=plain, predictor=chosen)
            y = ops.adaptive_avg_pool2d(*y[:3], [1], strategy=plain, predictor=chosen)
            results.append(ops.dequantize(*y[:3]))
            tokens = ops.quantize(image.flatten(2).transpose(1, 2).contiguous(), 2, channel_stats=True)
            z = ops.linear(*tokens, self.packed2, 5, strategy=strategy, predictor=getattr(self, f"predictor2_{strategy}", None))
            results += [ops.dequantize(*z[:3]), ops.moments(z[0], 2)]
            *y, total = ops.layer_norm(*tokens[:3], ops.dequantize(*tokens[:3]), None, None, 1e-5, True, strategy=plain, predictor=chosen)
            y = ops.attention(*y[:3], *tokens[:3], *tokens[:3], 2, 0.5, strategy=plain, predictor=chosen)
            results += [ops.dequantize(*y[:3]), total]
        law = ops.surrogate_law(*x, *self.geometries[0], strategy=3, predictor=self.predictor0_3, gamma=1)
        return [*results, law, ops.pack_weight(self.weight2.reshape(5, 6), self.scale2)]


def pictures(batch, seed=0):
    return torch.randn(batch, 6, 7, 6, generator=torch.Generator().manual_seed(seed))


def test_compile_in_one_graph_with_a_dynamic_batch():
    module = EveryOp()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")  # test_quantize.py takes the default one
    for batch in (3, 5):
        for actual, expected in zip(compiled(pictures(batch)), module(pictures(batch)), strict=True):
            assert layout(actual) == layout(expected) and torch.equal(actual, expected)


def test_export_with_a_dynamic_batch():
    module = EveryOp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (pictures(3),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (3, 2, 6):
        for actual, expected in zip(exported(pictures(batch)), module(pictures(batch)), strict=True):
            assert torch.equal(actual, expected)
