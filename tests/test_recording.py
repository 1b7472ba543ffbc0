"""A model that is called plainly runs as recorded: the same bytes as its graph, in a few calls; a damaged recording does no harm."""

import copy
import functools
import gc
import random
import threading

import models
import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import probquant as pq
from probquant import ops
from probquant._native import are_held
from probquant.compare import peak_activation_bytes
from probquant.recording import _arguments, _by_image, _Held, _place, _read, _upcoming, _write, record


@functools.cache
def quantized(name, **options):
    return pq.quantize(models.build(name), [models.images(name, 8)], progress=False, **options)


def runs_of(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is ops.run.default]


def held_runs_of(qmodel):
    return [node for node in qmodel._recorded[0].__self__.graph.nodes if isinstance(getattr(node.target, "__self__", None), _Held)]


def int8_ops_of(graph_module):
    return [node for node in graph_module.graph.nodes if str(node.target).startswith("probquant.") and node.target is not ops.run.default]


def of_larger_images(recording):
    """The recording, as if the images that it was made from were tiny: it takes those of a call for too large to go through together."""
    numbers, at = _read(recording), 1
    for _ in range(numbers[0]):
        at += 1 + numbers[at]
    at += 1 + numbers[at]
    assert numbers[at] > 1
    numbers[at] = 1
    return _write(numbers)


def split(recorded):
    """The recorded graph, of larger images."""
    for run in runs_of(recorded):
        run.update_arg(2, of_larger_images(run.args[2]))
    recorded.recompile()
    return recorded


def equal(a, b):
    (left, spec), (right, other) = (torch.utils._pytree.tree_flatten(x) for x in (a, b))
    return spec == other and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize(("name", "options"), [*((name, {"surrogate": "gaussian"}) for name in models.MODELS), ("mobilenet", {"surrogate": "probe"}), ("yolo", {"strategy": "dynamic"})], ids=str)
def test_recorded_and_graph_give_the_same_bytes(name, options):
    qmodel = quantized(name, **options)
    recorded = record(qmodel)
    for count in (5, 1, 0):
        inputs = models.images(name, count, seed=1) if count else tuple(x[:0] for x in models.images(name, 1))
        assert equal(recorded(*inputs), fx.Interpreter(qmodel).run(*inputs))
        assert equal(qmodel(*inputs), recorded(*inputs))


@pytest.mark.parametrize(
    ("name", "options", "threads"),
    [*((name, {"surrogate": "gaussian"}, 1) for name in models.MODELS), ("mobilenet", {"surrogate": "probe"}, 2), ("yolo", {"strategy": "dynamic"}, 2)],
    ids=str,
)
def test_batches_in_groups_give_the_same_bytes(name, options, threads):
    qmodel = quantized(name, **options)
    recorded = split(record(qmodel, models.images(name, 3)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (5, 2, 1, 0):
            inputs = models.images(name, count, seed=1) if count else tuple(x[:0] for x in models.images(name, 1))
            assert equal(recorded(*inputs), fx.Interpreter(qmodel).run(*inputs))
    finally:
        torch.set_num_threads(before)


def test_groups_need_less_memory():
    qmodel, x = quantized("resnet", surrogate="gaussian"), models.images("resnet", 8)
    whole, groups = (peak_activation_bytes(recorded, *x) for recorded in (record(qmodel), split(record(qmodel, x))))
    assert groups < whole / 2


def test_constants_are_no_images():
    """An op that reads a constant as an activation, or what was made of one, takes the whole batch, though the constant is as long as that."""

    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(4, 4, 3, padding=1), nn.Buffer(torch.randn(4, 4, 8, 8))

        def forward(self, x):
            return self.conv(self.conv(x).relu() + self.conv(self.table)).relu()

    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    with pytest.warns(UserWarning, match="fixes its batch size at 4"):
        qmodel = pq.quantize(Constants().eval(), [x], progress=False)
    operations = int8_ops_of(qmodel)
    inputs = [node for node in qmodel.graph.nodes if node.op == "placeholder"]
    assert 0 < len(_by_image(operations, inputs) & {*operations}) < len(operations)
    assert equal(split(record(qmodel, (x,)))(x), fx.Interpreter(qmodel).run(x))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "yolo"])
def test_every_op_is_recorded(name):
    qmodel = quantized(name, surrogate="gaussian")
    recorded = record(qmodel)
    assert len(runs_of(recorded)) == 1 and not int8_ops_of(recorded) and len(int8_ops_of(qmodel)) > 3


