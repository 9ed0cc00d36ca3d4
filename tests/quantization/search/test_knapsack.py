"""The knapsack against all choices, its budget, its ties, and the bound on what counting in steps may lose."""

from __future__ import annotations

import itertools
import random

import pytest

from hfshrink.errors import SettingError
from hfshrink.quantization.search.knapsack import choose_options

OPTIONS = ("int2", "int4", "int8")


def problem(seed: int, modules: int = 5, largest: int = 40):
    draw = random.Random(seed)
    names = [f"m{number}" for number in range(modules)]
    losses = {name: {option: round(draw.uniform(-0.1, 1), 3) for option in OPTIONS} for name in names}
    costs = {name: {option: draw.randint(1, largest) for option in OPTIONS} for name in names}
    return losses, costs


def all_choices(losses, costs):
    for options in itertools.product(OPTIONS, repeat=len(costs)):
        pairs = list(zip(costs, options, strict=True))
        yield sum(max(losses[m][o], 0.0) for m, o in pairs), sum(costs[m][o] for m, o in pairs)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed):
    losses, costs = problem(seed)
    least = sum(min(row.values()) for row in costs.values())
    for budget in (least, least + 7, least + 31, 10_000):
        found = choose_options(losses, costs, budget)
        feasible = [choice for choice in all_choices(losses, costs) if choice[1] <= budget]
        best = min(loss for loss, _ in feasible)
        assert found.loss == pytest.approx(best)
        assert found.cost <= budget
        assert found.rounding == 0
        assert found.cost == sum(costs[name][option] for name, option in found.options.items())
        assert found.cost == min(cost for loss, cost in feasible if loss <= best + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_steps_keep_the_budget_and_their_bound(seed):
    losses, costs = problem(seed, largest=997)
    budget = sum(min(row.values()) for row in costs.values()) + 1200
    found = choose_options(losses, costs, budget, resolution=50)
    assert found.cost <= budget
    assert 0 < found.rounding <= 6 * 24
    smaller = [loss for loss, cost in all_choices(losses, costs) if cost <= budget - found.rounding]
    assert found.loss <= min(smaller) + 1e-12


def test_a_common_divisor_keeps_it_exact():
    losses, costs = problem(3)
    thousands = {name: {option: 4096 * cost for option, cost in row.items()} for name, row in costs.items()}
    small, large = choose_options(losses, costs, 60), choose_options(losses, thousands, 60 * 4096 + 5, resolution=500)
    assert large.options == small.options
    assert large.rounding == 0


def test_noise_is_no_gain_and_cheaper_wins_ties():
    losses = {"a": {"int4": 0.0, "int8": -0.2}, "b": {"int4": -0.1, "int8": 0.0}}
    costs = {name: {"int4": 4, "int8": 8} for name in losses}
    assert choose_options(losses, costs, 100).options == {"a": "int4", "b": "int4"}
    assert choose_options(losses, costs, 100).loss == 0


def test_an_option_without_a_loss_is_never_chosen():
    losses = {"a": {"int2": float("inf"), "int8": 0.5}}
    costs = {"a": {"int2": 1, "int8": 8}}
    assert choose_options(losses, costs, 8).options == {"a": "int8"}
    with pytest.raises(SettingError, match="can't be held: .*infinite loss"):
        choose_options(losses, costs, 7)


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "match"),
    [
        ({"a": {"x": 0.0}}, {"a": {"x": 1234}}, 1000, "budget of 1,000 is too small.* take 1,234, the least"),
        ({}, {}, 5, "must name the same modules"),
        ({"a": {"x": 0.0}}, {"b": {"x": 1}}, 5, r"got \['a'\] and \['b'\]"),
        ({"a": {"x": 0.0}}, {"a": {"y": 1}}, 5, r"a has losses for \['x'\] and costs for \['y'\]"),
        ({"a": {"x": float("nan")}}, {"a": {"x": 1}}, 5, "a as x needs a loss that is a number .* got nan and 1"),
        ({"a": {"x": 0.0}}, {"a": {"x": 1.5}}, 5, "got 0.0 and 1.5"),
        ({"a": {"x": 0.0}}, {"a": {"x": -1}}, 5, "got 0.0 and -1"),
        ({"a": {"x": float("inf")}}, {"a": {"x": 1}}, 5, "Every option of a has an infinite loss"),
    ],
)
def test_bad_input(losses, costs, budget, match):
    with pytest.raises(SettingError, match=match):
        choose_options(losses, costs, budget)


def test_hundreds_of_modules_take_no_time():
    losses, costs = problem(0, modules=300, largest=10**6)
    found = choose_options(losses, costs, sum(sum(row.values()) for row in costs.values()) // 4)
    assert found.rounding < 0.02 * found.cost
