"""Which units to keep under a budget: exact for two kinds of linear costs, by prices for measured ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hfshrink.errors import SettingError

TOLERANCE = 1e-9
"""Share of the dense cost by which sums in float64 may exceed a budget."""


def search_masks(importance: Mapping[str, Tensor], costs: Mapping[str, Tensor], budget: float) -> dict[str, Tensor]:
    """The units with the greatest Σ importance whose cost stays within a budget (Kwon et al., arXiv:2204.09656).

    Where each unit of a group costs the same and there are at most two prices in all (heads and neurons): for every
    number of heads take the most important ones, fill the rest of the budget with the most important neurons, and
    keep the best of these; that is exact. Other costs, such as measured latencies, go by a price λ per unit of cost:
    each group takes the number n that maximises value(n) − λ · cost(n), λ is bisected, and what is left of the budget
    is spent on the steps with the most value per cost. Each group keeps at least one unit, unlike in the reference.

    Args:
        importance: Group name -> importance of its units (units,), not negative.
        costs: Group name -> cost by number of units kept (units + 1,), never falling.
        budget: Share of the cost of all units, in (0, 1].

    Returns:
        Group name -> booleans (units,), True for what is kept.

    Raises:
        SettingError: Names or sizes that do not fit, values that are no numbers, or a budget that one unit per group
            exceeds.

    Example:
        >>> importance = {"heads": torch.tensor([5.0, 1.0]), "neurons": torch.tensor([2.0, 0.0, 3.0])}
        >>> costs = {"heads": torch.tensor([0.0, 3.0, 6.0]), "neurons": torch.tensor([0.0, 1.0, 2.0, 3.0])}
        >>> {name: kept.tolist() for name, kept in search_masks(importance, costs, budget=0.6).items()}
        {'heads': [True, False], 'neurons': [True, False, True]}
    """
    values = {name: scores.double().cpu() for name, scores in importance.items()}
    tables = {name: table.double().cpu() for name, table in costs.items()}
    limit = _checked_budget(values, tables, budget)
    prices = {name: float(table[-1]) / (len(table) - 1) for name, table in tables.items()}
    is_linear = all(torch.allclose(t, prices[n] * torch.arange(len(t)).double(), rtol=1e-9) for n, t in tables.items())
    if is_linear and len(set(prices.values())) <= 2 and min(prices.values()) > 0:
        return _best_split(values, prices, limit)
    counts = _bisect_price(values, tables, limit)
    return {name: _top(scores, counts[name]) for name, scores in values.items()}


def _checked_budget(values: Mapping[str, Tensor], tables: Mapping[str, Tensor], budget: float) -> float:
    if not values or set(values) != set(tables):
        raise SettingError(f"importance and costs must name the same groups, got {sorted(values)}, {sorted(tables)}.")
    for name, scores in values.items():
        if tables[name].shape != (len(scores) + 1,) or not bool((tables[name].diff() >= 0).all()):
            raise SettingError(
                f"The costs of {name} must be {len(scores) + 1} numbers that never fall, for 0..{len(scores)} units; "
                f"got shape {tuple(tables[name].shape)}."
            )
        if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
            raise SettingError(f"The importance of {name} must be finite and not negative.")
    if not 0 < budget <= 1:
        raise SettingError(f"The budget is a share of the dense cost and must lie in (0, 1], got {budget}.")
    dense = float(sum(table[-1] for table in tables.values()))
    least = float(sum(table[1] for table in tables.values()))
    limit = budget * dense + TOLERANCE * dense
    if least > limit:
        raise SettingError(
            f"A budget of {budget:.4f} of the dense cost can't be met: one unit in each of {len(tables)} groups, the "
            f"least that runs, takes {least / dense:.4f} of it. Use a sparsity of at most {1 - least / dense:.4f}."
        )
    return limit


def _best_split(values: Mapping[str, Tensor], prices: Mapping[str, float], limit: float) -> dict[str, Tensor]:
    """For each number of units of the first price, as many of the second price as fit; the best pair counts."""
    kinds = sorted(set(prices.values()), reverse=True)
    kept = {name: _top(scores, 1) for name, scores in values.items()}
    left = limit - sum(prices.values())
    pools = [[name for name in values if prices[name] == kind] for kind in kinds]
    ranked = [_ranked(values, kept, pool) for pool in pools]
    gains = [torch.cat([torch.zeros(1).double(), scores.cumsum(dim=0)]) for scores, _ in ranked]
    first = torch.arange(len(gains[0]))
    rest = left - kinds[0] * first
    first, rest = first[rest >= 0], rest[rest >= 0]
    second, total = torch.zeros_like(first), gains[0][first]
    if len(kinds) == 2:
        second = (rest / kinds[1]).floor().long().clamp(max=len(gains[1]) - 1)
        total = total + gains[1][second]
    best = int((total == total.max()).nonzero()[-1])  # of equals the one with most units of the dear kind
    for (_, places), count in zip(ranked, (int(first[best]), int(second[best])), strict=False):
        for name, unit in places[:count]:
            kept[name][unit] = True
    return kept


def _ranked(
    values: Mapping[str, Tensor], kept: Mapping[str, Tensor], pool: list[str]
) -> tuple[Tensor, list[tuple[str, int]]]:
    """Importance of the units of some groups that are not kept yet, falling, and where each of them is."""
    places = [(name, unit) for name in pool for unit in (~kept[name]).nonzero().flatten().tolist()]
    scores = torch.cat([values[name][~kept[name]] for name in pool])
    order = scores.argsort(descending=True, stable=True)
    return scores[order], [places[index] for index in order.tolist()]


def _bisect_price(values: Mapping[str, Tensor], tables: Mapping[str, Tensor], limit: float) -> dict[str, int]:
    gains = {name: _gains(scores) for name, scores in values.items()}

    def choose(price: float) -> dict[str, int]:
        return {name: 1 + int((gains[name] - price * tables[name])[1:].argmax()) for name in values}

    def cost(counts: Mapping[str, int]) -> float:
        return float(sum(tables[name][count] for name, count in counts.items()))

    low, high = 0.0, float(sum(gain[-1] for gain in gains.values())) / limit + 1e-30
    while cost(choose(high)) > limit and high < 1e300:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(choose(middle)) <= limit else (middle, high)
    counts = choose(high)
    if cost(counts) > limit:  # values so large that no price outweighs them
        counts = dict.fromkeys(values, 1)
    return _fill(counts, gains, tables, limit - cost(counts))


def _fill(
    counts: dict[str, int], gains: Mapping[str, Tensor], tables: Mapping[str, Tensor], left: float
) -> dict[str, int]:
    """Spend the rest on the step with most value per cost, again and again; of equal steps on the longest."""
    while True:
        best = (-1.0, 0.0, "", 0)
        for name, count in counts.items():
            extra = tables[name][count + 1 :] - tables[name][count]
            extra = extra[extra <= left]  # costs never fall, so these are the next ones
            if not len(extra):
                continue
            value = gains[name][count + 1 : count + 1 + len(extra)] - gains[name][count]
            ratio = torch.where(extra > 0, value / extra, torch.inf)
            step = int((ratio == ratio.max()).nonzero()[-1])
            best = max(best, (float(ratio[step]), float(extra[step]), name, step + 1))
        if not best[2]:
            return counts
        left -= best[1]
        counts[best[2]] += best[3]


def _gains(scores: Tensor) -> Tensor:
    """Importance of the n most important units, for n = 0..units."""
    return torch.cat([torch.zeros(1).double(), scores.sort(descending=True).values.cumsum(dim=0)])


def _top(scores: Tensor, count: int) -> Tensor:
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept
