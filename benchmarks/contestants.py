"""One layer, uint8 in -> uint8 out, as every contestant computes it.

A contestant is built for a Problem and a thread count and gives a call to time and its result in real numbers, which
`check` compares with a float32 computation: nobody is timed doing something else.
"""

from __future__ import annotations

import importlib.util
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from common import Skip
from probquant import surrogates
from probquant._ops import Strategy, ops
from probquant.recording import record
from shapes import Shape

_WIDTH = 6.0  # alpha and beta of the probabilistic strategy: the predicted range reaches so many standard deviations


class Problem:
    """A layer with its data.

    q: uint8 codes, [N, C, H, W] channels_last or [N, rows, K]. Ours get a scale of its own for every image (or row), which
    differ by up to 10 %; peers get one. weight: int8 [O, C / groups, k, k] or [O, K], a scale per output channel.
    reference: float32 result before quantization, with the activation, for the peers' scale.
    """

    def __init__(self, shape: Shape, gamma: int = 4, granularity: str = "tensor", zero_point: int | None = None, weight_bits: int = 8, seed: int = 0):
        self.shape, self.gamma, self.granularity = shape, gamma, granularity
        random = torch.Generator().manual_seed(seed)
        s, self.conv = shape, shape.op == "conv2d"
        if zero_point is None:  # most convolutions read what a ReLU wrote; the first one and linear layers do not
            zero_point = 0 if self.conv and s.in_channels > 3 else 110
        self.zero_point = zero_point
        size = (s.batch, s.in_channels, s.height, s.width) if self.conv else (s.batch, s.height, s.in_channels)
        q = (torch.randn(size, generator=random) * 40 + zero_point).round().clamp(0, 255).to(torch.uint8)
        self.q = q.to(memory_format=torch.channels_last) if self.conv else q
        fan_in = s.kernel**2 * s.in_channels // s.groups
        weight_size = (s.out_channels, s.in_channels // s.groups, s.kernel, s.kernel) if self.conv else (s.out_channels, s.in_channels)
        largest = 2 ** (weight_bits - 1) - 1
        self.weight = (torch.randn(weight_size, generator=random) * 0.28 * largest).round().clamp(-largest, largest).to(torch.int8)
        self.weight_scale = (0.5 + torch.rand(s.out_channels, generator=random)) / (0.28 * largest * fan_in**0.5)
        self.x_scale = 0.025
        leading = (s.batch, s.height) if s.scales == "token" else (s.batch,)
        self.scales = self.x_scale * (1 + 0.1 * torch.rand(leading, generator=random))
        self.zero_points = torch.full(leading, zero_point, dtype=torch.int32)
        self.bias = 0.1 * torch.randn(s.out_channels, generator=random)
        # bias is an int32 with the products' scale for the peers; all get what that can hold
        self.bias_int32 = (self.bias / (self.x_scale * self.weight_scale)).round().to(torch.int32)
        self.bias = self.bias_int32 * (self.x_scale * self.weight_scale)
        self.bounds = {"none": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0)}[s.activation]
        self.products = self._products()
        self.reference = self._finish(self.x_scale)
        self.y_scale, zero = surrogates.static_predictor(float(self.reference.min()), float(self.reference.max())).tolist()
        self.y_zero_point = int(zero)

    def float_weight(self) -> Tensor:
        return self.weight * self.weight_scale.reshape(-1, *[1] * (self.weight.dim() - 1))

    def float_input(self) -> Tensor:
        return (self.q.float() - self.zero_point) * self.x_scale

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        s = self.shape
        return F.conv2d(x, weight, bias, s.stride, s.padding, 1, s.groups) if self.conv else F.linear(x, weight, bias)

    def _products(self) -> Tensor:
        return self.layer(self.q.float() - self.zero_point, self.weight.float(), None)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1) if self.conv else values

    def _finish(self, scale: float | Tensor) -> Tensor:
        y = self.products * (scale * self._per_channel(self.weight_scale)) + self._per_channel(self.bias)
        return y.clamp(*self.bounds) if self.bounds != (None, None) else y

    def own_reference(self) -> Tensor:
        """The reference for the scales that our ops get."""
        scale = self.scales.reshape(-1, 1, 1, 1) if self.conv else self.scales.reshape(*self.scales.shape, *[1] * (3 - self.scales.dim()))
        return self._finish(scale)


