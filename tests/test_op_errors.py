"""Every wrong argument of every op gives a RuntimeError that names the op, the argument, its value and what was wanted."""

import re

import pytest
import torch

import probquant
from probquant import ops

INT32, INT64, UINT8 = torch.int32, torch.int64, torch.uint8


def image(n=2, c=4, h=5, w=5):
    q = torch.zeros(n, c, h, w, dtype=UINT8).contiguous(memory_format=torch.channels_last)
    return [q, torch.ones(n), torch.zeros(n, dtype=INT32), torch.zeros(n, 3, dtype=INT64)]


def rows(m=3, k=6):
    return [torch.zeros(m, k, dtype=UINT8), torch.ones(m), torch.zeros(m, dtype=INT32), torch.zeros(m, 3, dtype=INT64)]


def tokens(n=2, t=5, k=6):
    return [torch.zeros(n, t, k, dtype=UINT8), torch.ones(n, t), torch.zeros(n, t, dtype=INT32)]


def weight(*shape, groups=1):
    return ops.pack_weight(torch.zeros(*shape, dtype=torch.int8), torch.ones(shape[0]), None, groups)


def call(op, **changes):
    """The op on valid arguments, but for the changed ones."""
    arguments = dict(VALID[op]())
    unknown = set(changes) - set(arguments) - set(OPTIONAL)
    assert not unknown, unknown
    arguments.update(changes)
    return getattr(ops, op)(**arguments)


def named(prefix, tensors):
    return dict(zip((prefix, f"{prefix}_scale", f"{prefix}_zero_point", f"{prefix}_stats"), tensors))


def geometry(kernel=3):
    return {"kernel_size": [kernel], "stride": [1], "padding": [1], "dilation": [1]}


