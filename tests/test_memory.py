"""On the probabilistic path no activation wider than 8 bits is allocated, the model's inputs and outputs apart."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import probquant as pq
from probquant import ops

SMALL = 4096  # scales, zero points, stats, predictors: a few bytes per image or channel


def allocations(function, *arguments) -> list[tuple[str, int]]:
    """(innermost op, bytes) of everything that torch's CPU allocator handed out during the call."""
    with torch.no_grad():
        function(*arguments)  # what is prepared on a first call does not count
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
            function(*arguments)
    found = []

    def visit(event, op):
        name = event.name
        if name == "[memory]" and event.typed[1].alloc_size > 0:
            found.append((op, event.typed[1].alloc_size))
        for child in event.children:
            visit(child, name if "::" in name else op)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        visit(root, "")
    return found


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.SiLU(), nn.Conv2d(32, 64, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 64, 3, padding=1) for n in (64, 64, 128))

    def forward(self, x):
        y = torch.relu(x + self.b(torch.relu(self.a(x))))
        return torch.nn.functional.gelu(self.c(torch.cat([x, y], 1)) + y)


@pytest.fixture(scope="module")
def float_network():
    return network()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def wide_activations(model, x) -> list[str]:
    """Allocations beyond what 8-bit activations explain: (op, bytes, the most that it may allocate)."""
    widest = {name: captured.value.numel() for name, captured in model.capture(x)[1].items()} if isinstance(model, pq.QuantizedModel) else {}
    limit = max(widest.values(), default=0)
    allowed = {n + 64 for n in widest.values()} | {x.numel() + 64}  # one byte per value, the input's codes among them
    if isinstance(model, pq.QuantizedModel):  # with channel stats, two sums for every image and channel
        allowed |= {8 * len(x) * (3 + 2 * captured.value.shape[1]) + 64 for captured in model.capture(x)[1].values()}
    found = []
    for op, size in allocations(model, x):
        if size > SMALL and not any(n - 64 <= size <= n for n in allowed):
            found.append(f"{op} allocates {size} bytes; the largest activation has {limit} values")
    return found


@pytest.mark.parametrize("options", [{"surrogate": "gaussian"}, {"surrogate": "gaussian", "gamma": 1}, {"surrogate": "gaussian_channel"}, {"surrogate": "channel"}], ids=str)
def test_probabilistic_allocates_no_wide_activation(options, float_network, images):
    qmodel = pq.quantize(float_network, [images], strategy="probabilistic", progress=False, **options)
    assert wide_activations(qmodel, images) == []
    largest = max(size for _, size in allocations(qmodel, images))
    assert largest == 4 * 32 * 64 * 64  # the first convolution's output, one byte per value


def test_probe_allocates_no_wide_activation(float_network, images):
    """What it sees first is computed again; a layer of fewer than 64 positions, which it sees whole, fits beside the codes of others."""
    assert wide_activations(pq.quantize(float_network, [images], surrogate="probe", progress=False), images) == []


def test_static_allocates_no_wide_activation(float_network, images):
    assert wide_activations(pq.quantize(float_network, [images], strategy="static", progress=False), images) == []


def test_the_same_test_catches_the_dynamic_path(float_network, images):
    """It holds the output of layers with many weights (of an image or more) in 32 bits until the range is known."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 16, 16)
    found = wide_activations(pq.quantize(Residual().eval(), [x], strategy="dynamic", progress=False), x)
    assert any(line.startswith(("probquant::run", "probquant::conv2d")) for line in found), found
    assert wide_activations(float_network, images)


def layer_call(strategy, side, inputs, batch=3):
    x = ops.quantize(torch.randn(batch, inputs, side, side, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last))
    weight = ops.pack_weight(torch.ones(48, 3, 3, inputs, dtype=torch.int8), torch.full((48,), 0.01))
    predictor = {1: torch.tensor([0.1, 128.0]), 2: None, 3: torch.ones(7), 4: torch.ones(3 + 3 * 48), 5: torch.ones(2)}[strategy]
    return lambda: ops.conv2d(*x, weight, 48, [3], [1], [1], [1], 1, strategy=strategy, predictor=predictor, gamma=2)


@pytest.mark.parametrize("side, inputs", [(30, 16), (100, 1)])
@pytest.mark.parametrize("strategy", [1, 2, 3, 4, 5])
def test_what_one_layer_allocates(strategy, side, inputs):
    """Its codes, scales, zero points and stats; dynamic: 32-bit sums, too, of an image or more. A large output of few weights is computed twice
    instead."""
    codes = 3 * 48 * side * side
    sizes = sorted((size for op, size in allocations(layer_call(strategy, side, inputs)) if "probquant::conv2d" in op), reverse=True)
    if strategy == 2 and (inputs > 1 or pq.cpu_info()["isa_used"] == "reference"):
        sizes.remove(4 * codes)
    assert sizes == sorted([codes, 3 * 3 * 8, 3 * 4, 3 * 4], reverse=True)


RESIDENT = """
import torch
from probquant import ops
torch.set_num_threads(1)
side = 1000
q = torch.zeros(1, 8, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
x = (torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64))
weight = ops.pack_weight(torch.ones(16, 8, dtype=torch.int8), torch.ones(16))
predictor = {1: torch.ones(2), 2: None, 3: torch.ones(7), 4: torch.ones(51), 5: torch.ones(2)}[STRATEGY]
def run(q):
    return ops.conv2d(q, *x, weight, 16, [1], [1], [0], [1], 1, strategy=STRATEGY, predictor=predictor, gamma=4)
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
run(q[:, :, :2, :2].contiguous(memory_format=torch.channels_last))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = kib("VmRSS")
run(q)
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("strategy, least, most", [(1, 0.9, 1.3), (3, 0.9, 1.3), (4, 0.9, 1.3), (5, 0.9, 1.3), (2, 0.9, 1.3)])
def test_resident_memory_of_a_large_layer(strategy, least, most):
    """Whatever the allocator: the peak of the process grows by the codes, not by a 32-bit copy of them; with so few weights with exact ranges, too."""
    done = subprocess.run([sys.executable, "-c", RESIDENT.replace("STRATEGY", str(strategy))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) / (16 * 1000 * 1000)
    assert least < grown < most, f"{grown:.2f} bytes per output"
