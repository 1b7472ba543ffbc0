"""quantize(): from a float model and a few calibration batches to an int8 model.

capture the graph (graph.py) -> choose what becomes int8 -> look at what is worth what (influence.py), choose channel profiles (profiles.py)
-> calibrate (surrogates.py) -> choose ranges (choice.py) -> write the int8 graph (this file).
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import inspect
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from . import choice, rounding, shifts, surrogates
from ._ops import Activation, Strategy, ops
from .graph import PASSES_THROUGH, Unit, aten, choose_int8, find_units, reads_codes, shape_of, trace
from .influence import Look, channel_axis, look
from .model import Capture, LayerInfo, QuantizedModel, make_unit, set_tensor, validate
from .nodes import check_sizes, fixes_batch
from .profiles import apply_profiles, choose_powers, find_components, input_factors, usual_noise
from .transformer import aliases

SURROGATES = ("auto", "gaussian", "gaussian_channel", "channel", "probe")
_CALIBRATION_CHUNK = 8  # images that run through the float model at once: bounds the memory of calibration
_HELD_IMAGES = 64  # images that are gone through more than once, for channel profiles, auto's choice and clipped shares; held in memory
_FLOAT = "float_layers."  # where the tensors of float layers live in the int8 model
_CALIBRATION_TOKENS = 64  # tokens of a chunk that a per-token layer is fitted to, evenly spaced


def quantize(
    model: nn.Module,
    calibration_batches: Iterable,
    *,
    strategy: str = "probabilistic",
    surrogate: str = "auto",
    gamma: int = 0,
    criterion: str = "mse",
    percentile: float = 99.99,
    bias_correction: bool = True,
    channel_profile: bool | None = None,
    weight_rounding: str = "gptq",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: bool = True,
) -> QuantizedModel:
    """Makes an int8 model of a float one, whose parameters may be float32, float16 or bfloat16. The float model is left untouched, and so are the
    calibration batches: a model that writes into its inputs becomes one that computes the same and does not.

    calibration_batches: iterable of float batches as the model takes them (a tensor, or a tuple of positional arguments;
        arguments the model does not take, labels for example, are ignored). A few dozen samples do. Read once.
    strategy: "probabilistic" (scales predicted per image from the layer's input, arXiv 2505.10689), "static" (fixed
        scales), or "dynamic" (exact minimum and maximum of every finished output).
    surrogate: how the probabilistic strategy predicts. "gaussian": the paper's, one law for all weights of a layer;
        "gaussian_channel": one law per output channel; "channel": one per input channel, from the input's channel moments;
        "probe": exact range of a sixteenth of the output, computed first. "auto" measures all of them, fixed ranges and exact ones, on
        the calibration samples and on shifted copies of them, and improves the layers that gain most for their cost until the output's
        mean SQNR is not below that of exact ranges without channel profiles, and within 0.3 dB of that with them (choice.py: what it
        allows, and what it falls back to). channel is for convolutions; gaussian stands in elsewhere.
    gamma: the gaussian surrogates sum the receptive fields of every gamma-th position in each direction, as in the paper; 0
        (the default) takes the input's moments instead, which the layer before has already summed: free. auto tries both
        0 and this stride (4, if it is 0).
    criterion: what the widths of a range are fitted to: "mse", "percentile" or "minmax"; for static ranges also "entropy". Those of
        predicted ranges are fitted on shifted copies of the samples, too, "mse" to the mean square of the samples' noise over signal.
    percentile: share of the calibration outputs, in %, that must not be clipped, for criterion "percentile".
    bias_correction: takes the mean error that a layer's rounded weights make on the calibration data and shifted copies of it, each over its
        signal, out of its bias.
    channel_profile: a static factor per channel of every tensor that only layers read, at no cost at run time (profiles.py). None: for the
        probabilistic strategy, unless its surrogate does better without (auto always has them); static and dynamic quantization are then
        what is commonly meant by it.
    weight_rounding: "gptq": each weight makes up for the rounding of others, by the second moments of the layer's inputs (rounding.py);
        layers too large for that are rounded to nearest, and say so in the summary. Or "nearest": calibration is quicker.
    include, exclude: names or fnmatch patterns of layers to quantize, or to keep in float.

    Raises ValueError for bad arguments, a model with nothing to quantize, or calibration data that is empty or not finite, or makes a layer's
    output so; TypeError for what is no float module; RuntimeError when torch.export cannot capture the model.
    """
    _check_choice("strategy", strategy, ("probabilistic", "static", "dynamic"))
    _check_choice("surrogate", surrogate, SURROGATES)
    _check_choice("criterion", criterion, surrogates.CRITERIA)
    _check_choice("weight_rounding", weight_rounding, ("nearest", "gptq"))
    if criterion == "entropy" and strategy != "static":
        raise ValueError(f"probquant: criterion 'entropy' is for static ranges, strategy is {strategy!r}")
    if not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 0:
        raise ValueError(f"probquant: gamma is {gamma!r}, want an integer >= 0")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"probquant: percentile is {percentile!r}, want a share in % in (0, 100]")
    check_float_model(model)

    inputs = model_inputs(model, calibration_batches)
    example = next(inputs)
    graph_module = trace(model, example)
    settings = {
        "strategy": strategy, "surrogate": surrogate, "gamma": gamma, "criterion": criterion, "percentile": percentile,
        "bias_correction": bool(bias_correction),
        "channel_profile": bool(channel_profile) if channel_profile is not None or strategy != "probabilistic" else None,
        "weight_rounding": weight_rounding,
    }  # fmt: skip
    chunks = chunks_for(graph_module, chain([example], inputs))
    held = list(islice(chunks, _HELD_IMAGES // _CALIBRATION_CHUNK))
    qmodel = quantize_graph(graph_module, chain(held, chunks), settings, include, exclude, progress)
    validate(qmodel)
    _record_clipping(qmodel, held)
    return qmodel


def quantize_graph(
    graph_module: fx.GraphModule, chunks: Iterator[tuple], settings: dict[str, Any],
    include: Sequence[str] | None, exclude: Sequence[str] | None, progress: bool,
) -> QuantizedModel:  # fmt: skip
    """quantize() behind its checks: from what trace() gave, which is changed, and chunks_for()."""
    units = find_units(graph_module)
    choose_int8(units, _selector(units, include, exclude))
    if not any(unit.int8 and unit.is_layer for unit in units):
        reasons = {unit.reason for unit in units if unit.is_layer} or {"it has no convolution or linear layer"}
        raise ValueError(f"probquant: nothing to quantize in the model: {'; '.join(sorted(reasons))}")
    held = list(islice(chunks, _HELD_IMAGES // _CALIBRATION_CHUNK))
    shifted = _Shifter(held[0])
    auto = settings["strategy"] == "probabilistic" and settings["surrogate"] == "auto"
    if not auto and settings["channel_profile"] is False:
        variant = _Variant.of(units, settings)
        _calibrate(graph_module, [variant], chain(held, chunks), progress, shifted)
        return variant.write(graph_module)

    seen = look(graph_module, *_looked_at(units), tqdm(held, desc="looking", unit=" chunks", disable=not progress), shifted)
    plain, profiles = [copy.copy(unit) for unit in units], {}
    for unit in plain:
        unit.options = dict(unit.options)
    if settings["channel_profile"] is not False:
        components = find_components(units)
        usual = usual_noise(components, seen)
        profiles = apply_profiles(components, choose_powers(components, seen, usual), seen, usual)
    variants = [_Variant.of(units, settings, profiles)]
    if profiles and (auto or settings["channel_profile"] is None):  # what there would be without them: dynamic quantization, or the surrogate itself
        variants.append(_Variant.of(plain, {**settings, "strategy": "dynamic"} if auto else settings))
    _calibrate(graph_module, variants, chain(held, chunks), progress, shifted)
    if auto:
        return _choose_ranges(graph_module, variants[0], variants[-1], plain, seen, choice.Judges(graph_module, held, shifted), progress)
    qmodels = [variant.write(graph_module) for variant in variants]
    if len(qmodels) > 1:  # a profile may cost a surrogate more than it gains
        judges = choice.Judges(graph_module, held, shifted)
        with_profiles, without = (judges.decibels(lambda half, qmodel=qmodel: qmodel) for qmodel in qmodels)
        if not choice.better(with_profiles, without):
            return qmodels[1]
    return qmodels[0]


def _looked_at(units: list[Unit]) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """The tensors around int8 units and where they have their channels; those that are asked for nothing but what noise in them is worth."""
    axes, whole = {}, set()
    for unit in units:
        if unit.int8:
            axes |= {node: channel_axis(node, unit) for node in (*unit.inputs, unit.anchor, unit.output)}
            whole |= {*unit.inputs, unit.output}
    return axes, axes.keys() - whole


def capture(model: nn.Module, *inputs, like: QuantizedModel | None = None) -> tuple[Any, dict[str, Capture]]:
    """Runs a model and returns (output, {layer name: Capture}) for every layer that quantize() would make int8.

    `like` takes the layers (and where their outputs are taken) from a QuantizedModel, so that both can be compared.
    """
    if isinstance(model, QuantizedModel):
        return model.capture(*inputs)
    graph_module = _cached_trace(model, inputs)
    if like is not None:
        names = {layer.output: layer.name for layer in like.layers if layer.int8}
    else:
        units = find_units(graph_module)
        choose_int8(units, lambda name: True)
        names = {unit.output.name: unit.name for unit in units if unit.int8 and unit.kind != "flatten"}
    captures: dict[str, Capture] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node.name in names:
                captures[names[node.name]] = Capture(result)
            return result

    with torch.no_grad():
        return Recorder(graph_module).run(*inputs), captures


_traces: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _cached_trace(model: nn.Module, example: tuple) -> fx.GraphModule:
    version = tuple((id(t), t._version) for t in (*model.parameters(), *model.buffers()))
    cached = _traces.get(model)
    if cached is None or cached[0] != version:
        cached = _traces[model] = (version, trace(model, example))
    return cached[1]


def check_float_model(model) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, QuantizedModel):
        raise TypeError(f"probquant: model is a {type(model).__name__}, want a float torch.nn.Module")


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"probquant: {name} is {value!r}, want one of {', '.join(map(repr, choices))}")


def model_inputs(model: nn.Module, batches: Iterable) -> Iterator[tuple]:
    """Each batch as the tuple of arguments that the model takes. Raises ValueError for no batches, or a bad one."""
    if isinstance(batches, torch.Tensor):  # iterating it would give samples without their batch dimension
        raise ValueError(f"probquant: calibration_batches is a tensor {list(batches.shape)}, want an iterable of batches: [batch], or batch.split(8)")
    limit, batch = positional_limit(model), None
    for batch in batches:
        yield _inputs(batch, limit)
    if batch is None:
        raise ValueError("probquant: calibration_batches is empty, want at least one batch")


def positional_limit(model: nn.Module) -> int | None:
    """How many positional arguments forward takes; None: any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def arguments_in(batch, limit: int | None) -> tuple:
    """What of a batch the model takes, which is so many arguments at most (positional_limit)."""
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))[:limit]