OPTIONAL = ["output_profile", "sample_dims", "scale", "zero_point", "dtype", "bias", "groups", "residual", "residual_scale", "residual_zero_point", "residual_stats", "activation", "activation_min", "activation_max", "strategy", "predictor", "gamma", "channel_stats", "eps", "keep_sum"]  # fmt: skip
VALID = {
    "quantize": lambda: {"x": torch.zeros(2, 4, 5, 5)},
    "dequantize": lambda: named("x", image()[:3]),
    "moments": lambda: {"q": image()[0]},
    "pack_weight": lambda: {"weight": torch.zeros(8, 3, 3, 2, dtype=torch.int8), "weight_scale": torch.ones(8)},
    "linear": lambda: {**named("x", rows()), "packed_weight": weight(8, 6), "out_features": 8},
    "conv2d": lambda: {**named("x", image()), "packed_weight": weight(8, 3, 3, 4), "out_channels": 8, **geometry(), "groups": 1},
    "surrogate_law": lambda: {**named("x", image()), "out_channels": 8, **geometry(), "groups": 1, "strategy": 3, "predictor": torch.ones(7), "gamma": 1},
    "add": lambda: {**named("a", image()), **named("b", image())},
    "mul": lambda: {**named("a", image()), **named("b", image())},
    "activation": lambda: {**named("x", image()[:3]), "activation": 1},
    "concat": lambda: {"xs": [image()[0]] * 2, "scales": [image()[1]] * 2, "zero_points": [image()[2]] * 2},
    "max_pool2d": lambda: {**named("x", image()[:3]), **geometry()},
    "avg_pool2d": lambda: {**named("x", image()[:3]), "kernel_size": [3], "stride": [1], "padding": [1]},
    "adaptive_avg_pool2d": lambda: {**named("x", image()[:3]), "output_size": [2]},
    "upsample_nearest2d": lambda: {**named("x", image()[:3]), "scale_factor": [2]},
    "layer_norm": lambda: {**named("x", rows()[:3]), "residual": torch.zeros(3, 6), "weight": torch.ones(6), "bias": torch.ones(6)},
    "attention": lambda: {**named("query", tokens(t=4)), **named("key", tokens()), **named("value", tokens()), "heads": 2, "scale": 0.5},
}
CODES = ["dequantize", "linear", "conv2d", "surrogate_law", "activation", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d"]  # read x
IMAGES = ["conv2d", "surrogate_law", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d"]
WINDOWS = ["conv2d", "surrogate_law", "max_pool2d", "avg_pool2d"]
LAYERS = ["linear", "conv2d"]
RANGES = ["add", "mul", "activation", "concat", "avg_pool2d", "adaptive_avg_pool2d", "layer_norm", "attention"]
RESIDUAL = named("residual", image(c=8))


@pytest.mark.parametrize("op", VALID)
def test_the_arguments_changed_here_are_valid(op):
    call(op)


def test_every_op_is_tested():
    declared = {schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("probquant::")}
    assert declared == {*VALID, "run", "hold", "run_held", "release"}  # test_recording.py


def cases():
    """(op, changed arguments, what the message has to say, as regular expressions)"""
    x = image()
    for op in CODES:
        own = rows() if op == "linear" else x
        yield op, {"x": own[0].to(torch.int8)}, ["x has dtype int8, want uint8"]
        yield op, {"x": own[0].float()}, ["x has dtype float32, want uint8"]
        yield op, {"x": own[0].reshape(-1)}, ["x has shape", "want at least two dimensions|want leading dimensions"]
        yield op, {"x_scale": own[1].double()}, ["x_scale has dtype float64, want float32"]
        yield op, {"x_scale": torch.ones(7)}, [r"x_scale has shape \[7\]", "want leading dimensions of x's"]
        yield op, {"x_scale": torch.ones(())}, [r"x_scale has shape \[\]", "want leading dimensions"]
        yield op, {"x_zero_point": own[2].long()}, ["x_zero_point has dtype int64, want int32"]
        yield op, {"x_zero_point": torch.zeros(9, dtype=INT32)}, [r"x_zero_point has shape \[9\], want \[[23]\]"]
        yield op, {"x_zero_point": torch.zeros(6, dtype=INT32)[:: 6 // len(own[2])]}, [r"x_zero_point must be contiguous, has strides \[[23]\]"]
        yield op, {"x_scale": torch.ones(6)[:: 6 // len(own[1])]}, [r"x_scale must be contiguous, has strides \[[23]\]"]
    for op in IMAGES:
        yield op, {"x": x[0].contiguous()}, [r"x of shape \[2, 4, 5, 5\] has strides \[100, 25, 5, 1\], want channels_last"]
        yield op, {"x": x[0][:, :3]}, ["x of shape .* has strides", "want channels_last"]
        yield op, {"x": x[0][0].contiguous(), "x_scale": torch.ones(4), "x_zero_point": torch.zeros(4, dtype=INT32)}, [r"x has shape \[4, 5, 5\]", r"want \[N, C, H, W\]"]
    for op in ("linear", "conv2d", "surrogate_law"):
        own = rows() if op == "linear" else x
        yield op, {"x_stats": own[3].int()}, ["x_stats has dtype int32, want int64"]
        yield op, {"x_stats": own[3][:1]}, [r"x_stats has shape \[1, 3\]", "want the scale's"]
        yield op, {"x_stats": own[3][:, :2]}, [r"x_stats has shape \[[23], 2\]", "at least 3 columns"]
        yield op, {"x_stats": torch.zeros(len(own[3]), 6, dtype=INT64)[:, ::2]}, ["x_stats must be contiguous, has strides"]
    yield "linear", {"x": torch.zeros(6, 3, dtype=UINT8).t()}, [r"x of shape \[3, 6\] has strides \[1, 3\], want contiguous"]
    yield "linear", {"x": torch.zeros(3, 0, dtype=UINT8)}, [r"x has no features, shape \[3, 0\]"]
    yield "linear", {"out_features": 0}, ["out_features 0, want > 0"]
    yield "linear", {"out_features": 16 * 9}, ["packed_weight has shape", "want"]
    yield "linear", {"packed_weight": weight(8, 100)}, [r"packed_weight has shape \[\d+\], want \[\d+\]"]
    yield "conv2d", {"packed_weight": weight(8, 1, 1, 4)}, [r"packed_weight has shape \[\d+\], want \[\d+\], of a weight \[8, 3, 3, 4\] for 4 channels of x"]
    yield "linear", {"packed_weight": weight(8, 6).view(torch.int8)}, ["packed_weight has dtype int8, want uint8"]
    yield "linear", {"packed_weight": weight(8, 6).repeat(2)[::2]}, ["packed_weight must be contiguous, has strides"]

    # windows
    for op in WINDOWS:
        for name in ("kernel_size", "stride", "padding", *([] if op == "avg_pool2d" else ["dilation"])):
            yield op, {name: []}, [name, r"\[\]", "want one"]
            yield op, {name: [1, 1, 1]}, [name, r"\[1, 1, 1\]", "want one"]
            if name != "padding":
                yield op, {name: [1, 1, 1, 1]}, [name, r"\[1, 1, 1, 1\]", "want one or two values"]
                yield op, {name: [0]}, [name if op == "avg_pool2d" else name, r"\(0, 0\)|0", "positive"]
                yield op, {name: [2, -1]}, [name, r"\(2, -1\)", "positive"]
            else:
                yield op, {name: [-1]}, ["padding", "-1"]
                yield op, {name: [0, 0, 0, -2]}, ["padding", "-2"]
                yield op, {name: [2**62]}, ["padding"]  # sizes that overflow on the way
            if name == "dilation":
                yield op, {name: [2**63 - 1]}, ["dilation"]
        large = {"packed_weight": weight(8, 9, 9, 4)} if op == "conv2d" else {}
        yield op, {"kernel_size": [9], **large}, ["kernel|window", r"\(9, 9\)", "larger than the padded input"]
        if op != "conv2d":
            yield op, {"kernel_size": [2**40]}, [r"kernel_size \[1099511627776\]", "at most 2147483647"]
            yield op, {"padding": [2**62]}, [r"padding \[4611686018427387904\]", "at most 2147483647"]
            if op != "avg_pool2d":
                yield op, {"dilation": [2**63 - 1]}, ["dilation", "at most 2147483647"]
    for op in ("max_pool2d", "avg_pool2d"):
        yield op, {"padding": [3]}, [r"padding \(3, 3, 3, 3\)", r"must be smaller than the window \(3, 3\)"]
    for op in ("conv2d", "surrogate_law"):
        for groups in (0, -1, 3):
            yield op, {"groups": groups}, [f"groups {groups}", "must divide in_channels 4 and out_channels 8"]
        yield op, {"out_channels": 0}, ["out_channels 0"]
        yield op, {"out_channels": -8}, ["out_channels -8"]
    yield "conv2d", {"groups": 2}, [r"packed_weight holds a weight of shape \[8, 3, 3, 4\] with groups 1, want \[8, 3, 3, 2\] with groups 2"]
    yield "conv2d", {"x": image(h=0)[0]}, [r"0, 5, 4|kernel .* is larger than the padded input", "positive|larger"]
    for size in ([], [1, 2, 3]):
        yield "adaptive_avg_pool2d", {"output_size": size}, ["output_size", re.escape(str(size)), "want one or two values"]
        yield "upsample_nearest2d", {"scale_factor": size}, ["scale_factor", re.escape(str(size)), "want one or two values"]
    yield "upsample_nearest2d", {"scale_factor": [2, 0]}, [r"scale_factor \(2, 0\), want positive"]
    yield "upsample_nearest2d", {"scale_factor": [2**31]}, [r"scale_factor \[2147483648\], want at most 2147483647"]
    yield "upsample_nearest2d", {"x": image(h=0)[0]}, [r"input \[2, 0, 5, 4\]", "want positive sizes"]
    yield "adaptive_avg_pool2d", {"output_size": [0, 2]}, [r"output_size \(0, 2\), want positive"]

    # strategies and predictors
    for op in (*LAYERS, *RANGES, "surrogate_law"):
        for strategy in (-1, 7, 2**40):
            yield op, {"strategy": strategy}, [f"strategy {strategy}", "want 0 .none."]
        yield op, {"strategy": 1, "predictor": torch.ones(2, dtype=torch.float64)}, ["predictor has dtype float64, want float32"]
        yield op, {"strategy": 1, "predictor": torch.ones(2, 1)}, [r"predictor has shape \[2, 1\], want"]
        yield op, {"strategy": 1, "predictor": torch.ones(4)[::2]}, ["predictor", "contiguous"]
    for op in LAYERS:
        for strategy, good in ((0, 0), (1, 2), (2, 0), (3, 7), (4, 3 + 3 * 8), (5, 2), (6, 3 + 4 + 2 * (6 if op == "linear" else 4))):
            for size in {0, 2, 3, 7, 8, 27, 30} - {good}:
                yield op, {"strategy": strategy, "predictor": torch.ones(size) if size else None}, [f"predictor has {size} values, strategy {strategy} wants {good}"]
        yield op, {"strategy": 6, "predictor": torch.ones(19 if op == "linear" else 15)}, ["strategy 6 needs x.stats with channel moments, (11|15) columns, got 3"]
        for strategy in (3, 4):
            predictor = torch.ones(7 if strategy == 3 else 27)
            yield op, {"strategy": strategy, "predictor": predictor, "gamma": -1}, ["gamma -1, want >= 0"]
    for op in RANGES:
        for strategy, good in ((1, 2), (2, 0), (3, {"add": 3, "mul": 2}.get(op, 0))):
            for size in {0, 1, 2, 3, 7} - {good}:
                yield op, {"strategy": strategy, "predictor": torch.ones(size) if size else None}, [f"predictor has {size} values, strategy {strategy} wants {good}"]
        for strategy in (4, 5, 6) if op == "layer_norm" else (0, 4, 5, 6):
            yield op, {"strategy": strategy}, [f"strategy {strategy}, want fixed, dynamic or gaussian"]
    for strategy in (0, 1, 2, 5):
        yield "surrogate_law", {"strategy": strategy}, [f"strategy {strategy} has no law, want gaussian, gaussian_channel or channel"]
    for strategy, size, good in ((3, 6, 7), (4, 7, 27)):
        yield "surrogate_law", {"strategy": strategy, "predictor": torch.ones(size)}, [f"predictor has {size} values, strategy {strategy} wants {good}"]
    yield "surrogate_law", {"gamma": -3}, ["gamma -3, want >= 0"]

    # activations
    for op in (*LAYERS, "activation"):
        for activation in (-1, 5):
            yield op, {"activation": activation}, [f"activation {activation}", "want 0 .clamp."]
    for op in (*LAYERS, "add"):
        yield op, {"activation_min": 1.0, "activation_max": 0.5}, ["activation_min 1.0*, ?must not be above activation_max 0.50*|activation_min 1.0+ must not be above activation_max 0.50*"]
        yield op, {"activation_min": float("nan")}, ["activation_min"]
    yield "activation", {"activation": 0, "activation_min": 1.0, "activation_max": 0.5}, ["activation_min 1.0+ must not be above activation_max 0.50*"]
    for op in LAYERS:
        yield op, {"activation": 1, "activation_max": 6.0}, ["activation_min and activation_max belong to activation 0"]
    yield "conv2d", {"activation": 2, **RESIDUAL}, ["a curved activation cannot be fused behind a residual"]

    # residuals
    yield "conv2d", {**RESIDUAL, "residual_scale": None}, ["a residual needs residual_scale and residual_zero_point"]
    yield "conv2d", {**RESIDUAL, "residual": None}, ["need a residual"]
    yield "conv2d", {**RESIDUAL, "residual": RESIDUAL["residual"].contiguous()}, ["residual of shape", "want channels_last"]
    yield "conv2d", {**RESIDUAL, "residual": RESIDUAL["residual"].to(torch.int8)}, ["residual has dtype int8, want uint8"]
    yield "conv2d", named("residual", image(c=7)), [r"residual has shape \[2, 7, 5, 5\], want the output's \[2, 8, 5, 5\]"]
    yield "conv2d", named("residual", image(n=1, c=8)), [r"residual has shape \[1, 8, 5, 5\]"]
    yield "conv2d", {**RESIDUAL, "residual_zero_point": torch.zeros(2)}, ["residual_zero_point has dtype float32, want int32"]
    yield "conv2d", {**RESIDUAL, "residual_stats": torch.zeros(2, 2, dtype=INT64)}, [r"residual_stats has shape \[2, 2\]"]
    yield "conv2d", {**RESIDUAL, "residual_stats": None, "strategy": 3, "predictor": torch.ones(7)}, ["residual.stats"]
    yield "linear", named("residual", rows(3, 9)), [r"residual has shape \[3, 9\], want the output's \[3, 8\]"]

    # quantize, moments, pack_weight
    for dtype in (torch.float64, UINT8, INT64, torch.bool):
        yield "quantize", {"x": torch.zeros(2, 3).to(dtype)}, ["x has dtype", "want float32, float16 or bfloat16"]
    yield "quantize", {"x": torch.zeros(3)}, [r"x has shape \[3\], want at least two dimensions"]
    yield "quantize", {"x": torch.zeros(3, 2).t()}, [r"x of shape \[2, 3\] has strides \[1, 2\], want contiguous"]
    for dims in (0, 4, -1):
        yield "quantize", {"sample_dims": dims}, [f"sample_dims {dims}, want 1 to 3"]
        yield "moments", {"sample_dims": dims}, [f"sample_dims {dims}, want 1 to 3"]
    one, zero = torch.ones(1), torch.zeros(1, dtype=INT32)
    yield "quantize", {"scale": one}, ["scale and zero_point are given together"]
    yield "quantize", {"zero_point": zero}, ["scale and zero_point are given together"]
    yield "quantize", {"scale": torch.ones(2), "zero_point": zero}, [r"scale has shape \[2\], want \[1\]"]
    yield "quantize", {"scale": one.double(), "zero_point": zero}, ["scale has dtype float64, want float32"]
    yield "quantize", {"scale": one, "zero_point": zero.long()}, ["zero_point has dtype int64, want int32"]
    yield "dequantize", {"dtype": torch.float64}, ["dtype float64, want float32, float16 or bfloat16"]
    yield "dequantize", {"dtype": UINT8}, ["dtype uint8, want float32, float16 or bfloat16"]
    yield "moments", {"q": torch.zeros(2, 3)}, ["q has dtype float32, want uint8"]
    yield "moments", {"q": torch.zeros(3, dtype=UINT8)}, [r"q has shape \[3\], want at least two dimensions"]
    yield "moments", {"q": x[0].contiguous()}, ["q of shape", "want channels_last"]
    yield "pack_weight", {"weight": torch.zeros(8, 3, 3, dtype=torch.int8)}, [r"weight has shape \[8, 3, 3\], want"]
    yield "pack_weight", {"weight": torch.zeros(8, 3, dtype=UINT8)}, ["weight has dtype uint8, want int8"]
    yield "pack_weight", {"weight": torch.zeros(3, 8, dtype=torch.int8).t()}, ["weight must be contiguous, has strides"]
    yield "pack_weight", {"weight": torch.full((8, 3), -128, dtype=torch.int8)}, [r"value -128 in output channel 0, want \[-127, 127\]"]
    yield "pack_weight", {"weight": torch.zeros(8, 66_000, dtype=torch.int8)}, ["66000 weights per output overflow the int32 accumulator, want fewer than 66000"]
    yield "pack_weight", {"weight": torch.zeros(8, 0, dtype=torch.int8)}, ["every size must be positive", r"\[8, 1, 1, 0\]"]
    yield "pack_weight", {"weight_scale": torch.ones(7)}, [r"weight_scale has shape \[7\], want \[8\]"]
    yield "pack_weight", {"weight_scale": torch.ones(8).half()}, ["weight_scale has dtype float16, want float32"]
    yield "pack_weight", {"bias": torch.ones(8, 1)}, [r"bias has shape \[8, 1\], want \[8\]"]
    yield "pack_weight", {"bias": torch.ones(8, dtype=INT32)}, ["bias has dtype int32, want float32"]
    yield "pack_weight", {"output_profile": torch.ones(7)}, [r"output_profile has shape \[7\], want \[8\]"]
    yield "pack_weight", {"output_profile": torch.ones(8).double()}, ["output_profile has dtype float64, want float32"]
    for value in (0.0, -1.0, float("nan"), float("inf"), 2.0**-61, 2.0**61):
        yield "pack_weight", {"output_profile": torch.tensor([1.0] * 3 + [value] + [1.0] * 4)}, [r"output_profile of channel 3 is \S+, want 2\^-60 to 2\^60"]
    yield "pack_weight", {"groups": 3}, ["out_channels 8 is not a multiple of groups 3"]
    yield "pack_weight", {"groups": 0}, ["groups 0"]

    # add and concat
    for part, wrong, says in (
        ("b", image(c=3)[0], r"b has shape \[2, 3, 5, 5\].*want a's \[2, 4, 5, 5\]"),
        ("b", image()[0].contiguous(), "b of shape .* want channels_last"),
        ("a", image()[0].to(INT32), "a has dtype int32, want uint8"),
        ("a_scale", torch.ones(2, dtype=torch.float16), "a_scale has dtype float16, want float32"),
        ("b_zero_point", torch.zeros(1, dtype=INT32), r"b_zero_point has shape \[1\], want \[2\]"),
        ("a_stats", torch.zeros(2, dtype=INT64), r"a_stats has shape \[2\]"),
        ("b_stats", torch.zeros(2, 3, dtype=INT32), "b_stats has dtype int32, want int64"),
    ):
        yield "add", {part: wrong}, [says]
        yield "mul", {part: wrong}, [says]
    for wrong in (image(n=1, h=1, w=1), image(h=1), image(c=1, h=1, w=1)):
        yield "mul", named("b", wrong), [r"b has shape .*, want a's \[2, 4, 5, 5\] .an image's may be \[N, C, 1, 1\]. with scale \[2\]"]
    yield "mul", {**named("a", tokens()), **named("b", tokens(t=1))}, ["b has shape .*, want a's"]
    yield "concat", {"scales": [x[1]]}, ["2 xs, 1 scales, 2 zero_points, want as many of each"]
    yield "concat", {"xs": [x[0], image(h=4)[0]]}, [r"xs\[1\] has shape \[2, 4, 4, 5\], want that of xs\[0\] \[2, 4, 5, 5\] but for the channels"]
    yield "concat", {"xs": [x[0], x[0].to(torch.int8)]}, [r"xs\[1\] has dtype int8, want uint8"]
    yield "concat", {"xs": [x[0], x[0].contiguous()]}, [r"xs\[1\] of shape", "want channels_last"]
    yield "concat", {"zero_points": [x[2], x[2][:1]]}, [r"xs\[1\]_zero_point has shape \[1\], want \[2\]"]

    # transformers
    yield "layer_norm", {"x": rows()[0].float()}, ["x has dtype float32, want uint8"]
    yield "layer_norm", {"x": rows()[0], "x_scale": None, "x_zero_point": None}, ["x has dtype uint8, want float32"]
    yield "layer_norm", {"x": torch.zeros(6, 3).t(), "x_scale": None, "x_zero_point": None}, ["x must be contiguous, has strides"]
    yield "layer_norm", {"x": torch.zeros(6), "x_scale": None, "x_zero_point": None}, [r"x has shape \[6\], want at least two dimensions"]
    yield "layer_norm", {"x": torch.zeros(3, 0), "x_scale": None, "x_zero_point": None, "residual": None, "weight": None, "bias": None}, [r"size \[3, 0\], want"]
    yield "layer_norm", {"x_scale": None}, ["x_scale and x_zero_point come together"]
    yield "layer_norm", {**named("x", tokens()), "x_scale": torch.ones(2), "x_zero_point": torch.zeros(2, dtype=INT32)}, [r"x_scale has shape \[2\], want one scale per row \[2, 5\]"]
    yield "layer_norm", {"residual": torch.zeros(3, 5)}, [r"residual has shape \[3, 5\], want \[3, 6\]"]
    yield "layer_norm", {"residual": torch.zeros(3, 6).double()}, ["residual has dtype float64, want float32"]
    yield "layer_norm", {"weight": torch.ones(7)}, [r"weight has shape \[7\], want \[6\]"]
    yield "layer_norm", {"bias": torch.ones(6, dtype=INT32)}, ["bias has dtype int32, want float32"]
    yield "layer_norm", {"eps": -1.0}, ["eps -1.000000, want finite and >= 0"]
    for part in ("query", "key", "value"):
        yield "attention", {part: tokens(t=4 if part == "query" else 5)[0].float()}, [f"{part} has dtype float32, want uint8"]
        yield "attention", {f"{part}_scale": torch.ones(2), f"{part}_zero_point": torch.zeros(2, dtype=INT32)}, [rf"{part} has shape .* with scale \[2\], want .*one scale per token"]
    yield "attention", named("key", tokens(n=3)), [r"key has shape \[3, 5, 6\], want \[2, 5, 6\] as query's batch and channels"]
    yield "attention", named("value", tokens(t=6)), [r"value has shape \[2, 6, 6\], want key's \[2, 5, 6\]"]
    yield "attention", {"heads": 4}, ["heads 4, want a divisor of query's 6 channels"]
    yield "attention", {"heads": 0}, ["heads 0, want a divisor"]
    yield "attention", {"scale": 0.0}, ["scale 0.000000, want finite and > 0"]
    yield "attention", {**named("key", tokens(t=0)), **named("value", tokens(t=0))}, ["keys 0, .*want keys, heads and head_dim > 0"]
    yield "attention", {**named("key", tokens(t=33001)), **named("value", tokens(t=33001))}, ["33001 keys of head_dim 3 overflow the int32 sums, want at most 33000"]


@pytest.mark.parametrize("number", range(sum(1 for _ in cases())))
def test_wrong_argument(number):
    op, changes, messages = list(cases())[number]
    with pytest.raises(RuntimeError) as caught:
        call(op, **changes)
    message = str(caught.value)
    own = {"pack_weight": "(pack_weight|weight)", "max_pool2d": "(max_pool2d|pool2d)", "avg_pool2d": "(avg_pool2d|pool2d|average pool)", "adaptive_avg_pool2d": "(adaptive_avg_pool2d|adaptive_average_pool2d|average pool)", "linear": "(linear|conv2d)", "surrogate_law": "(surrogate_law|conv2d)"}  # fmt: skip
    changed = {name: list(value.shape) if isinstance(value, torch.Tensor) else value for name, value in changes.items() if name not in ("xs", "scales")}
    assert re.match(f"probquant: {own.get(op, op)}: ", message), f"{op} {changed}: {message}"
    for wanted in messages:
        assert re.search(wanted, message), f"{op} {changed}: {message!r} does not say {wanted!r}"


def test_sums_too_long_for_the_accumulator():
    k = 66_000
    x = rows(1, k)
    with pytest.raises(RuntimeError, match=f"{k} weights per output overflow the int32 accumulator, want fewer than 66000"):
        ops.linear(*x, torch.zeros(1, dtype=UINT8), 1)
    big = image(1, 6600, 10, 1)
    with pytest.raises(RuntimeError, match=f"{k} weights per output overflow"):
        ops.conv2d(*big, torch.zeros(1, dtype=UINT8), 1, [10, 1], [1], [0], [1], 1)


def test_patch_sums_too_large_for_int64_are_refused():
    with pytest.raises(RuntimeError, match=r"too large for exact patch sums \(201 x 201 positions of 60000 values\)"):
        ops.surrogate_law(*image(1, 60_000, 1, 1), 1, [1], [1], [100], [1], 1, strategy=3, predictor=torch.ones(7), gamma=1)


def test_wrong_kinds_of_arguments():
    x = image()
    for arguments in ((None,), ("x",), (x[0], x[1]), (x[0], x[1], x[2], "float32", 1)):
        with pytest.raises((RuntimeError, TypeError)):
            ops.dequantize(*arguments)


def test_concat_of_nothing():
    with pytest.raises(RuntimeError, match="concat"):  # torch's own: without a tensor it knows no device
        ops.concat([], [], [])


def test_an_error_leaves_the_library_usable():
    for _ in range(100):
        with pytest.raises(RuntimeError):
            call("conv2d", groups=3)
    assert call("conv2d")[0].shape == (2, 8, 5, 5)
    assert probquant.Strategy(2) is probquant.Strategy.DYNAMIC
