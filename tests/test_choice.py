"""What auto decides with: what noise is worth at the output, the ladder, and where it may stop."""

import gc
import itertools
import math

import pytest
import torch
from torch import nn

import probquant as pq
from probquant import choice, influence
from probquant.choice import Option
from probquant.graph import choose_int8, find_units, trace
from probquant.metrics import joined_outputs, sqnr


def test_influence_is_that_of_the_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 500)).eval()
    graph_module = trace(model, (torch.randn(2, 2, 4, 4),))
    units = find_units(graph_module)
    choose_int8(units, lambda name: True)
    node = units[0].output  # behind the ReLU
    image, count = torch.randn(1, 2, 4, 4), 400  # each copy gets a random vector of its own: together they tell it
    found = influence.look(graph_module, {node: 1}, set(), [(image.expand(count, -1, -1, -1),)], lambda chunk, number: [(-chunk[0],)])
    assert found.source.tolist() == [*range(count)] * 2 and found.version.tolist() == [0] * count + [1, 2, 3, 4] * (count // 4) and bool(found.weighed.all())
    seen = found.seen[node]
    hidden = model[:2](image).detach()
    jacobian = torch.autograd.functional.jacobian(model[2:], hidden)[0, :, 0]  # [500, 3, 4, 4]
    power = (jacobian.square() * (hidden[0] > 0)).sum((0, 2, 3))
    assert seen.gain[:count].mean(0).tolist() == pytest.approx(power.tolist(), rel=0.15)
    assert seen.common_gain[:count].mean(0).tolist() == pytest.approx(jacobian.sum((2, 3)).square().sum(0).tolist(), rel=0.15)
    assert seen.largest[0].tolist() == pytest.approx(hidden[0].amax((1, 2)).tolist(), rel=1e-5)
    assert seen.occupied[0].tolist() == (hidden[0] > 0).sum((1, 2)).tolist()
    assert not torch.equal(seen.square[0], seen.square[-1])
    step = float(seen.step()[0])  # exact codes of the tensor, and what they do at the output
    error = model[2:]((hidden / step).round() * step) - model(image)
    assert float(error.detach().square().sum()) == pytest.approx(float(seen.rounding()[:count].mean()), rel=0.6)


def test_the_ladder_takes_what_saves_most_per_cost_and_ends_with_exact_ranges():
    layers = [
        [Option(8.0, 0.0, 0), Option(7.9, 5.0, 0), Option(4.0, 10.0, 0), Option(1.0, 100.0, 0)],  # the second lies above the hull
        [Option(3.0, 0.0, 0), Option(1.0, 1.0, 0), Option(1.1, 50.0, 0)],  # exact ranges are worse than a law
    ]
    cheapest, steps = choice.ladder(layers, [3, 2], 0.0)
    assert cheapest == [0, 0] and [(step.layer, step.option) for step in steps] == [(1, 1), (0, 2), (0, 3), (1, 2)]
    noise = [sum(options[i].noise for options, i in zip(layers, choice.climb(cheapest, steps, count))) for count in range(5)]
    assert noise == [11.0, 9.0, 5.0, 2.0, pytest.approx(2.1)]
    for count in range(4):  # nothing as cheap has less noise
        chosen = choice.climb(cheapest, steps, count)
        price = sum(options[i].cost for options, i in zip(layers, chosen))
        others = [sum(o.noise for o in pair) for pair in itertools.product(*layers) if sum(o.cost for o in pair) <= price]
        assert noise[count] == min(others)


def test_predictors_stay_within_their_budget():
    layers = [[Option(8.0, 0.0, 8), Option(2.0, 1.0, 100), Option(1.0, 9.0, 0)]] * 2
    cheapest, steps = choice.ladder(layers, [2, 2], 120.0)
    for count in range(len(steps) + 1):
        assert sum(options[i].size for options, i in zip(layers, choice.climb(cheapest, steps, count))) <= 120
    assert [(step.layer, step.option) for step in steps] == [(0, 1), (0, 2), (1, 2)] and choice.climb(cheapest, steps, 3) == [2, 2]


def test_as_few_steps_as_it_takes():
    for most, first in itertools.product(range(9), repeat=2):
        if first <= most:
            asked = []
            assert choice.fewest(lambda count: asked.append(count) or count >= first, most) == first
            assert len(asked) <= 5 and most not in asked


def test_how_good_is_good_enough():
    profiled = torch.full((3, 40), 24.0, dtype=torch.float64)

    def reached(decibels, dynamic):
        return choice.Target.of(profiled, dynamic).reached(decibels)

    far = profiled - 3.0  # dynamic quantization, much worse: hardly behind exact ranges with profiles is asked for
    assert reached(profiled, far) and reached(profiled - 0.29, far) and not reached(profiled - 0.31, far)
    behind = profiled.clone()  # one version is, made up for by others
    behind[1] -= 0.49
    assert reached(behind, far)
    behind[1] -= 0.02
    assert not reached(behind, far)
    near = profiled - 0.05  # dynamic quantization is nearly as good: not to be behind it
    assert reached(near, near) and not reached(profiled - 0.06, near)
    above = profiled.clone()
    above[1] -= 0.06
    assert not reached(above, near) and reached(above, near - 0.02)
    assert reached(profiled, profiled + 1) and not reached(profiled - 0.01, profiled + 1)  # profiles lose: no more is asked for than there is
    profiled[0, :5] = 12.0  # some samples are hard: the lowest twentieth of all, 6 here, is told apart
    low, far = profiled + 0.5, profiled - 3.0
    low[0, 0] -= 3.0
    assert reached(low, far)  # one of them alone counts a sixth
    low[0, :5] = 11.0
    assert not reached(low, far)


def test_better_weighs_clean_and_shifted_samples_alike():
    a, b = torch.zeros(3, 2), torch.zeros(3, 2)
    a[0] = 1.0
    assert choice.better(a, b) and not choice.better(b, a)
    a[1:] = -1.5
    assert not choice.better(a, b)


def looked(model, *chunk):
    """(graph, int8 units, what look() finds in their outputs, channels first)"""
    graph_module = trace(model.eval(), chunk)
    units = find_units(graph_module)
    choose_int8(units, lambda name: True)
    return units, influence.look(graph_module, {unit.output: 1 for unit in units if unit.is_layer}, set(), [chunk], lambda chunk, number: [])


def test_looking_keeps_no_activations():
    looked(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3)), torch.randn(4, 2, 8, 8))
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is influence._Looker]