def test_a_head_behind_maps_is_recorded():
    """Flattened maps, whose channels lie last."""
    x = torch.randn(4, 3, 9, 9)
    qmodel = pq.quantize(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 7)).eval(), [x], progress=False)
    recorded = record(qmodel, (x,))
    assert len(runs_of(recorded)) == 1 and not int8_ops_of(recorded)
    for count in (4, 1, 0):
        assert equal(recorded(x[:count]), fx.Interpreter(qmodel).run(x[:count]))
    assert equal(split(recorded)(x), fx.Interpreter(qmodel).run(x))


def test_float_layers_between_int8_ones():
    """Two recordings with a float layer between, a value that leaves the first and is read in it, too, and constants of both kinds."""

    class Islands(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
            self.offset = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            z = torch.sin(y) + self.offset
            return self.c(torch.relu(self.a(z))), y, self.c(torch.relu(y)), {"offset": self.offset}

    torch.manual_seed(0)
    x = torch.randn(4, 8, 12, 12)
    qmodel = pq.quantize(Islands().eval(), [x], progress=False)
    assert len(runs_of(record(qmodel))) == 2
    assert equal(qmodel(x), fx.Interpreter(qmodel).run(x))


def test_an_output_takes_the_place_of_a_residual_that_no_one_reads_any_more():
    """Shortcuts that end there, one that is the layer's own input, and one that leaves."""

    class Shortcuts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))

        def forward(self, x):
            a, b, c, d, e, f = self.layers
            x = a(x).relu()
            x = c(b(x).relu()) + x
            x = d(x) + x
            y = f(e(x).relu()) + x
            return y, x

    torch.manual_seed(0)
    x = torch.randn(4, 8, 12, 12)
    qmodel = pq.quantize(Shortcuts().eval(), [x], progress=False)
    nodes = {node: i for i, node in enumerate(qmodel.graph.nodes)}
    layers = [node for node in int8_ops_of(qmodel) if "residual" in _arguments(node)]
    places = [_place(node, nodes, [nodes[_arguments(node)["residual"]]]) for node in layers if _arguments(node)["residual"]]
    assert [place >= 0 for place in places] == [True, False, True]
    recorded = record(qmodel, (x,))
    assert len(runs_of(recorded)) == 1 and equal(recorded(x), fx.Interpreter(qmodel).run(x)) and equal(split(recorded)(x), fx.Interpreter(qmodel).run(x))


def test_layers_are_told_of_the_weights_behind_them():
    """Those that are worth fetching; the op's three first numbers are its name's, whether its results leave, and the weight's."""
    qmodel = pq.quantize(nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 5), nn.Linear(5, 3000), nn.Linear(3000, 64)).eval(), [torch.randn(4, 64)], progress=False)
    operations = [node for node in qmodel.graph.nodes if node in int8_ops_of(qmodel)]
    weights = [node for node in qmodel.graph.nodes if node.op == "get_attr" and "packed_weight" in node.target]
    told = _upcoming(operations, qmodel, {node: i for i, node in enumerate(weights)})
    behind = [told[operation] for operation in operations]
    layers = [i for i, operation in enumerate(operations) if operation.target is ops.linear.default]
    assert [behind[i] for i in layers] == [2, 2, 3, -1] and set(behind[: layers[0]]) == {0}


def test_nothing_to_record():
    qmodel = pq.quantize(nn.Sequential(nn.Linear(6, 5)).eval(), [torch.randn(4, 6)], progress=False)
    recorded = record(qmodel)
    assert recorded is None or runs_of(recorded)
    assert qmodel(torch.randn(2, 6)).shape == (2, 5)


def test_the_recording_follows_the_model():
    first, x = copy.deepcopy(quantized("resnet", surrogate="gaussian")), models.images("resnet", 2)
    state = first.state_dict()
    second = copy.deepcopy(first)
    second.load_state_dict({name: 1.5 * tensor if name.endswith("weight_scale") else tensor for name, tensor in state.items()})
    before, wanted = first(*x), second(*x)
    assert not equal(before, wanted)
    assert equal(torch.func.functional_call(first, {**dict(second.named_buffers()), **dict(second.named_parameters())}, x), wanted)
    assert equal(first(*x), before)
    first.load_state_dict(second.state_dict())
    assert equal(first(*x), wanted)
    unit = next(unit for unit in first.int8_layers.children() if hasattr(unit, "predictor"))
    unit.predictor = 2 * unit.predictor
    assert equal(first(*x), fx.Interpreter(first).run(*x)) and not equal(first(*x), wanted)
    output = next(node for node in first.graph.nodes if node.op == "output")
    before = first(*x)
    with first.graph.inserting_before(output):
        output.args = torch.fx.node.map_arg(output.args, lambda node: first.graph.call_function(torch.neg, (node,)))
    first.recompile()
    assert equal(first(*x), -before)