def _inputs(batch, limit: int | None) -> tuple:
    inputs = arguments_in(batch, limit)
    if not inputs or not isinstance(inputs[0], torch.Tensor):
        raise ValueError(f"probquant: a calibration batch is a {type(batch).__name__}, want a tensor or a tuple of the model's inputs")
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError("probquant: a calibration batch holds values that are not finite")
    if inputs[0].dim() > 0 and inputs[0].shape[0] == 0:
        raise ValueError("probquant: a calibration batch is empty, want at least one sample")
    return inputs


def _selector(units: list[Unit], include, exclude):
    names = {name: None for unit in units if unit.is_layer for name in aliases(unit.name)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"probquant: {argument} is the string {patterns!r}, want a list of names or patterns")
        for pattern in patterns or ():
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"probquant: {argument} pattern {pattern!r} matches no layer; layers are {', '.join(names)}")

    def matches(name, patterns):
        return any(fnmatch.filter(aliases(name), pattern) for pattern in patterns)

    return lambda name: (include is None or matches(name, include)) and not (exclude and matches(name, exclude))


# ----------------------------------------------------------------------------------------------------------------------
# Calibration


def chunks_for(graph_module: fx.GraphModule, batches: Iterable[tuple]) -> Iterator[tuple]:
    """What runs through the graph at once: the batches as they come, where it takes no others. Raises ValueError for one of sizes that it does not take."""

    def checked() -> Iterator[tuple]:
        for inputs in batches:
            check_sizes("a calibration batch", inputs, graph_module.meta["sizes"])
            yield inputs

    return checked() if fixes_batch(graph_module.graph) else inputs_in_chunks(checked())


def inputs_in_chunks(batches: Iterable[tuple]) -> Iterator[tuple]:
    """The images of all batches, _CALIBRATION_CHUNK at a time, so that the batches' sizes do not matter.

    Batches whose inputs do not go together (other image sizes, other arguments without a batch dimension) are not joined.
    """
    pending: tuple | None = None
    for inputs in batches:
        if pending is not None and not _alike(pending, inputs):
            yield pending
            pending = None
        if pending is not None:
            inputs = tuple(torch.cat(pair) if _is_batched(pair[0], pending) else pair[0] for pair in zip(pending, inputs, strict=True))
        count = inputs[0].shape[0]
        for begin in range(0, count, _CALIBRATION_CHUNK):
            pending = tuple(x[begin : begin + _CALIBRATION_CHUNK] if _is_batched(x, inputs) else x for x in inputs)
            if pending[0].shape[0] == _CALIBRATION_CHUNK:
                yield pending
                pending = None
    if pending is not None:
        yield pending


def _is_batched(x, inputs: tuple) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == inputs[0].shape[0]


def _alike(a: tuple, b: tuple) -> bool:
    """Whether two batches can be joined."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if _is_batched(x, a) != _is_batched(y, b):
            return False
        if _is_batched(x, a):
            if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
                return False
        elif isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or x != y:
            return False
    return True


def _strategies(unit: Unit, settings: dict) -> list[tuple[Strategy, int]]:
    """What may give the unit's output its range, with its gamma; several where auto chooses."""
    if not unit.quantized_output or unit.kind in PASSES_THROUGH:
        return [(Strategy.NONE, 0)]
    if settings["strategy"] != "probabilistic" or unit.kind in ("layer_norm", "attention"):  # whose rows are whole before they leave L1: exact ranges are free
        return [(Strategy.FIXED if settings["strategy"] == "static" else Strategy.DYNAMIC, 0)]
    if not unit.is_layer:
        several = unit.kind in ("add", "mul") and settings["surrogate"] == "auto"
        return [(Strategy.FIXED, 0), (Strategy.GAUSSIAN, 0), (Strategy.DYNAMIC, 0)] if several else [(Strategy.GAUSSIAN, 0)]
    surrogate, gamma, convolution = settings["surrogate"], settings["gamma"], unit.kind == "conv2d"
    if surrogate == "auto":
        found = [(Strategy.FIXED, 0), (Strategy.GAUSSIAN, 0)]
        if convolution:
            found += [(Strategy.GAUSSIAN_CHANNEL, 0), (Strategy.CHANNEL, 0), (Strategy.GAUSSIAN, gamma or 4), (Strategy.PROBE, 0)]
        return [*found, (Strategy.DYNAMIC, 0)]
    if surrogate == "channel" and not convolution:
        return [(Strategy.GAUSSIAN, 0)]
    if surrogate in ("channel", "probe"):
        return [(Strategy[surrogate.upper()], 0)]
    return [(Strategy[surrogate.upper()], gamma)]