@dataclass
class Runner:
    """call: what is timed. result: float32 values of its output; step: size of one code in them (a tensor where samples
    differ), None if the output is not quantized. low, high: what the codes can hold."""

    call: Callable[[], object]
    result: Callable[[], tuple[Tensor, Tensor | float | None, Tensor | float, Tensor | float]]
    reference: Tensor
    tolerance: float = 2e-3  # of the largest value, on top of half a step


def check(runner: Runner) -> None:
    """Raises Skip if a result is wrong by more than quantization explains. Saturation is no error unless it is frequent."""
    y, step, low, high = runner.result()
    reference = runner.reference
    if y.shape != reference.shape:
        raise Skip(f"wrong result: shape {tuple(y.shape)}, want {tuple(reference.shape)}")
    inside = torch.maximum(torch.minimum(reference, torch.as_tensor(high)), torch.as_tensor(low))
    slack = runner.tolerance * float(reference.abs().max()) + (0.0 if step is None else 0.501 * torch.as_tensor(step))
    clipped = float(((inside - reference).abs() > slack).float().mean())
    worst = float(((y.float() - inside).abs() - slack).max())
    if not worst <= 0:
        raise Skip(f"wrong result: an error of {worst:.3g} more than rounding explains")
    if clipped > 0.02:
        raise Skip(f"wrong result: {100 * clipped:.1f} % of the values are saturated")


# ----------------------------------------------------------------------------------------------------------------------
# Ours


