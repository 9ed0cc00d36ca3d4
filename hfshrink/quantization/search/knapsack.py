"""One option per module, the least sum of losses under a budget: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hfshrink.errors import SettingError

RESOLUTION = 20_000
"""Steps in which the budget is counted, where it can't be counted exactly."""


@dataclass(frozen=True)
class Choice:
    """The best choice under a budget.

    Attributes:
        options: Module -> its option.
        loss: Sum of the losses of the options, negative ones counted as 0.
        cost: Sum of their costs, at most the budget.
        rounding: How much of the budget may be lost to counting in steps: no choice that costs at most
            `budget - rounding` has a smaller loss. 0 means exact.
    """

    options: dict[str, str]
    loss: float
    cost: int
    rounding: int


def choose_options(
    losses: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, int]],
    budget: int,
    resolution: int = RESOLUTION,
) -> Choice:
    """Minimise Σ loss(m, o(m)) over one option o per module m with Σ cost(m, o(m)) ≤ budget, by dynamic programming.

    With f_m(c) the least loss of the first m modules at cost c: f_m(c) = min_o f_{m−1}(c − cost(m, o)) + loss(m, o).
    Costs count from each module's cheapest option on, in units of their greatest common divisor; where the budget has
    more than `resolution` of them, in larger steps, rounded up, so that the budget always holds. A loss below 0 is
    noise of the measurement and counts as 0; of equal sums the cheapest wins.

    Args:
        losses: Module -> option -> loss, such as the loss rise of a precision.
        costs: Module -> option -> cost, in whole bytes or microseconds.
        budget: Largest sum of costs.
        resolution: Most steps to count in.

    Raises:
        SettingError: Names that don't fit, a loss or cost that is no number, or a budget below the smallest possible.

    Example:
        >>> losses = {"a": {"int4": 0.3, "int8": 0.0}, "b": {"int4": 0.1, "int8": 0.0}}
        >>> costs = {"a": {"int4": 4, "int8": 8}, "b": {"int4": 4, "int8": 8}}
        >>> choose_options(losses, costs, budget=12)
        Choice(options={'a': 'int8', 'b': 'int4'}, loss=0.1, cost=12, rounding=0)
    """
    _check(losses, costs, resolution)
    least = {name: min(row.values()) for name, row in costs.items()}
    slack = budget - sum(least.values())
    if slack < 0:
        raise SettingError(
            f"A budget of {budget:,} is too small: with the cheapest option everywhere {len(costs)} modules take "
            f"{sum(least.values()):,}, the least that is possible."
        )
    extra = {name: {option: cost - least[name] for option, cost in row.items()} for name, row in costs.items()}
    unit = math.gcd(*(cost for row in extra.values() for cost in row.values())) or 1
    slack = min(slack, sum(max(row.values()) for row in extra.values()))
    step = unit * max(1, -(-slack // (unit * resolution)))
    options = _solve(losses, extra, slack // step, step)
    loss = sum(max(losses[name][option], 0.0) for name, option in options.items())
    cost = sum(costs[name][option] for name, option in options.items())
    # each module rounds up by less than a step, and so does the budget
    rounding = 0 if step == unit else (step - unit) * (len(costs) + 1)
    return Choice(options, loss, cost, rounding)


def _solve(
    losses: Mapping[str, Mapping[str, float]], extra: Mapping[str, Mapping[str, int]], steps: int, step: int
) -> dict[str, str]:
    """The option of each module, costs in `step`s rounded up, at most `steps` of them."""
    best = np.full(steps + 1, np.inf)
    best[0] = 0.0
    taken = []
    for name, row in extra.items():
        table = np.full((len(row), steps + 1), np.inf)
        for number, (option, cost) in enumerate(row.items()):
            shift = -(-cost // step)
            if shift <= steps:
                table[number, shift:] = best[: steps + 1 - shift] + max(losses[name][option], 0.0)
        taken.append(table.argmin(axis=0).astype(np.uint8))  # a plan of a thousand modules holds a thousand of them
        best = table.min(axis=0)
    if not np.isfinite(best).any():
        raise SettingError("The budget can't be held: every choice within it has an option with an infinite loss.")
    place, options = int(best.argmin()), {}
    for (name, row), choice in zip(reversed(list(extra.items())), reversed(taken), strict=True):
        option = list(row)[choice[place]]
        options[name] = option
        place -= -(-row[option] // step)
    return {name: options[name] for name in extra}


def _check(losses: Mapping[str, Mapping[str, float]], costs: Mapping[str, Mapping[str, int]], resolution: int) -> None:
    if resolution < 1:
        raise SettingError(f"resolution must be at least 1, got {resolution}.")
    if not costs or set(losses) != set(costs):
        raise SettingError(f"losses and costs must name the same modules, got {sorted(losses)} and {sorted(costs)}.")
    for name, row in costs.items():
        if not row or set(row) != set(losses[name]):
            raise SettingError(f"{name} has losses for {sorted(losses[name])} and costs for {sorted(row)}.")
        for option, cost in row.items():
            loss = losses[name][option]
            if not isinstance(cost, int) or cost < 0 or not isinstance(loss, int | float) or math.isnan(loss):
                raise SettingError(
                    f"{name} as {option} needs a loss that is a number and a whole cost of 0 or more, got {loss!r} "
                    f"and {cost!r}."
                )
        if all(math.isinf(loss) for loss in losses[name].values()):
            raise SettingError(f"Every option of {name} has an infinite loss.")