class _Plan:
    """One int8 unit on its way: its quantized weight, what may give it its range, and what calibration learns of both."""

    def __init__(self, unit: Unit, settings: dict):
        self.unit = unit
        self.settings = settings
        strategies = _strategies(unit, settings)
        self.strategy, self.gamma = strategies[0]  # of several, take() takes one
        self.predictor: dict[str, float] = {}
        self.judged: dict[str, list[float]] = {}
        self.cost, self.saved = 0.0, 0.0  # of the choice over a fixed range: nanoseconds per sample, decibels at the network's output
        self.sizes = (0, 0)  # values of a sample's output and inputs
        self.laws: dict[Strategy, torch.Tensor] = {}  # predictors of width 1
        self.leaves: dict[str, torch.Tensor] = {}
        self.correlation = surrogates.CorrelationFit()
        self.input_fit = surrogates.StaticFit()
        self.limit = 2.0**-60  # largest magnitude in the first chunk: fixed ranges are tried relative to it
        if unit.is_layer:
            self.leaves["weight"], self.leaves["weight_scale"] = surrogates.quantize_weight(unit.weight)
            if unit.bias is not None:
                self.leaves["bias"] = unit.bias
            if unit.output_profile is not None:
                self.leaves["profile"] = unit.output_profile
            unit.options.setdefault("groups", 1)
            if unit.kind == "conv2d":
                unit.options["kernel_size"] = list(unit.weight.shape[1:3])
        self.rounding_fit, self.rounding = None, ""  # it and bias_fit know the values of the float graph: no profile is in them
        if unit.is_layer and settings["weight_rounding"] == "gptq":
            size = unit.weight[0].numel()
            if size <= rounding.LARGEST:
                self.rounding_fit, self.rounding = rounding.RoundingFit(unit.weight.shape, unit.options, settings["bias_correction"]), "gptq"
            else:
                self.rounding = f"rounded to nearest: {size} weights per output, gptq takes {rounding.LARGEST}"
        self.bias_fit = None
        if unit.is_layer and settings["bias_correction"]:
            self.bias_fit = surrogates.BiasFit(unit.weight.shape, unit.options)
        self.static_fit = surrogates.StaticFit() if self.strategy is Strategy.FIXED and len(strategies) == 1 else None
        self.candidates: list[surrogates.Candidate] = []
        if settings["strategy"] == "probabilistic" and (unit.is_layer or unit.kind in ("add", "mul")) and self.strategy is not Strategy.NONE:
            self.candidates = [surrogates.Candidate.of(*one) for one in strategies]
        self.channel_fit = None
        if any(candidate.strategy is Strategy.CHANNEL for candidate in self.candidates) and not surrogates.is_depthwise(unit.weight, unit.options["groups"]):
            self.channel_fit = surrogates.ChannelFit(self.float_weight(), self.over_profile(unit.bias), unit.options["groups"])

    @property
    def learns(self) -> bool:
        """Whether calibration has anything to tell it."""
        fits_input = self.settings["strategy"] == "static" and self.unit.is_layer
        return fits_input or bool(self.candidates) or any(fit is not None for fit in (self.static_fit, self.bias_fit, self.rounding_fit))

    def float_weight(self) -> torch.Tensor:
        """The weight that the kernel multiplies with, over the output's profile, as all that is predicted."""
        scale = self.over_profile(self.leaves["weight_scale"])
        return self.leaves["weight"].float() * scale.reshape(-1, *[1] * (self.unit.weight.dim() - 1))

    def over_profile(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Values per output channel in units of the output's profile."""
        return values if values is None or self.unit.output_profile is None else values / self.unit.output_profile

    def predictor_values(self, strategy: Strategy, first: float, second: float) -> torch.Tensor | None:
        """The predictor of a strategy with these widths (alpha and beta; below and above; for a fixed range, lo and hi)."""
        if strategy is Strategy.DYNAMIC:
            return None
        if strategy is Strategy.FIXED:
            return surrogates.static_predictor(first, second)
        if strategy is Strategy.PROBE:
            return torch.tensor([first, second], dtype=torch.float32)
        if strategy not in self.laws:
            self.laws[strategy] = self._law(strategy)
        predictor = self.laws[strategy].clone()
        predictor[0], predictor[1] = first, second
        return predictor

    def _law(self, strategy: Strategy) -> torch.Tensor:
        head = torch.tensor([1.0, 1.0, self.correlation.fit()], dtype=torch.float32)
        if self.unit.kind in ("add", "mul"):
            return head[: {"add": 3, "mul": 2}[self.unit.kind]]
        weight, bias = self.float_weight(), self.over_profile(self.leaves.get("bias"))
        if strategy is Strategy.CHANNEL:
            factors = (1.0, 1.0) if self.channel_fit is None else self.channel_fit.fit()
            return torch.cat([head, surrogates.channel_laws(weight, bias, self.unit.options["groups"], *factors)])
        return torch.cat([head, surrogates.weight_laws(weight, bias, strategy is Strategy.GAUSSIAN_CHANNEL)])

    def prepare(self, values: dict[fx.Node, torch.Tensor], images: int) -> None:
        """Learns from the first chunk, of so many images, what must be known before ranges can be predicted."""
        unit = self.unit
        self.sizes = tuple(sum(values[node].numel() for node in nodes) // images for nodes in ([unit.output], unit.inputs))
        if not self.candidates:
            return
        self.limit = max(self.limit, float(values[unit.output].abs().max()))
        if unit.kind == "add":
            self.correlation.update(*(values[i] for i in unit.inputs))
        elif unit.residual is not None:
            self.correlation.update(values[unit.anchor], values[unit.residual])
        if self.channel_fit is not None:
            self.channel_fit.update(values[unit.inputs[0]], values[unit.anchor])

    def observe_layer(self, raw: dict[fx.Node, torch.Tensor]) -> None:
        """Learns from the float graph's own values of one chunk of samples, or of shifted copies, what the weights are rounded and biased for."""
        if not all(math.isfinite(end) for end in torch.aminmax(raw[self.unit.output])):
            raise ValueError(f"probquant: the float model's output of {self.unit.name!r} is not finite for a calibration sample, or a shifted copy of one")
        fits = [fit for fit in (self.rounding_fit, self.bias_fit) if fit is not None]
        if fits:
            x, weights = raw[self.unit.inputs[0]].float(), surrogates.sample_weights(raw[self.unit.anchor])
            for fit in fits:
                fit.update(x, weights)

    def observe(self, values: dict[fx.Node, torch.Tensor]) -> None:
        """Learns the fixed ranges of static quantization, from the samples as they are, as is usual."""
        x = self.unit.inputs[0]
        if self.settings["strategy"] == "static" and self.unit.is_layer:
            self.input_fit.update(values[x])
        if self.static_fit is not None:
            self.static_fit.update(values[self.unit.output])

    def try_ranges(self, values: dict[fx.Node, torch.Tensor], number: int) -> None:
        """Lets every candidate predict the ranges of a chunk whose first image is `number` in the stream."""
        unit = self.unit
        if not self.candidates:
            return
        inputs = [values[i].float() for i in unit.inputs]
        y, residual = values[unit.output], None if unit.residual is None else values[unit.residual].float()
        images, options = y.shape[0], unit.options
        if unit.kind == "linear":
            (x, y, residual), keep = self._tokens(inputs[0], y, residual)
            inputs, options = [x], {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
        else:
            keep = torch.arange(images)
        if y.numel() == 0:
            return
        half = (number + keep) // shifts.KINDS % 2
        outputs = surrogates.SampleOutputs(y)
        act = (unit.activation, unit.activation_min, unit.activation_max, unit.output_profile)
        codes = residual_codes = ()
        if unit.is_layer:
            codes = ops.quantize(inputs[0], channel_stats=any(c.strategy is Strategy.CHANNEL for c in self.candidates))
            residual_codes = () if residual is None else ops.quantize(residual.to(memory_format=torch.channels_last))
        for candidate in self.candidates:
            strategy = candidate.strategy
            if strategy is Strategy.DYNAMIC:
                ranges = surrogates.exact_ranges(outputs)
            elif strategy is Strategy.PROBE:
                ranges = surrogates.probe_ranges(y, *act)
            else:
                if strategy is Strategy.FIXED:
                    laws = surrogates.fixed_law(self.limit).expand(len(y), 1, 2)
                elif not unit.is_layer:
                    laws = self._pair_laws(*inputs)
                else:
                    predictor = self.predictor_values(strategy, 1.0, 1.0)
                    laws = surrogates.conv2d_law(codes, unit.weight.shape[0], options, residual_codes, strategy, predictor, candidate.gamma)
                ranges = surrogates.law_ranges(laws, *act)
            candidate.fit.update(ranges, outputs, half)

    def _tokens(self, x, y, residual):
        """(values of the samples that a linear layer is fitted to, as images; the images they are from)."""
        dims, images = self.unit.sample_dims, x.shape[0]
        parts = [None if part is None else surrogates.rows_as_image(part, dims) for part in (x, y, residual)]
        samples = torch.arange(len(parts[0]))
        samples = samples[:: max(1, len(samples) // _CALIBRATION_TOKENS)] if dims > 1 else samples
        return [None if part is None else part[samples] for part in parts], samples * images // max(len(parts[0]), 1)

    def _pair_laws(self, a, b) -> torch.Tensor:
        """Of a sum or a product, as the ops have them."""
        rho = self.correlation.fit()
        (mean_a, var_a), (mean_b, var_b) = ((t.double().flatten(1).mean(1), t.double().flatten(1).var(1, unbiased=False)) for t in (a, b))
        if self.unit.kind == "mul":
            variance = var_a * var_b + mean_a**2 * var_b + mean_b**2 * var_a
            return torch.stack([mean_a * mean_b, variance.sqrt()], 1)[:, None]
        variance = (var_a + var_b + 2 * rho * (var_a * var_b).sqrt()).clamp(min=0)
        return torch.stack([mean_a + mean_b, variance.sqrt()], 1)[:, None]

    def finish(self, profile: torch.Tensor | None) -> None:
        """Fixes the weights, and the range where there is no choice. profile: of the layer's input."""
        criterion, percentile = self.settings["criterion"], self.settings["percentile"]
        if self.rounding_fit is not None:
            self.leaves["weight"] = self.rounding_fit.fit(self.unit.weight, self.leaves["weight_scale"], profile)
        if self.bias_fit is not None:
            correction = self.bias_fit.fit(self.unit.weight, self.leaves["weight"], self.leaves["weight_scale"], profile)
            self.leaves["bias"] = correction if self.unit.bias is None else self.unit.bias + correction
        self.laws.clear()
        if self.static_fit is not None:
            lo, hi = self.static_fit.fit(criterion, percentile)
            self.leaves["fixed"] = self.predictor_values(Strategy.FIXED, lo, hi)
            self.predictor = {"lo": lo, "hi": hi}
        if len(self.candidates) == 1:
            self.take(0)
        if self.settings["strategy"] == "static" and self.unit.is_layer:
            self.leaves["fixed_input"] = surrogates.static_predictor(*self.input_fit.fit(criterion, percentile))

    def take(self, number: int) -> None:
        """Takes one of the candidates, fitted to all samples."""
        candidate = self.candidates[number]
        self.strategy, self.gamma = candidate.strategy, candidate.gamma
        if self.strategy is Strategy.DYNAMIC:
            return
        first, second = self._ends(candidate, *candidate.fit.fit(self.settings["criterion"], self.settings["percentile"]))
        self.leaves["fixed" if self.strategy is Strategy.FIXED else "predictor"] = self.predictor_values(self.strategy, first, second)
        names = {Strategy.FIXED: ("lo", "hi"), Strategy.PROBE: ("below", "above")}.get(self.strategy, ("alpha", "beta"))
        self.predictor = dict(zip(names, (first, second), strict=True))
        if names[0] == "alpha" and (self.unit.residual is not None or self.unit.kind == "add"):
            self.predictor["rho"] = self.correlation.fit()

    def _ends(self, candidate: surrogates.Candidate, first: float, second: float) -> tuple[float, float]:
        """Fitted widths as predictor_values() takes them: of a fixed range, its ends."""
        if candidate.strategy is not Strategy.FIXED:
            return first, second
        unit, (mean, sigma) = self.unit, surrogates.fixed_law(self.limit)[0]
        ends = mean - first * sigma, mean + second * sigma
        return tuple(map(float, surrogates.activation_image(*ends, unit.activation, unit.activation_min, unit.activation_max, unit.output_profile)))

    def trial(self, number: int, half: int) -> dict[str, Any]:
        """Keyword arguments of the op for a candidate's range, fitted to the samples of the other half."""
        candidate = self.candidates[number]
        widths = self._ends(candidate, *candidate.fit.fit_without(half, self.settings["criterion"], self.settings["percentile"]))
        given = {"strategy": int(candidate.strategy), "predictor": self.predictor_values(candidate.strategy, *widths)}
        return {**given, "gamma": candidate.gamma} if candidate.gamma else given

    def options(self, price: float) -> list[choice.Option]:
        """price: what noise over signal of its codes is worth at the output, as a share of the noise there. Notes how each candidate did."""
        result = []
        for candidate in self.candidates:
            mean, rms, worst = candidate.fit.judge(self.settings["criterion"], self.settings["percentile"])
            self.judged[candidate.name] = [-10 * math.log10(max(part, 1e-14)) if part < math.inf else -140.0 for part in (mean, worst)]
            predictor = self.predictor_values(candidate.strategy, 1.0, 1.0)
            size = 0 if predictor is None else 4 * predictor.numel()
            result.append(choice.Option(price * min(rms, 1e30), choice.cost(candidate, *self.sizes, self.unit), size))
        return result


@dataclasses.dataclass
class _Variant:
    """One way to quantize the model: units, with or without profiles, and what calibration learns for them."""

    units: list[Unit]
    settings: dict[str, Any]
    profiles: dict[fx.Node, torch.Tensor]
    plans: list[_Plan]

    @staticmethod
    def of(units: list[Unit], settings: dict[str, Any], profiles: dict[fx.Node, torch.Tensor] | None = None) -> _Variant:
        return _Variant(units, settings, profiles or {}, [_Plan(unit, settings) for unit in units if unit.int8])

    def write(self, graph_module: fx.GraphModule) -> QuantizedModel:
        return _Writer(graph_module, self.units, self.plans, self.settings, self.profiles).write()

    def values(self, raw: dict[fx.Node, torch.Tensor]) -> _Values:
        anchors = {plan.unit.anchor: self.profiles[plan.unit.output] for plan in self.plans if plan.unit.is_layer and plan.unit.output in self.profiles}
        return _Values(raw, self.profiles | anchors)


class _Values(dict):
    """Of the float graph's values what the codes stand for, once it is asked for: tensors over their profiles, and so what a layer computes
    before a residual and the activation."""

    def __init__(self, raw: dict[fx.Node, torch.Tensor], over: dict[fx.Node, torch.Tensor]):
        self.raw, self.over = raw, over

    def __missing__(self, node: fx.Node) -> torch.Tensor:
        value = self.raw[node]
        self[node] = value / self.over[node] if node in self.over else value
        return self[node]


class _Observer(fx.Interpreter):
    """Runs the float graph and keeps the values of some nodes."""

    def __init__(self, graph_module: fx.GraphModule, needed: set[fx.Node]):
        super().__init__(graph_module)
        self.needed, self.values = needed, {}

    def observe(self, inputs: tuple) -> dict[fx.Node, torch.Tensor]:
        self.run(*inputs)
        return self.values

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if node in self.needed:
            self.values[node] = result
        return result


def _choose_ranges(graph_module, variant: _Variant, dynamic: _Variant, plain: list[Unit], seen: Look, judges: choice.Judges, progress: bool) -> QuantizedModel:
    """The model of `variant` with the ranges that auto takes. `dynamic` has exact ranges, and no profiles (where nothing has: `variant` itself);
    `plain`: the units of `variant` before they had profiles."""
    plans = [plan for plan in variant.plans if len(plan.candidates) > 1]
    if not plans:
        return variant.write(graph_module)
    options = [plan.options(price) for plan, price in zip(plans, _prices(variant, plans, plain, seen), strict=True)]
    exact = [len(plan.candidates) - 1 for plan in plans]
    budget = choice.PREDICTOR_SHARE * sum(plan.unit.weight.numel() for plan in variant.plans if plan.unit.is_layer)
    cheapest, steps = choice.ladder(options, exact, budget)
    for plan, number in zip(plans, exact, strict=True):
        plan.take(number)
    trial = choice.Trial(variant.write(graph_module), {plan.unit.name for plan in plans if any(c.strategy is Strategy.CHANNEL for c in plan.candidates)})

    def decibels(chosen: list[int]) -> torch.Tensor:
        bar.update()
        ranges = [{plan.unit.name: plan.trial(i, half) for plan, i in zip(plans, chosen, strict=True)} for half in (0, 1)]
        return judges.decibels(lambda half: trial.with_ranges(ranges[half]))

    with tqdm(desc="choosing", unit=" networks", disable=not progress) as bar:
        profiled = without = decibels(exact)
        if dynamic is not variant:
            rival = dynamic.write(graph_module)
            without = judges.decibels(lambda half: rival)
        target = choice.Target.of(profiled, without)
        found = {len(steps): profiled}

        def good(count: int) -> bool:
            found[count] = decibels(choice.climb(cheapest, steps, count))
            return target.reached(found[count])

        count = choice.fewest(good, len(steps))
    for plan, i, option in zip(plans, choice.climb(cheapest, steps, count), options, strict=True):
        plan.take(i)
        plan.cost = option[i].cost
        plan.saved = 10 * math.log10(1 + max(option[0].noise - option[i].noise, 0.0))
    qmodel = variant.write(graph_module)
    qmodel.meta["choice"] = choice.told(without, profiled, found[count], count, len(steps), sum(plan.cost for plan in plans))
    return qmodel


def _prices(variant: _Variant, plans: list[_Plan], plain: list[Unit], seen: Look) -> list[float]:
    """For each plan: what noise over signal of its codes makes of noise at the network's output, as a share of what exact ranges leave there
    (mean of the samples). plain: the units with weights that hold no profile yet."""

    def profile(node: fx.Node) -> torch.Tensor | float:
        return variant.profiles[node].reshape(-1).double() if node in variant.profiles else 1.0

    def usual(unit: Unit) -> torch.Tensor:
        noise = torch.zeros(len(seen.weighed), dtype=torch.float64)
        if unit.quantized_output and unit.kind not in PASSES_THROUGH:
            noise = noise + seen.seen[unit.output].rounding(profile(unit.output))
        if unit.is_layer:
            source = unit.inputs[0]
            noise = noise + seen.weight_noise(unit, input_factors(unit, profile(source)) if source in variant.profiles else 1.0, slice(None))
        return noise

    total = sum(usual(unit) for unit in plain if unit.int8)[seen.weighed].clamp(min=1e-30)
    return [float((seen.seen[plan.unit.output].price(profile(plan.unit.output))[seen.weighed] / total).mean()) for plan in plans]


def _calibrate(
    graph_module: fx.GraphModule, variants: list[_Variant], chunks: Iterable[tuple], progress: bool, shifted: Callable[[tuple, int], list[tuple]]
) -> None:
    """Shows every chunk and shifted copies of it to the plans of all variants, of the same layers; then finishes them."""
    plans = [plan for variant in variants for plan in variant.plans]
    needed = {node for plan in plans for node in (*plan.unit.inputs, plan.unit.anchor, plan.unit.output, plan.unit.residual) if node is not None}
    for variant in variants[1:]:
        for plan, first in zip(variant.plans, variants[0].plans, strict=True):
            plan.rounding_fit, plan.bias_fit = first.rounding_fit, first.bias_fit  # which learn of the float graph, before its profiles: once
    number = 0
    learns = any(plan.learns for plan in plans)
    with torch.no_grad(), tqdm(desc="calibrating", unit=" images", disable=not progress) as bar:
        for chunk in chunks if learns else ():
            versions = [chunk, *shifted(chunk, number)]
            for inputs in versions if number == 0 else ():
                raw = values = None  # the last run's, which else would live beside the next one's
                raw = _Observer(graph_module, needed).observe(inputs)
                for variant in variants:
                    values = variant.values(raw)
                    for plan in variant.plans:
                        plan.prepare(values, chunk[0].shape[0])
            for inputs in versions:
                raw = values = None
                raw = _Observer(graph_module, needed).observe(inputs)
                for plan in variants[0].plans:
                    plan.observe_layer(raw)
                for variant in variants:
                    values = variant.values(raw)
                    for plan in variant.plans:
                        if inputs is chunk:
                            plan.observe(values)
                        plan.try_ranges(values, number)
            number += chunk[0].shape[0]
            bar.update(chunk[0].shape[0])
    for variant in variants:
        for plan in variant.plans:
            profile = variant.profiles.get(plan.unit.inputs[0])
            plan.finish(None if profile is None else profile.reshape(-1))


class _Shifter:
    """Shifted copies of a chunk: [] where the model has no floating-point input."""

    def __init__(self, chunk: tuple):
        self.shifts = {i: shifts.Shifts(x) for i, x in enumerate(chunk) if _is_batched(x, chunk) and x.is_floating_point()}

    def __call__(self, chunk: tuple, number: int) -> list[tuple]:
        return [tuple(self.shifts[i](x, number) if i in self.shifts else x for i, x in enumerate(chunk))] if self.shifts else []


def _record_clipping(qmodel: QuantizedModel, chunks: list[tuple]) -> None:
    """Notes in every layer what share of its values the calibration images saturate, for telemetry to compare with."""
    telemetry = qmodel.telemetry()
    for chunk in chunks:
        telemetry(*chunk)
    shares = {row["layer"]: row["clipped"] for row in telemetry.rows()}
    for layer in qmodel.layers:
        layer.clipped = shares.get(layer.name)


# ----------------------------------------------------------------------------------------------------------------------
# Writing the int8 graph


class _Writer:
    """Writes the int8 graph: units become probquant ops, everything else is copied; dequantize and quantize where they meet."""

    def __init__(self, source: fx.GraphModule, units: list[Unit], plans: list[_Plan], settings: dict, profiles: dict[fx.Node, torch.Tensor]):
        self.source, self.units, self.settings, self.profiles = source, units, settings, profiles
        self.plans = {id(plan.unit): plan for plan in plans}
        self.graph = fx.Graph()
        self.graph._codegen = source.graph._codegen
        self.float_nodes: dict[fx.Node, fx.Node] = {}
        self.given: dict[fx.Node, fx.Node] = {}  # float values of int8 units in another dtype, which the float model computes in
        self.codes: dict[fx.Node, tuple[fx.Node, ...]] = {}  # what int8 units write
        self.requantized: dict[tuple[fx.Node, int], tuple[fx.Node, ...]] = {}  # float values by sample dimensions
        self.sources = {unit.output: unit for unit in units if unit.int8}
        self.rows: set[fx.Node] = set()  # whose float values are rows, contiguous
        self.written = {node for unit in units if unit.int8 for node in (unit.output, unit.total)}
        self.starts = {unit.first: unit for unit in units if unit.int8}
        self.modules = nn.Module()
        self.names = {id(plan.unit): f"{i:03d}_{plan.unit.name}".replace(".", "_").replace("#", "_") for i, plan in enumerate(plans)}

    def write(self) -> QuantizedModel:
        inside = {node for unit in self.units if unit.int8 for node in unit.nodes}
        for node in self.source.graph.nodes:
            if node in self.starts:
                self.write_unit(self.plans[id(self.starts[node])])
            elif node not in inside:
                self.copy(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        root = nn.Module()
        root.add_module("int8_layers", self.modules)
        for node in self.graph.nodes:  # copies, under a name of their own: a float module may be called "layers", too
            if node.op == "get_attr" and node.target.startswith(_FLOAT):
                value = operator.attrgetter(node.target[len(_FLOAT) :])(self.source)
                set_tensor(root, node.target, value.detach().clone())
        layers = [self.layer_info(unit) for unit in self.units if self.is_told(unit)]
        return QuantizedModel(root, self.graph, self.modules, layers, self.settings, self.source.meta["sizes"])

    @staticmethod
    def is_told(unit: Unit) -> bool:
        """Whether summaries and reports know it: what runs in int8, and what takes time in float."""
        return unit.is_layer or unit.kind in ("attention", "layer_norm") or (unit.int8 and unit.kind != "flatten")

    def copy(self, node: fx.Node) -> None:
        if node.target is aten.sym_size.int and node.args[0] in self.codes:  # a size is a size, of codes too
            self.float_nodes[node] = self.graph.call_function(node.target, (self.codes[node.args[0]][0], *node.args[1:]))
        else:
            copied = self.float_nodes[node] = self.graph.node_copy(node, self.as_given)
            if node.op == "get_attr":
                copied.target = _FLOAT + node.target

    def as_float(self, node: fx.Node) -> fx.Node:
        if node not in self.float_nodes:
            self.float_nodes[node] = self.call(ops.dequantize.default, *self.codes[node][:3])
        return self.float_nodes[node]

    def as_given(self, node: fx.Node) -> fx.Node:
        """A node's value in the dtype that the float model has there: what int8 units give is float32."""
        dtype = getattr(node.meta.get("val"), "dtype", torch.float32)
        if node not in self.written or dtype is torch.float32:
            return self.as_float(node)
        if node not in self.given:
            self.given[node] = self.call(aten._to_copy.default, self.as_float(node), dtype=dtype)
        return self.given[node]

    def as_codes(self, node: fx.Node, plan: _Plan) -> tuple[fx.Node, ...]:
        """(q, scale, zero_point, stats) of a float node's value; quantized here if nobody has it in 8 bits."""
        if node in self.codes and reads_codes(plan.unit, self.sources[node]):
            return self.codes[node]
        dims = plan.unit.sample_dims
        if (node, dims) in self.requantized:
            return self.requantized[node, dims]
        x = self.as_float(node) if dims == 1 and len(shape_of(node)) == 4 else self.as_rows(node)
        given = ()
        if self.settings["strategy"] == "static" and node.op != "placeholder":
            fixed = plan.leaves["fixed_input"]
            given = (self.tensor(plan, "input_scale", fixed[:1].clone()), self.tensor(plan, "input_zero_point", fixed[1:].to(torch.int32)))
        self.requantized[node, dims] = self.unpack(self.call(ops.quantize.default, x, dims, *given))
        return self.requantized[node, dims]

    def as_rows(self, node: fx.Node) -> fx.Node:
        """A float node's value, contiguous and float32: as ops on rows want it, and as they give it themselves."""
        x = self.as_float(node)
        if node not in self.written and node.meta["val"].dtype is not torch.float32:
            x = self.call(aten._to_copy.default, x, dtype=torch.float32)
        return x if node in self.rows else self.call(aten.contiguous.default, x)

    def call(self, target, *args, **kwargs) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def unpack(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(self.part(node, i) for i in range(4))

    def part(self, node: fx.Node, i: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, i))

    def tensor(self, plan: _Plan, leaf: str, value: torch.Tensor | None) -> fx.Node | None:
        """A get_attr node for a tensor of the unit."""
        if value is None:
            return None
        name = self.names[id(plan.unit)]
        if not hasattr(self.modules, name):
            weights = {k: v for k, v in plan.leaves.items() if k in ("weight", "weight_scale", "bias", "profile")}
            self.modules.add_module(name, make_unit(weights, plan.unit.options["groups"] if plan.unit.is_layer else None))
        module = getattr(self.modules, name)
        if not hasattr(module, leaf):
            module.register_buffer(leaf, value)
        return self.graph.get_attr(f"int8_layers.{name}.{leaf}")

    def write_unit(self, plan: _Plan) -> None:
        unit = plan.unit
        if unit.is_layer:
            node = self.layer_node(plan)
        else:
            node = self.weightless_node(plan)
        if node is None:  # flatten: the codes only change shape
            return
        node.meta["layer"] = unit.name
        if unit.output in self.profiles:
            self.tensor(plan, "profile", self.profiles[unit.output].reshape(-1))  # for capture(), where the op has no weight to hold it
            node.meta["profile"] = f"int8_layers.{self.names[id(unit)]}.profile"
        parts = self.unpack(node)
        if unit.quantized_output:
            if unit.options.get("flatten"):
                parts = (self.call(aten.flatten.using_ints, parts[0], 1), *parts[1:])
            self.codes[unit.output] = parts
        else:
            self.float_nodes[unit.output] = parts[0]
            if unit.kind in ("linear", "layer_norm"):
                self.rows.add(unit.output)
        if unit.total is not None:
            self.float_nodes[unit.total] = self.part(node, 4)
            self.rows.add(unit.total)

    def activation(self, unit: Unit) -> dict:
        result = {}
        if unit.activation is not Activation.CLAMP:
            result["activation"] = int(unit.activation)
        if unit.activation_min is not None:
            result["activation_min"] = unit.activation_min
        if unit.activation_max is not None:
            result["activation_max"] = unit.activation_max
        return result

    def range(self, plan: _Plan) -> dict:
        leaf = "fixed" if plan.strategy is Strategy.FIXED else "predictor"
        result = {"strategy": int(plan.strategy)}
        predictor = self.tensor(plan, leaf, plan.leaves.get(leaf))
        return result if predictor is None else {**result, "predictor": predictor}

    def layer_node(self, plan: _Plan) -> fx.Node:
        unit = plan.unit
        x = self.as_codes(unit.inputs[0], plan)
        residual = self.codes[unit.residual] if unit.residual is not None else ()
        weight = self.tensor(plan, "packed_weight", plan.leaves["weight"])
        channels = unit.weight.shape[0]
        options = {**self.activation(unit), **self.range(plan)}
        if plan.gamma:
            options["gamma"] = plan.gamma
        if plan.strategy is Strategy.CHANNEL:  # whoever writes its input sums every channel
            producer = x[3].args[0]
            producer.kwargs = {**producer.kwargs, "channel_stats": True}
        if unit.kind == "linear":
            return self.call(ops.linear.default, *x, weight, channels, *residual, **options)
        geometry = [unit.options[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups")]
        return self.call(ops.conv2d.default, *x, weight, channels, *geometry, *residual, **options)

    def weightless_node(self, plan: _Plan) -> fx.Node | None:
        unit, options = plan.unit, plan.unit.options
        if unit.kind == "layer_norm":
            return self.layer_norm_node(plan)
        inputs = [self.codes[i] if i in self.codes else self.as_codes(i, plan) for i in unit.inputs]
        x = inputs[0][:3]
        if unit.kind == "attention":
            return self.call(ops.attention.default, *(part for i in inputs for part in i[:3]), options["heads"], options["scale"], **self.range(plan))
        if unit.kind == "flatten":
            self.codes[unit.output] = (self.call(aten.flatten.using_ints, inputs[0][0], 1), *inputs[0][1:])
            return None
        if unit.kind == "add":
            return self.call(ops.add.default, *inputs[0], *inputs[1], **self.activation(unit), **self.range(plan))
        if unit.kind == "mul":
            return self.call(ops.mul.default, *inputs[0], *inputs[1], **self.range(plan))
        if unit.kind == "activation":
            activation = self.activation(unit)
            return self.call(ops.activation.default, *x, activation.pop("activation", 0), **activation, **self.range(plan))
        if unit.kind == "concat":
            return self.call(ops.concat.default, *([i[part] for i in inputs] for part in range(3)), **self.range(plan))
        if unit.kind == "max_pool2d":
            return self.call(ops.max_pool2d.default, *x, *(options[k] for k in ("kernel_size", "stride", "padding", "dilation")))
        if unit.kind == "upsample_nearest2d":
            return self.call(ops.upsample_nearest2d.default, *x, options["scale_factor"])
        if unit.kind == "avg_pool2d":
            geometry = (options[k] for k in ("kernel_size", "stride", "padding", "count_include_pad"))
            return self.call(ops.avg_pool2d.default, *x, *geometry, **self.range(plan))
        return self.call(ops.adaptive_avg_pool2d.default, *x, options["output_size"], **self.range(plan))

    def layer_norm_node(self, plan: _Plan) -> fx.Node:
        unit = plan.unit
        x, residual = (*map(self.as_rows, unit.inputs), None)[:2]
        scale, shift = (None if values is None else values.float().clone() for values in (unit.options["scale"], unit.options["shift"]))
        if unit.output_profile is not None:
            shift = None if shift is None else shift / unit.output_profile
            scale = (1.0 if scale is None else scale) / unit.output_profile
        parameters = self.tensor(plan, "norm_scale", scale), self.tensor(plan, "norm_shift", shift)
        return self.call(ops.layer_norm.default, x, None, None, residual, *parameters, unit.options["eps"], unit.total is not None, **self.range(plan))

    def layer_info(self, unit: Unit) -> LayerInfo:
        plan = self.plans.get(id(unit))
        if plan is None:
            return LayerInfo(unit.name, unit.kind, False, unit.reason)
        fused = []
        if unit.residual is not None or (unit.kind == "layer_norm" and len(unit.inputs) > 1):
            fused.append("add")
        if unit.activation is not Activation.CLAMP:
            fused.append(unit.activation.name.lower())
        elif unit.activation_min is not None or unit.activation_max is not None:
            bounds = (unit.activation_min, unit.activation_max)
            fused.append({(0.0, None): "relu", (0.0, 6.0): "relu6"}.get(bounds, f"clamp{bounds}"))
        strategy = "passes through" if unit.kind in PASSES_THROUGH else "float32 output" if plan.strategy is Strategy.NONE else plan.strategy.name.lower()
        return LayerInfo(
            unit.name, unit.kind, True, "", strategy, "image" if self.per_image(unit) else "token", " + ".join(fused), unit.output.name, plan.predictor,
            gamma=plan.gamma, judged=plan.judged, rounding=plan.rounding, cost=plan.cost, saved=plan.saved,
        )

    def per_image(self, unit: Unit) -> bool:
        """Whether the samples of its output are the model's own, rather than tokens, windows or whatever it made of them."""
        given = next(node for node in self.source.graph.nodes if node.op == "placeholder")
        return unit.sample_dims == 1 and str(shape_of(unit.output)[0]) == str(shape_of(given)[0])