def recorded_call(op, x: tuple, arguments: tuple, options: dict, length: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs op(*x, *arguments, **options) as a model does (probquant/recording.py), `length` times, each on the output of
    the one before; gives what the last one gives."""
    graph, root = fx.Graph(), {}

    def node(value):
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(root)}"
        root[name] = value
        return graph.get_attr(name)

    values = [graph.placeholder(f"x_{i}") for i in range(len(x))]
    arguments, options = tuple(map(node, arguments)), {name: node(value) for name, value in options.items()}
    for _ in range(length):
        y = graph.call_function(op, (*values, *arguments), options)
        values = [graph.call_function(operator.getitem, (y, i)) for i in range(len(x))]
    graph.output(tuple(values))
    recorded = record(fx.GraphModule(root, graph), least=1)
    (run,) = (node for node in recorded.graph.nodes if node.target is ops.run.default)
    _, held, recording = run.args
    inputs, constants = list(x), getattr(recorded, held.target)
    return lambda: ops.run.default(inputs, constants, recording)


def probquant_layer(problem: Problem, strategy: Strategy) -> Runner:
    p, s = problem, problem.shape
    weight = p.weight.permute(0, 2, 3, 1).contiguous() if p.conv else p.weight
    packed = ops.pack_weight(weight, p.weight_scale, p.bias, s.groups)
    stats = ops.moments(p.q, p.scales.dim())
    if strategy is Strategy.FIXED:
        predictor = torch.tensor([p.y_scale * 1.1, p.y_zero_point])
    elif strategy is Strategy.DYNAMIC:
        predictor = None
    else:
        laws = surrogates.weight_laws(p.float_weight(), p.bias, strategy is Strategy.GAUSSIAN_CHANNEL)
        predictor = torch.cat([torch.tensor([_WIDTH, _WIDTH, 0.0]), laws])
    options = {"strategy": int(strategy), "predictor": predictor}
    if strategy in (Strategy.GAUSSIAN, Strategy.GAUSSIAN_CHANNEL):
        options["gamma"] = p.gamma
    options |= {name: bound for name, bound in zip(("activation_min", "activation_max"), p.bounds, strict=True) if bound is not None}
    x = (p.q, p.scales, p.zero_points, stats)
    if p.conv:
        op, k = ops.conv2d.default, s.kernel
        arguments = (packed, s.out_channels, [k, k], [s.stride] * 2, [s.padding] * 2, [1, 1], s.groups)
    else:
        op, arguments = ops.linear.default, (packed, s.out_channels)
    call = recorded_call(op, x, arguments, options)

    def result():
        codes, scale, zero_point, out_stats = call()
        if out_stats.shape != (*p.scales.shape, 3):
            raise Skip("wrong result: no moments and clip counts")
        if not torch.equal(out_stats[..., 0], codes.flatten(p.scales.dim()).sum(-1, dtype=torch.int64)):
            raise Skip("wrong result: the sums of the codes are wrong")
        view = [*scale.shape, *[1] * (codes.dim() - scale.dim())]
        step, zero = scale.reshape(view), zero_point.reshape(view)
        return step * (codes.float() - zero), step, step * (0 - zero), step * (255 - zero)

    return Runner(call, result, p.own_reference())


# ----------------------------------------------------------------------------------------------------------------------
# torch


def _codes_result(problem: Problem, codes: Callable[[], Tensor], scale: float | None = None, zero_point: int | None = None):
    scale = problem.y_scale if scale is None else scale
    zero = problem.y_zero_point if zero_point is None else zero_point

    def result():
        return scale * (codes().float() - zero), scale, scale * (0 - zero), scale * (255 - zero)

    return result


_POST_OPS = {"none": ("none", [], ""), "relu": ("relu", [], ""), "relu6": ("hardtanh", [0.0, 6.0], "")}


def _onednn_call(problem: Problem, y_scale: float, y_zero_point: int, dtype) -> Callable[[], Tensor]:
    p, s, onednn = problem, problem.shape, torch.ops.onednn
    post, arguments, algorithm = _POST_OPS[s.activation]
    zeros = torch.zeros(s.out_channels, dtype=torch.int32)
    if p.conv:
        geometry = ([s.stride] * 2, [s.padding] * 2, [1, 1], s.groups)
        packed = onednn.qconv_prepack(p.weight, p.weight_scale, p.x_scale, p.zero_point, *geometry, list(p.q.shape))
        op = onednn.qconv_pointwise.default
        return lambda: op(p.q, p.x_scale, p.zero_point, packed, p.weight_scale, zeros, p.bias, *geometry, y_scale, y_zero_point, dtype, post, arguments, algorithm)  # fmt: skip
    x = p.q.reshape(-1, s.in_channels)
    packed = onednn.qlinear_prepack(p.weight, list(x.shape))
    op = onednn.qlinear_pointwise.default
    return lambda: op(x, p.x_scale, p.zero_point, packed, p.weight_scale, zeros, p.bias, y_scale, y_zero_point, dtype, post, arguments, algorithm)  # fmt: skip


def onednn_static(problem: Problem) -> Runner:
    call = _onednn_call(problem, problem.y_scale, problem.y_zero_point, torch.uint8)
    return Runner(call, _codes_result(problem, lambda: call().reshape(problem.reference.shape)), problem.reference)


def onednn_dynamic(problem: Problem) -> Runner:
    """oneDNN's layer with float32 output, its range, and quantization: three passes, as torch composes them."""
    layer = _onednn_call(problem, 1.0, 0, torch.float32)

    def call():
        y = layer()
        low, high = (float(bound) for bound in torch.aminmax(y))
        scale, zero_point = _parameters(low, high)
        return torch.quantize_per_tensor(y, scale, zero_point, torch.quint8)

    def result():
        y = call()
        scale, zero = y.q_scale(), y.q_zero_point()
        return y.dequantize().reshape(problem.reference.shape), scale, scale * (0 - zero), scale * (255 - zero)

    return Runner(call, result, problem.reference)


def _parameters(low: float, high: float) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-12)
    return scale, round(-low / scale)


def fbgemm_static(problem: Problem) -> Runner:
    p, s = problem, problem.shape
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise Skip("this torch lacks fbgemm")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zeros = torch.zeros(s.out_channels, dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(p.weight, p.weight_scale.double(), zeros, 0)
            x = torch._make_per_tensor_quantized_tensor(p.q, p.x_scale, p.zero_point)
            relu = s.activation != "none"  # a ReLU6's upper bound is the range's end
            if p.conv:
                packed = torch.ops.quantized.conv2d_prepack(weight, p.bias, [s.stride] * 2, [s.padding] * 2, [1, 1], s.groups)
                op = torch.ops.quantized.conv2d_relu.new if relu else torch.ops.quantized.conv2d.new
            else:
                packed = torch.ops.quantized.linear_prepack(weight, p.bias)
                op = torch.ops.quantized.linear_relu if relu else torch.ops.quantized.linear
    finally:
        torch.backends.quantized.engine = before

    def call():
        return op(x, packed, p.y_scale, p.y_zero_point)

    def result():
        torch.backends.quantized.engine = "fbgemm"
        try:
            return _codes_result(p, lambda: call().int_repr())()
        finally:
            torch.backends.quantized.engine = before

    return Runner(call, result, p.reference)


def torch_float(problem: Problem, dtype: torch.dtype) -> Runner:
    """oneDNN's float layer with its weight laid out beforehand, as torch.compile with freezing calls it."""
    p, s = problem, problem.shape
    x, weight, bias = p.float_input().to(dtype), p.float_weight().to(dtype), p.bias.to(dtype)
    post, arguments, algorithm = _POST_OPS[s.activation]
    if p.conv:
        x = x.to(memory_format=torch.channels_last)
        geometry = ([s.padding] * 2, [s.stride] * 2, [1, 1], s.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        op = torch.ops.mkldnn._convolution_pointwise.default

        def call():
            return op(x, packed, bias, *geometry, post, arguments, algorithm)
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0] * x.shape[1])
        op = torch.ops.mkldnn._linear_pointwise.default

        def call():
            return op(x, packed, bias, post, arguments, algorithm)

    def result():
        return call().float().reshape(p.reference.shape), None, -np.inf, np.inf

    return Runner(call, result, p.reference, tolerance=2e-3 if dtype is torch.float32 else 3e-2)


# ----------------------------------------------------------------------------------------------------------------------
# onnxruntime and OpenVINO, from graphs of one layer


def _require(module: str):
    if importlib.util.find_spec(module) is None:
        raise Skip(f"{module} is not installed")


