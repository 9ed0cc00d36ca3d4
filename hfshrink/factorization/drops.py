"""The smallest budget whose measured drop of a metric stays within a bound."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from hfshrink.errors import BudgetError, SettingError

MOST_EVALUATIONS = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DropSearch:
    """What `ranks_for_drop` found.

    Attributes:
        budget: The smallest budget that was measured to hold.
        drop: Measured there.
        tries: Every budget that was measured and its drop, None where it was no number, in the order of measuring.
    """

    budget: float
    drop: float
    tries: tuple[tuple[float, float | None], ...]

    @property
    def is_monotone(self) -> bool:
        """Whether the measured drops never rise with the budget; if they do, noise took part in the choice."""
        drops = [math.inf if drop is None else drop for _, drop in sorted(self.tries, key=lambda pair: pair[0])]
        return all(after <= before for before, after in pairwise(drops))


def ranks_for_drop(
    evaluate_at: Callable[[float], float | None],
    low: float,
    high: float,
    max_drop: float,
    *,
    evaluations: int = MOST_EVALUATIONS,
    tolerance: float = 0.01,
) -> DropSearch:
    """The smallest budget whose measured drop is at most `max_drop`, by bisection.

    The drop is taken to fall while the budget grows. No budget is returned that was not measured to hold: where none
    has held before the last evaluation, that goes to `high`, and where all have, to `low`. Six evaluations find the
    budget to (high − low) / 64. Drops that are not monotone are noise of the metric, and a warning says so.

    Args:
        evaluate_at: Budget, such as a rank ratio -> drop of the metric, positive where the model got worse; None or
            NaN, where it is undefined, counts as too much. It is called once for each budget.
        low: Smallest budget to try.
        high: Largest budget to try.
        max_drop: In the metric's own unit, at least 0: 0.01 is one point of accuracy.
        evaluations: Most calls of `evaluate_at`.
        tolerance: Budgets that are this close are not told apart; in the unit of budgets.

    Raises:
        SettingError: Bounds in the wrong order, or a setting out of range.
        BudgetError: The drop is too large at every budget that was tried, `high` among them.

    Example:
        >>> found = ranks_for_drop(lambda ratio: 0.1 * (1 - ratio), low=0.1, high=0.9, max_drop=0.031)
        >>> round(found.budget, 4), len(found.tries)
        (0.7, 6)
    """
    _check(low, high, max_drop, evaluations, tolerance)
    tries: dict[float, float | None] = {}
    held: dict[float, float] = {}

    def holds(budget: float) -> bool:
        drop = evaluate_at(budget)
        tries[budget] = None if drop is None or not math.isfinite(drop) else float(drop)
        if drop is not None and math.isfinite(drop) and drop <= max_drop:
            held[budget] = float(drop)
        return budget in held

    failing, holding = low, high
    while len(tries) < evaluations - 1 and holding - failing > tolerance:
        middle = (failing + holding) / 2
        if holds(middle):
            holding = middle
        else:
            failing = middle
    if not held:
        if not holds(high):
            raise BudgetError(
                f"No budget up to {high:g} holds max_drop={max_drop:g}; drops by budget: {_listed(tries)}. The "
                f"nearest is {_nearest(tries)}. Allow a larger max_drop, or give calibration data if there was none."
            )
    elif failing == low:
        holds(low)
    elif holding - failing > tolerance:
        holds((failing + holding) / 2)
    budget = min(held)
    found = DropSearch(budget, held[budget], tuple(tries.items()))
    if not found.is_monotone:
        logger.warning("drops do not fall steadily while the budget grows, so noise took part: %s", _listed(tries))
    return found


def _check(low: float, high: float, max_drop: float, evaluations: int, tolerance: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise SettingError(f"low and high must be numbers, low not above high, got {low!r} and {high!r}.")
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop < math.inf:
        raise SettingError(f"max_drop must be a number of at least 0, such as 0.01, got {max_drop!r}.")
    if evaluations < 1 or not tolerance >= 0:
        raise SettingError(f"evaluations must be at least 1, tolerance 0, got {evaluations!r} and {tolerance!r}.")


def _listed(tries: Mapping[float, float | None]) -> str:
    return ", ".join(f"{budget:g}: {_shown(drop)}" for budget, drop in sorted(tries.items()))


def _nearest(tries: Mapping[float, float | None]) -> str:
    """The try with the smallest drop."""
    budget, drop = min(tries.items(), key=lambda pair: math.inf if pair[1] is None else pair[1])
    return f"{_shown(drop)} at {budget:g}"


def _shown(drop: float | None) -> str:
    return "undefined" if drop is None else f"{drop:.4f}"
