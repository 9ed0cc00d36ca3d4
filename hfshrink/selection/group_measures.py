"""How far the groups of a subset are from those of all rows, beside what chance alone would do. Pure functions."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.selection.blockwise import Rows, nearest
from hfshrink.terminal import progress

Counts = NDArray[np.int64]
CENTRES = 4096  # kept rows in memory at a time


def total_variation(rows: Counts, kept: Counts) -> float:
    """½ Σ_g |kept_g / Σ kept − rows_g / Σ rows|: the share of the subset that would have to change its group.

    Args:
        rows: (groups,) rows of all data.
        kept: (groups,) rows of the subset.

    Example:
        >>> total_variation(np.array([50, 50]), np.array([10, 0]))
        0.5
    """
    return float(np.abs(kept / kept.sum() - rows / rows.sum()).sum() / 2)


def expected_variation(rows: Counts, size: int) -> float:
    """Total variation that a random subset has on average: ½ Σ_g √(2 v_g / π), by the normal approximation.

    v_g = p_g (1 − p_g) (n − s) / (s (n − 1)), p_g = rows_g / n: the variance of a group's share among s rows drawn
    without replacement.

    Args:
        rows: (groups,) rows of all data, n together.
        size: Rows of the subset, s.
    """
    n = int(rows.sum())
    share = rows / n
    variances = share * (1 - share) * (n - size) / (size * max(1, n - 1))
    return float(np.sqrt(2 * variances / math.pi).sum() / 2)


def chi_squared(rows: Counts, kept: Counts) -> tuple[float, float | None]:
    """Pearson's test that being kept does not depend on the group: χ² = Σ_g (kept_g − f·rows_g)² / (f (1 − f) rows_g).

    With f = Σ kept / Σ rows, and as many degrees of freedom as groups, less one.

    Args:
        rows: (groups,) rows of all data.
        kept: (groups,) rows of the subset.

    Returns:
        χ² and its p-value. The latter is None where scipy is not installed, or where fewer than four groups in five
        have an expected count of 5 kept and 5 dropped rows (Cochran's rule): it would not hold.

    Example:
        >>> round(chi_squared(np.array([50, 50]), np.array([30, 20]))[0], 6)
        4.0
    """
    fraction = float(kept.sum() / rows.sum())
    if fraction == 1 or len(rows) == 1:
        return 0.0, 1.0
    statistic = float(((kept - fraction * rows) ** 2 / (fraction * (1 - fraction) * rows)).sum())
    enough = min(fraction, 1 - fraction) * rows >= 5
    if enough.mean() < 0.8 or importlib.util.find_spec("scipy") is None:
        return statistic, None
    from scipy.special import chdtrc

    return statistic, float(chdtrc(len(rows) - 1, statistic))


def chance_of_at_most(kept: int, rows: int, size: int, n: int) -> float:
    """P(K ≤ kept) that a random subset keeps so few of a group: K is hypergeometric.

    P(K = k) = C(rows, k) C(n − rows, size − k) / C(n, size), summed downwards from k = kept by the ratio of
    neighbours.

    Args:
        kept: Rows of the group in the subset.
        rows: Rows of the group.
        size: Rows of the subset.
        n: All rows.

    Example:
        >>> round(chance_of_at_most(0, 1, 1, 4), 6)
        0.75
    """
    if kept < max(0, size - (n - rows)):
        return 0.0
    if kept >= min(rows, size):
        return 1.0
    logarithm = _log_choose(rows, kept) + _log_choose(n - rows, size - kept) - _log_choose(n, size)
    term = total = math.exp(logarithm)
    while term > 1e-17 * total and kept > 0:
        term *= kept * (n - rows - size + kept) / ((rows - kept + 1) * (size - kept + 1))
        total += term
        kept -= 1
    return min(1.0, total)


def nearest_distances(
    embeddings: NDArray[Any], indices: Counts, positions: Counts | None = None, description: str = "coverage"
) -> NDArray[np.float32]:
    """Euclidean distance of rows to the nearest kept row, min_{k in indices} ‖x − x_k‖; 0 for the kept rows.

    The nearest is found by matrix products, m × s × d multiplications in blocks, its distance then computed directly,
    so that equal rows are at distance 0.

    Args:
        embeddings: (n, d) real numbers, in memory or memory-mapped.
        indices: (s,) the kept rows, rising.
        positions: (m,) the rows to measure, rising; None is all.
        description: Title of the progress bar.

    Returns:
        (m,) distances.

    Raises:
        SettingError: A number is NaN or infinite.

    Example:
        >>> nearest_distances(np.array([[0.0], [1.0], [5.0]]), np.array([0])).tolist()
        [0.0, 1.0, 5.0]
    """
    centred = Rows(embeddings).centred()
    view = centred if positions is None else centred.only(positions)
    best = np.zeros(len(view), dtype=np.int64)
    squared = np.full(len(view), np.inf, dtype=np.float32)
    for start in progress(range(0, len(indices), CENTRES), description):
        kept = indices[start : start + CENTRES]
        index, here = nearest(view, centred.take(kept))
        closer = here < squared
        best[closer], squared[closer] = kept[index[closer]], here[closer]
    own = np.arange(len(view)) if positions is None else positions
    best = np.where(np.isin(own, indices), own, best)
    distances = np.empty(len(view), dtype=np.float32)
    for where, block in view.blocks():
        distances[where] = np.linalg.norm(block - centred.take(best[where]), axis=1)
    return distances


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