class _Graph:
    """Writes the few ONNX nodes of one layer."""

    def __init__(self):
        _require("onnx")
        from onnx import helper, numpy_helper

        self.helper, self.numpy_helper = helper, numpy_helper
        self.nodes, self.constants = [], []

    def constant(self, name: str, value) -> str:
        self.constants.append(self.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str | list[str], domain: str = "", **attributes) -> str:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(self.helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> bytes:
        from onnx import TensorProto

        types = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}

        def infos(values):
            return [self.helper.make_tensor_value_info(name, types[dtype], list(shape)) for name, (dtype, shape) in values.items()]

        graph = self.helper.make_graph(self.nodes, "layer", infos(inputs), infos(outputs), self.constants)
        opsets = [self.helper.make_opsetid("", 17), self.helper.make_opsetid("com.microsoft", 1)]
        return self.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _onnx_session(model: bytes, threads: int, inputs: dict[str, np.ndarray], outputs: dict[str, tuple]):
    """(call, the output arrays by name)."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in outputs.items()}
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in inputs.values()]
    for name, value in zip(inputs, kept, strict=True):
        binding.bind_ortvalue_input(name, value)
    for name, array in arrays.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call():
        session.run_with_iobinding(binding)

    call.keep = (kept, inputs)
    return call, arrays


def _geometry(shape: Shape) -> dict:
    return {"kernel_shape": [shape.kernel] * 2, "strides": [shape.stride] * 2, "pads": [shape.padding] * 4, "group": shape.groups}


def onnxruntime_static(problem: Problem, threads: int) -> Runner:
    """QLinearConv on channels_last memory, or QGemm: what onnxruntime makes of a quantized model."""
    p, s, g = problem, problem.shape, _Graph()
    x_parameters = [g.constant("xs", np.float32(p.x_scale)), g.constant("xz", np.uint8(p.zero_point))]
    y_parameters = [g.constant("ys", np.float32(p.y_scale)), g.constant("yz", np.uint8(p.y_zero_point))]
    zeros = g.constant("wz", np.zeros(s.out_channels, np.int8))
    scale, bias = g.constant("ws", p.weight_scale.numpy()), g.constant("b", p.bias_int32.numpy())
    if p.conv:
        x = p.q.permute(0, 2, 3, 1).contiguous().numpy()
        weight = g.constant("w", p.weight.numpy())
        g.node("QLinearConv", ["x", *x_parameters, weight, scale, zeros, *y_parameters, bias], "y", "com.microsoft", channels_last=1, **_geometry(s))
        y_shape = (s.batch, s.out_height, s.out_width, s.out_channels)
    else:
        x = p.q.reshape(-1, s.in_channels).numpy()
        weight = g.constant("w", p.weight.t().numpy())
        g.node("QGemm", ["x", *x_parameters, weight, scale, zeros, bias, *y_parameters], "y", "com.microsoft")
        y_shape = (x.shape[0], s.out_channels)
    model = g.model({"x": ("uint8", x.shape)}, {"y": ("uint8", y_shape)})
    call, arrays = _onnx_session(model, threads, {"x": x}, {"y": ("uint8", y_shape)})

    def codes():
        call()
        y = torch.from_numpy(arrays["y"].copy())
        return y.permute(0, 3, 1, 2) if p.conv else y.reshape(p.reference.shape)

    return Runner(call, _codes_result(p, codes), p.reference)


def onnxruntime_dynamic(problem: Problem, threads: int) -> Runner:
    """ConvInteger or MatMulInteger, scales and bias in float32, DynamicQuantizeLinear: what quantize_dynamic makes of a layer."""
    p, s, g = problem, problem.shape, _Graph()
    zero = g.constant("xz", np.uint8(p.zero_point))
    factor = (p.x_scale * p.weight_scale).numpy()
    if p.conv:
        x = p.q.contiguous().numpy()
        weight = g.constant("w", (p.weight.int() + 128).to(torch.uint8).numpy())  # ConvInteger has no int8 weights
        g.node("ConvInteger", ["x", weight, zero, g.constant("wz", np.uint8(128))], "acc", **_geometry(s))
        g.node("Cast", ["acc"], "float", to=1)
        g.node("Mul", ["float", g.constant("factor", factor.reshape(1, -1, 1, 1))], "scaled")
        value = g.node("Add", ["scaled", g.constant("b", p.bias.reshape(1, -1, 1, 1).numpy())], "sum")
        y_shape = (s.batch, s.out_channels, s.out_height, s.out_width)
    else:
        x = p.q.reshape(-1, s.in_channels).numpy()
        weight = g.constant("w", p.weight.t().numpy())
        scales = [g.constant("xs", np.float32(p.x_scale)), g.constant("ws", p.weight_scale.numpy())]
        zeros = [zero, g.constant("wz", np.zeros(s.out_channels, np.int8))]
        value = g.node("MatMulIntegerToFloat", ["x", weight, *scales, *zeros, g.constant("b", p.bias.numpy())], "sum", "com.microsoft")
        y_shape = (x.shape[0], s.out_channels)
    if s.activation == "relu":
        value = g.node("Relu", [value], "active")
    elif s.activation == "relu6":
        value = g.node("Clip", [value, g.constant("low", np.float32(0)), g.constant("high", np.float32(6))], "active")
    g.node("DynamicQuantizeLinear", [value], ["y", "ys", "yz"])
    outputs = {"y": ("uint8", y_shape), "ys": ("float32", ()), "yz": ("uint8", ())}
    call, arrays = _onnx_session(g.model({"x": ("uint8", x.shape)}, outputs), threads, {"x": x}, outputs)

    def result():
        call()
        y, scale, zero_point = torch.from_numpy(arrays["y"].copy()), float(arrays["ys"]), int(arrays["yz"])
        y = y.reshape(p.reference.shape)
        return scale * (y.float() - zero_point), scale, scale * (0 - zero_point), scale * (255 - zero_point)

    return Runner(call, result, p.reference, tolerance=4e-3)


def openvino_static(problem: Problem, threads: int) -> Runner:
    """The layer between QuantizeLinear and DequantizeLinear nodes, compiled to int8.

    Inputs and outputs lie in memory as channels_last: OpenVINO turns the two transpositions into no work at all.
    """
    _require("openvino")
    import openvino

    p, s, g = problem, problem.shape, _Graph()
    x_parameters = [g.constant("xs", np.float32(p.x_scale)), g.constant("xz", np.uint8(p.zero_point))]
    y_parameters = [g.constant("ys", np.float32(p.y_scale)), g.constant("yz", np.uint8(p.y_zero_point))]
    weight = p.weight if p.conv else p.weight.t()
    zeros = g.constant("wz", np.zeros(s.out_channels, np.int8))
    g.node("DequantizeLinear", [g.constant("w", weight.numpy()), g.constant("ws", p.weight_scale.numpy()), zeros], "wf", axis=0 if p.conv else 1)
    bias = g.constant("b", p.bias.numpy())
    x = p.q.permute(0, 2, 3, 1).contiguous() if p.conv else p.q.reshape(-1, s.in_channels)
    float_x = g.node("DequantizeLinear", ["x", *x_parameters], "xf")
    if p.conv:
        float_x = g.node("Transpose", [float_x], "xt", perm=[0, 3, 1, 2])
        value = g.node("Conv", [float_x, "wf", bias], "sum", **_geometry(s))
    else:
        value = g.node("Add", [g.node("MatMul", [float_x, "wf"], "product"), bias], "sum")
    if s.activation != "none":  # a ReLU6's upper bound is the range's end
        value = g.node("Relu", [value], "active")
    if p.conv:
        g.node("Transpose", [g.node("QuantizeLinear", [value, *y_parameters], "codes")], "y", perm=[0, 2, 3, 1])
        y_shape = (s.batch, s.out_height, s.out_width, s.out_channels)
    else:
        g.node("QuantizeLinear", [value, *y_parameters], "y")
        y_shape = (x.shape[0], s.out_channels)
    core = openvino.Core()
    model = core.read_model(g.model({"x": ("uint8", tuple(x.shape))}, {"y": ("uint8", y_shape)}))
    compiled = core.compile_model(model, "CPU", openvino_settings(threads))
    for layer, precision in openvino_precisions(compiled):
        if precision not in ("u8", "i8"):
            raise Skip(f"OpenVINO runs this {layer} in {precision}")
    request = compiled.create_infer_request()
    data = x.numpy()
    request.set_input_tensor(openvino.Tensor(data, shared_memory=True))

    def call():
        request.infer()

    call.keep = (data, compiled)

    def codes():
        call()
        y = torch.from_numpy(request.get_output_tensor().data.copy())
        return y.permute(0, 3, 1, 2) if p.conv else y.reshape(p.reference.shape)

    return Runner(call, _codes_result(p, codes), p.reference, tolerance=4e-3)


def openvino_settings(threads: int) -> dict:
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}


def openvino_precisions(compiled) -> list[tuple[str, str]]:
    """(kind, precision it runs in) of every layer with weights."""

    def text(value) -> str:
        return str(value.astype(str) if hasattr(value, "astype") else value)

    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
    return [(text(info["layerType"]), text(info["runtimePrecision"])) for info in infos if text(info["layerType"]) in kinds]


# ----------------------------------------------------------------------------------------------------------------------


def _probabilistic(problem: Problem) -> Strategy:
    return Strategy.GAUSSIAN_CHANNEL if problem.granularity == "channel" else Strategy.GAUSSIAN


#: name -> builder(problem, threads). The static int8 peers are what "the best peer" is chosen from.
CONTESTANTS: dict[str, Callable[[Problem, int], Runner]] = {
    "probquant static": lambda p, threads: probquant_layer(p, Strategy.FIXED),
    "probquant probabilistic": lambda p, threads: probquant_layer(p, _probabilistic(p)),
    "probquant dynamic": lambda p, threads: probquant_layer(p, Strategy.DYNAMIC),
    "torch oneDNN static": lambda p, threads: onednn_static(p),
    "torch oneDNN dynamic": lambda p, threads: onednn_dynamic(p),
    "torch fbgemm static": lambda p, threads: fbgemm_static(p),
    "onnxruntime static": onnxruntime_static,
    "onnxruntime dynamic": onnxruntime_dynamic,
    "openvino static": openvino_static,
    "torch float32": lambda p, threads: torch_float(p, torch.float32),
    "torch bfloat16": lambda p, threads: torch_float(p, torch.bfloat16),
}
OURS = tuple(name for name in CONTESTANTS if name.startswith("probquant"))
STATIC_PEERS = tuple(name for name in CONTESTANTS if name.endswith("static") and name not in OURS)


def build(name: str, problem: Problem, threads: int) -> Runner:
    """A checked runner. Raises Skip with the reason why a contestant cannot take part."""
    try:
        runner = CONTESTANTS[name](problem, threads)
        check(runner)
    except Skip:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()
        raise Skip(f"{type(error).__name__}: {first[0][:200] if first else ''}") from error
    return runner
