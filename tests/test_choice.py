"""What auto decides with: what noise is worth at the output, the ladder, and the targets."""

import itertools

import pytest
import torch
from torch import nn

from probquant import choice, influence
from probquant.choice import Option
from probquant.graph import choose_int8, find_units, trace


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


def test_what_must_be_reached():
    flat = torch.ones(2, 4, dtype=torch.float64)
    target = choice.Target.of(20.0 * flat, 25.0 * flat)  # profiles gain: near them
    assert target.reached(24.8 * flat) and not target.reached(24.6 * flat)
    target = choice.Target.of(25.0 * flat, 24.0 * flat)  # they lose: no more than they have
    assert target.reached(24.0 * flat) and not target.reached(23.95 * flat)
    odd = 24.0 * flat
    odd[1, 0] = 22.5  # the worst sample of a version, made up for by others
    odd[1, 1:] += 2.0
    assert not target.reached(odd)
    odd[1, 0] = 23.5
    assert target.reached(odd)
    odd[0], odd[1] = 23.8, 26.0  # one version falls behind
    assert not target.reached(odd)


def test_better_weighs_clean_and_shifted_samples_alike():
    a, b = torch.zeros(3, 2), torch.zeros(3, 2)
    a[0] = 1.0
    assert choice.better(a, b) and not choice.better(b, a)
    a[1:] = -1.5
    assert not choice.better(a, b)
