"""The search for the smallest budget under a bounded drop: what it measures, and what it dares to return."""

from __future__ import annotations

import math
import random

import pytest

from hfshrink.errors import BudgetError, SettingError
from hfshrink.factorization.drops import ranks_for_drop


@pytest.mark.parametrize("needed", [0.1, 0.15, 0.333, 0.5, 0.72, 0.9])
def test_a_steady_drop_is_bisected_to_a_64th(needed):
    found = ranks_for_drop(lambda ratio: 0.02 if ratio < needed else 0.01, 0.1, 0.9, max_drop=0.01)
    assert needed <= found.budget < needed + 0.8 / 32
    assert found.drop == 0.01
    assert len(found.tries) <= 6
    assert found.is_monotone


@pytest.mark.parametrize("seed", range(100))
def test_only_what_was_measured_to_hold_is_returned(seed):
    draw = random.Random(seed)
    measured = {}

    def noisy(budget):
        assert budget not in measured, "measured twice"
        measured[budget] = draw.choice((None, math.nan, draw.uniform(-0.1, 0.3)))
        return measured[budget]

    try:
        found = ranks_for_drop(noisy, 0.2, 0.95, max_drop=0.1)
    except BudgetError:
        assert not any(drop is not None and drop <= 0.1 for drop in measured.values())
        assert 0.95 in measured
    else:
        holding = [budget for budget, drop in measured.items() if drop is not None and drop <= 0.1]
        assert found.budget == min(holding)
        assert found.drop == measured[found.budget]
        assert [budget for budget, _ in found.tries] == list(measured)
    assert len(measured) <= 6
    assert all(0.2 <= budget <= 0.95 for budget in measured)


def test_noise_is_told(caplog):
    drops = {0.5: 0.3, 0.75: 0.4, 0.875: 0.1, 0.8125: 0.35, 0.84375: 0.1, 0.828125: 0.4}
    found = ranks_for_drop(drops.__getitem__, 0.0, 1.0, max_drop=0.2, tolerance=0)
    assert found.budget == 0.84375
    assert not found.is_monotone
    assert (
        "drops do not fall steadily while the budget grows, so noise took part: 0.5: 0.3000, 0.75: 0.4" in caplog.text
    )


def test_where_all_hold_the_smallest_is_measured_too():
    found = ranks_for_drop(lambda _: 0.0, 0.1, 0.9, max_drop=0.0)
    assert found.budget == 0.1
    assert len(found.tries) == 6


def test_few_evaluations_and_close_budgets():
    assert ranks_for_drop(lambda _: 0.0, 0.1, 0.9, max_drop=0, evaluations=1).tries == ((0.9, 0.0),)
    assert ranks_for_drop(lambda _: 0.0, 0.5, 0.5, max_drop=0).tries == ((0.5, 0.0),)
    wide = ranks_for_drop(lambda ratio: 1 - ratio, 0.0, 1.0, max_drop=0.4, tolerance=0.3)
    assert wide.tries == ((0.5, 0.5), (0.75, 0.25))


def test_no_budget_holds():
    with pytest.raises(
        BudgetError, match=r"No budget up to 0.9 holds max_drop=0.01; drops .* nearest is 0.2000 at 0.9"
    ):
        ranks_for_drop(lambda ratio: 1.1 - ratio, 0.1, 0.9, max_drop=0.01)
    with pytest.raises(BudgetError, match="0.9: undefined"):
        ranks_for_drop(lambda _: None, 0.1, 0.9, max_drop=0.01)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"low": 0.9, "high": 0.1}, "low not above high, got 0.9 and 0.1"),
        ({"high": math.nan}, "low and high must be numbers"),
        ({"max_drop": -0.1}, "max_drop must be a number of at least 0, such as 0.01, got -0.1"),
        ({"max_drop": True}, "max_drop must be a number"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(SettingError, match=match):
        ranks_for_drop(lambda _: 0.0, **{"low": 0.1, "high": 0.9, "max_drop": 0.1, **settings})