def test_a_gradient_that_is_not_a_number_stays_where_it_is():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.second(self.first(x)) * (x[:, :1] > 0)
            return x.square().sum(1).sqrt()  # at 0: 0 / 0

    units, found = looked(Norm(), torch.randn(2, 2, 4, 4))
    assert all(bool(found.seen[unit.output].gain.isfinite().all() and (found.seen[unit.output].gain > 0).any()) for unit in units if unit.is_layer)


def test_channels_of_frames_are_told_apart():
    class Frames(nn.Module):  # [N, T, C, H, W]
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.conv(x.flatten(0, 1)).unflatten(0, (-1, 4)).mean(1)

    model, x = Frames(), torch.randn(2, 4, 3, 6, 6)
    units, found = looked(model, x)
    y = model.conv(x.flatten(0, 1)).detach().unflatten(0, (2, 4))
    seen = found.seen[units[0].output]
    assert torch.allclose(seen.largest.float(), y.amax((1, 3, 4)), atol=1e-5) and torch.allclose(seen.mean.float(), y.mean((1, 3, 4)), atol=1e-5)


class Outputs(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv, self.head, self.outputs = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3), outputs
        self.anchors = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.outputs(self, self.head(self.conv(x).relu()).flatten(1))


@pytest.mark.parametrize(
    ("outputs", "judged"),
    [
        (lambda self, y: (y, None), True),
        (lambda self, y: {"logits": y, "classes": 4, "kind": "logits", "best": y.argmax(1)}, True),
        (lambda self, y: (y, self.anchors, y.mean()), True),
        (lambda self, y: y.mean(), False),
        (lambda self, y: y * 0.0, False),
        (lambda self, y: y.argmax(1), False),
    ],
    ids=["none", "dict", "no batch", "scalar", "zero", "integers"],
)
def test_whatever_a_model_returns(outputs, judged):
    torch.manual_seed(0)
    qmodel = pq.quantize(Outputs(outputs), [torch.randn(5, 3, 8, 8), torch.randn(6, 3, 8, 8)], progress=False)
    told = qmodel.meta["choice"]
    assert ("dB" in told) == judged and "nan" not in told and "inf" not in told
    if not judged:
        assert "nothing to judge by" in told and {layer.strategy for layer in qmodel.layers if layer.kind == "conv2d"} <= {"dynamic", "float32 output"}


def test_a_version_without_a_signal_is_left_out():
    decibels = torch.full((3, 4), 20.0, dtype=torch.float64)
    decibels[1] = math.nan  # in the dark nothing comes out
    target = choice.Target.of(decibels, decibels)
    assert target.reached(decibels) and not target.reached(decibels - 2.0)
    assert "clean / dark" in choice.told(decibels, decibels, decibels, 1, 2, 3.0)


def test_large_outputs_are_judged_by_some_of_their_values():
    y = torch.randn(2, 5, 100, 100)
    some = joined_outputs((y, y[:, 0], torch.zeros(3)), 2, 997)
    assert some.shape == (2, 2 * 997)
    noisy = y + 0.1 * torch.randn(y.shape)
    assert float((sqnr(some, joined_outputs((noisy, noisy[:, 0]), 2, 997)) - 20.0).abs().max()) < 0.7
    assert torch.equal(joined_outputs(y, 2, 50000), y.flatten(1))