def test_memory_may_move_under_the_tensors():
    """As share_memory() does it, before a model goes to other processes: the tensors stay, what they point to does not."""
    qmodel, x = copy.deepcopy(quantized("resnet", surrogate="gaussian")), models.images("resnet", 2)
    before = qmodel(*x)
    qmodel.share_memory()
    assert all(tensor.is_shared() for tensor in qmodel.buffers())
    junk = [torch.full((1 << 16,), 77, dtype=torch.uint8) for _ in range(64)]  # where the old memory was
    assert len(junk) == 64 and all(equal(qmodel(*x), before) for _ in range(3))


def test_a_held_recording_goes_with_its_model():
    def held():
        gc.collect()
        return ops.release(ops.hold([], ""))

    x, source = models.images("resnet", 2)[0], quantized("resnet", surrogate="gaussian")
    before, qmodel = held(), copy.deepcopy(source)
    wanted = qmodel(x)
    assert held() == before + 1
    for _ in range(2):  # another predictor, and the call after
        unit = next(unit for unit in qmodel.int8_layers.children() if hasattr(unit, "predictor"))
        unit.predictor = unit.predictor.clone()
        assert torch.equal(qmodel(x), wanted) and held() == before + 1
    kept = qmodel._recorded[0]
    del qmodel, unit
    assert held() == before + 1 and torch.equal(kept(x), wanted)  # with the constants of a model that is gone
    del kept
    assert held() == before
    for call in (lambda: ops.run_held([x], 0), lambda: ops.release(-1)):
        with pytest.raises(RuntimeError, match="is no recording that is held"):
            call()


def test_tracers_see_the_ops():
    qmodel, x = quantized("mobilenet", surrogate="gaussian"), models.images("mobilenet", 2)
    qmodel(*x)
    traced = torch.fx.experimental.proxy_tensor.make_fx(qmodel)(*x)
    assert int8_ops_of(traced) and not runs_of(traced)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert qmodel(*(mode.from_tensor(part) for part in x)).shape == qmodel(*x).shape


