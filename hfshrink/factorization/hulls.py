"""One point of each falling curve of (cost, error), the least sum of errors within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Curve = Sequence[tuple[int, float]]
"""Points (cost, error), costs rising and errors not rising."""

RESOLUTION = 4096
"""Most steps in which what is left of a budget is counted."""


def lower_hull(curve: Curve) -> list[int]:
    """Positions of the points of a curve on its lower convex hull, by Andrew's monotone chain; points in line count.

    A point that costs more than another and has no smaller error is left out.

    Example:
        >>> lower_hull([(1, 8.0), (2, 6.0), (3, 5.5), (4, 2.0), (5, 2.0)])  # (3, 5.5) lies above the line
        [0, 1, 3]
    """
    hull: list[int] = []
    for position, (cost, error) in enumerate(curve):
        if hull and error >= curve[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (first, high), (middle, between) = curve[hull[-2]], curve[hull[-1]]
            if (high - between) * (cost - middle) >= (between - error) * (middle - first):
                break
            hull.pop()
        hull.append(position)
    return hull


def choose_points(curves: Sequence[Curve], budget: int) -> list[int]:
    """Minimise Σ error(m, p(m)) over one point p(m) per curve m with Σ cost(m, p(m)) ≤ budget, all but for one step.

    Each curve starts at its cheapest point and moves along its convex hull; of all curves' steps the one that saves
    most error per cost comes first. Where the next step doesn't fit, the choice is the best of its cost, and what is
    left is spent on any further points by dynamic programming. With E the error and s the saving of the step that
    didn't fit, no choice within the budget has an error of E − s or less; and a larger budget never does worse.

    Args:
        curves: Points (cost, error) of each curve, costs rising and errors not rising.
        budget: Largest sum of costs, at least that of all first points.

    Returns:
        The position of each curve's point.

    Example:
        >>> choose_points([[(1, 8.0), (2, 6.0), (4, 2.0)], [(1, 3.0), (3, 0.0)]], budget=5)
        [2, 0]
    """
    hulls = [lower_hull(curve) for curve in curves]
    chosen = [0] * len(curves)
    left = budget - sum(curve[0][0] for curve in curves)
    for _, _, number, position in _steps(curves, hulls):
        cost = curves[number][position][0] - curves[number][chosen[number]][0]
        if cost > left:
            _spend(curves, chosen, left, cost)
            break
        chosen[number] = position
        left -= cost
    return chosen


def _steps(curves: Sequence[Curve], hulls: Sequence[Sequence[int]]) -> list[tuple[float, int, int, int]]:
    """All steps along the hulls as (−saving per cost, which step of its curve, curve, position), the best first."""
    steps = []
    for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True)):
        slope = -math.inf
        for order, (before, after) in enumerate(pairwise(hull)):
            (cheap, high), (dear, low) = curve[before], curve[after]
            slope = max(slope, (low - high) / (dear - cheap))  # rounding must not turn the order of a curve's steps
            steps.append((slope, order, number, after))
    return sorted(steps)


def _spend(curves: Sequence[Curve], chosen: list[int], left: int, needed: int) -> None:
    """Move on from the chosen points with costs of at most `left` in all, for the least error.

    Costs are counted in units of their greatest common divisor, or in larger ones and rounded up. The unit depends
    on `needed`, the cost of the step that didn't fit, and not on `left`: so more left never means a worse choice.
    """
    moves: list[tuple[int, list[tuple[int, int, float]]]] = []
    for number, curve in enumerate(curves):
        spent, error = curve[chosen[number]]
        within = [
            (position, curve[position][0] - spent, curve[position][1] - error)
            for position in range(chosen[number] + 1, len(curve))
            if curve[position][0] - spent < needed and curve[position][1] < error
        ]
        if within:
            moves.append((number, within))
    unit = math.gcd(*(cost for _, within in moves for _, cost, _ in within)) or 1
    unit *= -(-needed // (unit * RESOLUTION))
    best = np.full(left // unit + 1, np.inf)
    best[0] = 0.0
    taken = []
    for _, within in moves:
        table = np.repeat(best[None], 1 + sum(cost <= left for _, cost, _ in within), axis=0)
        for row, (_, cost, change) in zip(table[1:], within, strict=False):
            shift = -(-cost // unit)
            row[:shift] = np.inf
            row[shift:] = best[: max(0, len(best) - shift)] + change
        taken.append(table.argmin(axis=0).astype(np.int32))
        best = table.min(axis=0)
    place = int(best.argmin())
    for (number, within), choice in zip(reversed(moves), reversed(taken), strict=True):
        if choice[place]:
            chosen[number], cost, _ = within[choice[place] - 1]
            place -= -(-cost // unit)
