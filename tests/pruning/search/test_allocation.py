"""The search: exact where costs are linear, near the optimum where they are steps."""

from itertools import product

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.search.allocation import search_masks


def scores(seed, **units):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator) ** 3 for name, count in units.items()}


def linear(importance, prices):
    return {n: prices[n.rstrip("0123456789")] * torch.arange(len(s) + 1).double() for n, s in importance.items()}


def value(importance, kept):
    return sum(float(importance[name][mask].double().sum()) for name, mask in kept.items())


def cost(costs, kept):
    return sum(float(costs[name][int(mask.sum())]) for name, mask in kept.items())


def best(importance, costs, budget):
    """The greatest value over all masks with one unit or more in each group."""
    choices = []
    for name, found in importance.items():
        masks = [torch.tensor(mask) for mask in product([False, True], repeat=len(found)) if any(mask)]
        choices.append([(float(found[m].double().sum()), float(costs[name][int(m.sum())])) for m in masks])
    dense = sum(float(table[-1]) for table in costs.values())
    fitting = (picked for picked in product(*choices) if sum(c for _, c in picked) <= budget * dense + 1e-9)
    return max(sum(v for v, _ in picked) for picked in fitting)


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.61, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "units", [{"heads1": 3, "heads2": 3, "neurons1": 4, "neurons2": 4}, {"heads1": 4, "heads2": 4}, {"neurons1": 6}]
)
def test_linear_costs_are_solved_exactly(units, seed, budget):
    importance = scores(seed, **units)
    costs = linear(importance, {"heads": 7.0, "neurons": 2.0})
    kept = search_masks(importance, costs, budget)
    assert value(importance, kept) == pytest.approx(best(importance, costs, budget))
    assert cost(costs, kept) <= budget * sum(float(table[-1]) for table in costs.values())
    assert all(mask.any() for mask in kept.values())


@pytest.mark.parametrize("seed", range(6))
def test_steps_are_solved_nearly(seed):
    importance = scores(seed, heads1=4, heads2=4, neurons1=5, neurons2=5)
    generator = torch.Generator().manual_seed(seed)
    costs = {
        name: torch.cat([torch.zeros(1), torch.rand(len(found), generator=generator).cumsum(0)])
        for name, found in importance.items()
    }
    dense = sum(float(table[-1]) for table in costs.values())
    kept = search_masks(importance, costs, 0.6)
    assert cost(costs, kept) <= 0.6 * dense
    assert value(importance, kept) >= 0.93 * best(importance, costs, 0.6)


def test_units_that_cost_nothing_more_are_kept():
    """A table in steps of four, as vectorised kernels have them."""
    importance = {"a": torch.arange(8.0), "b": torch.arange(8.0).flip(0)}
    table = torch.tensor([0.0, 1, 1, 1, 1, 2, 2, 2, 2])
    kept = search_masks(importance, {"a": table, "b": table}, 0.75)
    assert sorted(int(mask.sum()) for mask in kept.values()) == [4, 8]
    even = search_masks(importance, {"a": table, "b": table}, 0.5)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in even.items()} == {
        "a": [4, 5, 6, 7],
        "b": [0, 1, 2, 3],
    }


@pytest.mark.parametrize("power", [1.0, 1.3])
def test_the_whole_budget_keeps_everything(power):
    """Units without importance too; and equal importance is no obstacle."""
    importance = {"a": torch.zeros(3), "b": torch.ones(5), "c": torch.zeros(4)}
    costs = {name: torch.arange(len(found) + 1).double() ** power for name, found in importance.items()}
    assert all(mask.all() for mask in search_masks(importance, costs, 1.0).values())
    half = search_masks(importance, costs, 0.7)
    assert half["b"].all()
    assert half["a"].any()
    assert half["c"].any()


def test_a_group_is_never_emptied():
    importance = {"dull": torch.full((4,), 1e-9), "bright": torch.ones(4)}
    costs = {name: torch.arange(5).double() for name in importance}
    kept = search_masks(importance, costs, 0.5)
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"dull": 1, "bright": 3}


def test_three_prices_are_solved_too():
    importance = scores(3, a=4, b=4, c=4)
    costs = {name: price * torch.arange(5).double() for name, price in zip("abc", (1, 2, 5), strict=True)}
    kept = search_masks(importance, costs, 0.5)
    assert cost(costs, kept) <= 16
    assert value(importance, kept) >= 0.93 * best(importance, costs, 0.5)


def test_what_does_not_fit_is_refused():
    importance, table = {"a": torch.ones(2)}, torch.arange(3.0)
    with pytest.raises(SettingError, match="must lie in \\(0, 1\\], got 1.5"):
        search_masks(importance, {"a": table}, 1.5)
    with pytest.raises(SettingError, match="can't be met: one unit in each of 1 groups.*at most 0.5000"):
        search_masks(importance, {"a": table}, 0.4)
    with pytest.raises(SettingError, match="same groups, got \\['a'\\], \\['b'\\]"):
        search_masks(importance, {"b": table}, 0.5)
    with pytest.raises(SettingError, match="The costs of a must be 3 numbers that never fall"):
        search_masks(importance, {"a": torch.tensor([0.0, 2.0, 1.0])}, 0.5)
    with pytest.raises(SettingError, match="importance of a must be finite"):
        search_masks({"a": torch.tensor([1.0, torch.nan])}, {"a": table}, 0.5)