@pytest.mark.parametrize("name", ["resnet", "yolo", "vit"])
def test_recordings_are_traced(name):
    """By fakes of the same shapes, dtypes and strides, for any batch size; what was compiled gives the same bytes."""
    qmodel, x = quantized(name, surrogate="gaussian"), models.images(name, 3)
    recorded = qmodel.recorded(*x)
    assert runs_of(recorded)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = recorded(*(mode.from_tensor(part) for part in x))
    wanted = qmodel(*x)
    for left, right in zip(*(torch.utils._pytree.tree_leaves(y) for y in (fake, wanted)), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
    compiled = torch.compile(recorded, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (3, 2):
            inputs = models.images(name, count, seed=1)
            assert equal(compiled(*inputs), qmodel(*inputs))


def test_recorded_on_the_cpu_whatever_the_default_device():
    qmodel, x = pq.quantize(models.build("resnet"), [models.images("resnet", 8)], surrogate="gaussian", progress=False), models.images("resnet", 2)
    wanted = fx.Interpreter(qmodel).run(*x)
    with torch.device("meta"):
        assert equal(qmodel(*x), wanted)


def test_a_first_call_is_like_all_others():
    """Though it looks through the graph for sizes; and a model that writes into its input becomes one that does not."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x.mul_(0.5)
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    x = torch.randn(4, 3, 10, 10)
    qmodel = pq.quantize(InPlace().eval(), [x.clone()], strategy="dynamic", channel_profile=False, progress=False)
    first, second = x.clone(), x.clone()
    results = qmodel(first), qmodel(second)
    assert equal(*results) and equal(results[0], fx.Interpreter(qmodel).run(x.clone()))
    assert torch.equal(first, x) and torch.equal(second, x)


def test_an_empty_batch_records_nothing():
    """Its sizes would say that no batch is worth splitting."""
    qmodel, x = copy.deepcopy(quantized("resnet", surrogate="gaussian")), models.images("resnet", 1)
    assert qmodel(*(part[:0] for part in x)).shape[0] == 0
    assert qmodel._recorded[0] is None
    qmodel(*x)
    assert held_runs_of(qmodel)


def test_results_in_structures():
    class Structured(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x, other):
            y = self.a(x + other).relu()
            z = self.b(y).relu()
            return {"last": self.c(z), "both": (z, [y])}

    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 3, 12, 12)
    qmodel = pq.quantize(Structured().eval(), [(x, other)], surrogate="gaussian", progress=False)
    wanted = fx.Interpreter(qmodel).run(x, other)
    for found in (qmodel(x, other), qmodel(x, other=other), qmodel(other=other, x=x)):
        assert equal(found, wanted)
    assert held_runs_of(qmodel) and "pytree" not in qmodel._recorded[0].__self__.code


def test_what_dictionaries_hold():
    value, same = [1], [1]
    held = {"a": value, "b": None}
    assert are_held((held,) * 40, ("a", "b") * 20, (value, None) * 20) and are_held((), (), ())
    assert not are_held((held,) * 2, ("a", "a"), (value, same)) and not are_held((held,), ("c",), (None,))
    for wrong in (((held,), ("a",), ()), ((held,), (), (value,))):
        with pytest.raises(ValueError, match="want as many names and values as holders"):
            are_held(*wrong)


def test_threads_share_a_model():
    qmodel, x = quantized("mobilenet", surrogate="gaussian"), models.images("mobilenet", 3)
    wanted, wrong = qmodel(*x), []

    def work():
        for _ in range(20):
            if not equal(qmodel(*x), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_hooks_are_called():
    qmodel, x = quantized("resnet", surrogate="gaussian"), models.images("resnet", 1)
    seen = []
    with torch.no_grad():
        handle = qmodel.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            output = qmodel(*x)
            assert len(seen) == 1 and seen[0] is output
        finally:
            handle.remove()


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_a_recording_takes_no_more_memory(name):
    qmodel, x = quantized(name, surrogate="gaussian"), models.images(name, 4)
    chunk = 4096  # of small tensors, which a recording keeps to its end
    assert peak_activation_bytes(qmodel, *x) <= peak_activation_bytes(fx.Interpreter(qmodel).run, *x) + len(int8_ops_of(qmodel)) * chunk // 4


def small():
    """(inputs, constants, recording) of a quantize, two convolutions and a dequantize, which go image by image."""
    torch.manual_seed(0)
    qmodel = pq.quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval(), [torch.randn(4, 3, 6, 6)], surrogate="gaussian", progress=False)
    recorded = split(record(qmodel, (torch.randn(4, 3, 6, 6),)))
    (run,) = runs_of(recorded)
    _, constants, recording = run.args
    return [torch.randn(2, 3, 6, 6)], getattr(recorded, constants.target), recording


def test_damaged_recordings_do_no_harm():
    inputs, constants, recording = small()
    wanted, numbers = ops.run(inputs, constants, recording)[0], _read(recording)
    rng, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(3000):
        damaged = numbers.copy()
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(len(numbers))] = rng.choice((-(2**63), -2, -1, 0, 1, 2, 3, rng.randrange(60), 300, 2**31, 2**40, 2**62))
        if rng.random() < 0.2:
            damaged = damaged[: rng.randrange(len(numbers))]
        try:
            ops.run(inputs, constants, _write(damaged))
            outcomes[True] += 1
        except RuntimeError:
            outcomes[False] += 1
    assert outcomes[False] > 1000 and outcomes[True] > 10, outcomes
    assert torch.equal(ops.run(inputs, constants, recording)[0], wanted)


def test_numbers_and_their_text():
    numbers = [0, 1, -1, 15, 16, -16, -17, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)]
    assert _read(_write(numbers)) == numbers and _write([0, 1, -1, 16]) == "ACBgB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, c, r: (i, c, r[:9] + "-" + r[9:]), "the recording has what is none"),
        (lambda i, c, r: (i, c, 14 * "g" + r), "behind 0 numbers the recording has what is none"),
        (lambda i, c, r: (i, c, 12 * "g" + "Q" + r), "behind 0 numbers the recording has what is none"),
        (lambda i, c, r: (i, c, r + "g"), "the recording ends within a number"),
        (lambda i, c, r: (i, c, _write(_read(r)[:-1])), "the recording ends within an op|of a length"),
        (lambda i, c, r: (i, c[:-1], r), "the recording names value [0-9]+ of [0-9]+"),
        (lambda i, c, r: ([i[0].double()], c, r), "quantize: x has dtype float64"),
        (lambda i, c, r: ([i[0][:, :2]], c, r), "packed_weight has shape"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.run(*change(*small()))
