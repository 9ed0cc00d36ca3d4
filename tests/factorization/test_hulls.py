"""Points under a budget against trying them all, and the laws of the lower hull."""

from __future__ import annotations

import itertools
import random

import pytest

from hfshrink.factorization.hulls import choose_points, lower_hull


def falling_curve(draw: random.Random, points: int) -> list[tuple[int, float]]:
    costs = sorted(draw.sample(range(1, 30), points))
    errors = sorted((draw.choice((0.0, 1.0, 2.0, draw.uniform(0, 9))) for _ in range(points)), reverse=True)
    return list(zip(costs, errors, strict=True))


def total(curves, chosen):
    return tuple(sum(curve[p][axis] for curve, p in zip(curves, chosen, strict=True)) for axis in (0, 1))


def best_error(curves, budget):
    """By trying all."""
    every = (total(curves, points) for points in itertools.product(*(range(len(curve)) for curve in curves)))
    return min(error for cost, error in every if cost <= budget)


def hull_steps(curves):
    """(saving, cost) of all steps along all hulls, the most saving per cost first; ties as they come, in turns."""
    steps = []
    for number, curve in enumerate(curves):
        for order, (before, after) in enumerate(itertools.pairwise(lower_hull(curve))):
            cost, saving = curve[after][0] - curve[before][0], curve[before][1] - curve[after][1]
            steps.append((-saving / cost, order, number, saving, cost))
    return [step[-2:] for step in sorted(steps)]


@pytest.mark.parametrize("seed", range(60))
def test_no_point_lies_below_the_hull_and_none_on_it_is_missing(seed):
    curve = falling_curve(random.Random(seed), 9)
    hull = lower_hull(curve)
    assert hull[0] == 0
    assert curve[hull[-1]][1] == curve[-1][1]
    for before, after in itertools.pairwise(hull):
        (cheap, high), (dear, low) = curve[before], curve[after]
        for position in range(before + 1, after):
            cost, error = curve[position]
            assert error > high + (low - high) * (cost - cheap) / (dear - cheap) - 1e-9
    slopes = [(curve[b][1] - curve[a][1]) / (curve[b][0] - curve[a][0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)


def test_points_in_line_are_kept():
    assert lower_hull([(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.0)]) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(60))
def test_within_one_step_of_the_best_and_best_where_a_step_ends(seed):
    draw = random.Random(seed)
    curves = [falling_curve(draw, draw.randint(1, 4)) for _ in range(4)]
    least = sum(curve[0][0] for curve in curves)
    steps = hull_steps(curves)
    ends = list(itertools.accumulate((cost for _, cost in steps), initial=least))
    before = None
    for budget in range(least, sum(curve[-1][0] for curve in curves) + 1):
        cost, error = total(curves, choose_points(curves, budget))
        best = best_error(curves, budget)
        blocked = next((saving for (saving, _), end in zip(steps, ends[1:], strict=True) if end > budget), 0.0)
        assert cost <= budget
        assert best - 1e-9 <= error <= best + blocked + 1e-9
        if budget in ends:
            assert error == pytest.approx(best, abs=1e-9)
        assert before is None or error <= before + 1e-9
        before = error


def test_what_is_left_is_used_up_as_well_as_can_be():
    """The step to (20, 0) doesn't fit; of 9 left, 4 + 5 save more than 8."""
    first = [(1, 100.0), (2, 50.0), (22, 0.0)]
    others = [[(1, 4.0), (9, 0.0)], [(1, 2.5), (5, 0.0)], [(1, 2.5), (6, 0.0)]]
    curves = [first, *others]
    assert choose_points(curves, 2 + 3 + 9) == [1, 0, 1, 1]


def test_counting_in_large_steps_stays_within_the_budget_and_monotone():
    draw = random.Random(0)
    curves = []
    for _ in range(6):  # coprime costs: no common unit
        costs = sorted(draw.sample(range(10**6, 10**8), 12))
        errors = sorted((draw.uniform(0, 9) for _ in range(12)), reverse=True)
        curves.append(list(zip(costs, errors, strict=True)))
    least, most = (sum(curve[end][0] for curve in curves) for end in (0, -1))
    before = float("inf")
    for step in range(200):
        budget = least + (most - least) * step // 199
        cost, error = total(curves, choose_points(curves, budget))
        assert cost <= budget
        assert error <= before + 1e-9
        before = error
    assert choose_points(curves, most) == [11] * 6
