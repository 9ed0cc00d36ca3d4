"""Subsets by score: the easiest, those nearest to a value, and coverage-centric selection over strata.

Scores are (n,), one number a row; by convention the higher, the harder (EL2N, GraNd, forgetting events). Turn a score
that runs the other way (AUM, confidence) around by its sign. Every function returns rising row numbers; with labels
each class gives its budget, picked by the same rule within the class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import by_class, check_size

Indices = NDArray[np.int64]
KEPT, CUTOFF = (
    (0.1, 0.2, 0.3, 0.5),
    (0.3, 0.2, 0.1, 0.0),
)  # the paper's choices by kept share; none is needed from half on


def ccs(
    scores: ArrayLike,
    size: int,
    cutoff: float | None = None,
    strata: int = 50,
    labels: ArrayLike | None = None,
    seed: int = 0,
) -> Indices:
    """Coverage-centric selection (Zheng et al., arXiv:2210.15809): no hardest rows, the rest from every stratum alike.

    The hardest share β is dropped; the range of the other scores is cut into strata of equal width; from the smallest
    stratum to the largest each gives min(its rows, budget left / strata left) rows at random, so that what a small one
    can't give goes to the larger ones.

    Args:
        scores: (n,), the higher, the harder.
        size: Rows to keep.
        cutoff: β in [0, 1), the share of hardest rows (of each class) that is dropped, as far as enough rows stay.
            None follows the kept share: 0.3 up to 10 %, 0.2 at 20 %, 0.1 at 30 %, 0 from 50 % on, linear in between.
        strata: Number of strata.
        labels: (n,) classes; None takes all rows as one.
        seed: Of the random rows.

    Raises:
        SettingError: A size, cutoff or number of strata out of range, a cutoff that leaves too few rows, NaN, labels
            that don't match.

    Example:
        >>> ccs([0.0, 0.1, 0.2, 0.3, 0.9, 1.0], 2, cutoff=1 / 3, strata=2).size
        2
    """
    array = check_scores(scores)
    size = check_size(size, len(array))
    if cutoff is not None and not (0 <= cutoff < 1 and size <= len(array) - int(cutoff * len(array) + 1e-9)):
        raise SettingError(
            f"cutoff must lie in [0, 1) and leave at least the {size} rows to keep of {len(array)}, got {cutoff!r}."
        )
    if isinstance(strata, bool) or not isinstance(strata, int) or strata < 1:
        raise SettingError(f"strata must be a whole number from 1 on, got {strata!r}.")
    beta = float(np.interp(size / len(array), KEPT, CUTOFF)) if cutoff is None else cutoff
    generator = np.random.default_rng(seed)

    def pick(rows: Indices, budget: int) -> Indices:
        dropped = min(int(beta * len(rows) + 1e-9), len(rows) - budget)
        easy = np.argsort(array[rows], kind="stable")[: len(rows) - dropped]
        number = stratum_numbers(array[rows[easy]], strata)
        shares = fill_up(np.bincount(number, minlength=strata), budget)
        drawn = [
            generator.choice(easy[number == stratum], share, replace=False)
            for stratum, share in enumerate(shares.tolist())
            if share
        ]
        return np.concatenate(drawn)

    return by_class(len(array), size, labels, pick)


def stratum_numbers(scores: NDArray[np.float64], strata: int) -> Indices:
    """(n,) number of each score's stratum, of `strata` equally wide ones from the smallest score to the largest.

    Example:
        >>> stratum_numbers(np.array([0.0, 0.4, 0.5, 1.0]), 2).tolist()
        [0, 0, 1, 1]
    """
    low, width = scores.min(), (scores.max() - scores.min()) / strata
    if width == 0:
        return np.zeros(len(scores), dtype=np.int64)
    return np.minimum((scores - low) / width, strata - 1).astype(np.int64)


def fill_up(counts: ArrayLike, size: int) -> Indices:
    """The same for each stratum, as far as it has it: from the smallest to the largest min(count, left / strata left).

    Args:
        counts: (strata,) rows of each.
        size: Rows to hand out, at most the sum of the counts.

    Returns:
        (strata,) rows, none above its count; their sum is `size`.

    Example:
        >>> fill_up([1, 10, 4], 9).tolist()
        [1, 4, 4]
    """
    counts = np.asarray(counts, dtype=np.int64)
    shares, left = np.zeros_like(counts), size
    for done, stratum in enumerate(np.argsort(counts, kind="stable").tolist()):
        shares[stratum] = min(int(counts[stratum]), left // (len(counts) - done))
        left -= int(shares[stratum])
    return shares


def easiest(scores: ArrayLike, size: int, labels: ArrayLike | None = None) -> Indices:
    """The rows of the lowest scores; the earlier of equal ones.

    Args:
        scores: (n,), the higher, the harder.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.

    Raises:
        SettingError: A size out of range, NaN, labels that don't match.

    Example:
        >>> easiest([0.1, 0.9, 0.5], 2).tolist()
        [0, 2]
    """
    array = check_scores(scores)
    return by_class(len(array), size, labels, lambda rows, budget: np.argsort(array[rows], kind="stable")[:budget])


def closest_to(
    scores: ArrayLike, size: int, value: float | None = None, labels: ArrayLike | None = None, seed: int = 0
) -> Indices:
    """The rows whose score lies nearest to a value: for H-scores (arXiv:2407.08887) neither always right nor never.

    Scores that count runs have few values; which of the equally near rows are kept is drawn at random.

    Args:
        scores: (n,).
        size: Rows to keep.
        value: The value; None is the middle between the lowest and the highest score.
        labels: (n,) classes; None takes all rows as one.
        seed: Of the draw among equally near rows.

    Raises:
        SettingError: As for `easiest`, or a value that is no number.

    Example:
        >>> closest_to([0.0, 0.5, 1.0, 0.6], 2).tolist()
        [1, 3]
    """
    array = check_scores(scores)
    middle = (array.min() + array.max()) / 2 if value is None else float(value)
    if not np.isfinite(middle):
        raise SettingError(f"value must be a finite number, got {value!r}.")
    distances, ties = np.abs(array - middle), np.random.default_rng(seed).random(len(array))
    return by_class(len(array), size, labels, lambda rows, budget: np.lexsort((ties[rows], distances[rows]))[:budget])


def check_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """The scores as float64, if they are one finite number for each row.

    Raises:
        SettingError: Another shape, no numbers, NaN or infinity.
    """
    array = np.asarray(scores)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "biuf":
        raise SettingError(f"scores must be one number for each row, got {array.dtype} of shape {array.shape}.")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise SettingError(
            f"The scores of {len(bad)} rows are NaN or infinite, the first of row {bad[0]}. Score them again."
        )
    return array
