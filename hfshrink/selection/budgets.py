"""How many rows each class gives, and the random subsets that every other method is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError


def class_budgets(labels: ArrayLike, size: int, minimum: int = 1) -> dict[Any, int]:
    """Rows that each class keeps: in proportion to its rows, rounded by largest remainder, never less than `minimum`.

    Args:
        labels: (n,) class numbers or names.
        size: Rows to keep of all classes together.
        minimum: Rows that each class keeps at least; a class with fewer rows keeps all of them.

    Returns:
        label -> rows to keep, in the order of the labels; the values add up to `size`.

    Raises:
        SettingError: Labels that are no classes, or a size that can't give every class its minimum.

    Example:
        >>> class_budgets([0] * 6 + [1] * 3 + [2], 5)
        {0: 3, 1: 1, 2: 1}
    """
    classes, counts = np.unique(check_labels(labels), return_counts=True)
    size = check_size(size, int(counts.sum()))
    needed = int(np.minimum(counts, minimum).sum())
    if size < needed:
        raise SettingError(
            f"size must be at least {needed}, so that each of the {len(classes)} classes keeps "
            f"{'an example' if minimum == 1 else f'{minimum} examples'}, got {size}. "
            "Keep more rows, or select without labels."
        )
    return dict(zip(classes.tolist(), share_out(counts, size, minimum).tolist(), strict=True))


def budgets_left(labels: ArrayLike, left: ArrayLike, size: int) -> dict[Any, int]:
    """Rows that each class keeps when some rows have left already: in proportion to all of its rows, as far as it can.

    Args:
        labels: (n,) classes of all rows.
        left: Row numbers that may be kept.
        size: Rows to keep of those.

    Returns:
        label -> rows to keep, none above those that are left; the values add up to `size`.

    Raises:
        SettingError: Labels that are no classes, or more rows asked for than are left.

    Example:
        >>> budgets_left([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4], 4), budgets_left([0, 0, 0, 1, 1, 1], [0, 1, 2, 3], 4)
        ({0: 2, 1: 2}, {0: 3, 1: 1})
    """
    labels = check_labels(labels)
    classes, counts = np.unique(labels, return_counts=True)
    check_size(size, len(np.asarray(left)))
    room = np.array([(labels[np.asarray(left)] == name).sum() for name in classes])
    full = room == 0
    while True:
        shares = room.copy()
        shares[~full] = share_out(counts[~full], size - int(room[full].sum()), minimum=1)
        over = shares > room
        if not over.any():
            return dict(zip(classes.tolist(), shares.tolist(), strict=True))
        full |= over


def share_out(counts: ArrayLike, size: int, minimum: int = 0) -> NDArray[np.int64]:
    """Divide `size` among groups in proportion to their counts: the method of largest remainders (Hamilton's).

    A group whose proportional share lies below the minimum gets the minimum (or all that it has), and the others share
    the rest. Of equal remainders the larger group is served first, then the earlier one.

    Args:
        counts: (groups,) rows of each group.
        size: Rows to hand out, at most the sum of the counts and at least what the minimum asks for.
        minimum: Rows of each group that has so many.

    Returns:
        (groups,) rows, none above its count; their sum is `size`.

    Example:
        >>> share_out([6, 3, 1], 5).tolist()
        [3, 2, 0]
    """
    counts = np.asarray(counts, dtype=np.int64)
    floor = np.minimum(counts, minimum)
    raised = np.zeros(len(counts), dtype=bool)
    while True:
        left, total = size - floor[raised].sum(), max(1, counts[~raised].sum())
        low = ~raised & (left * counts < floor * total)
        if not low.any():
            break
        raised |= low
    shares = np.where(raised, floor, left * counts // total)
    remainders = np.where(raised, -1, left * counts % total)
    order = np.lexsort((-counts, -remainders))
    shares[order[: size - shares.sum()]] += 1
    return shares


def random_subset(n: int, size: int, seed: int = 0, labels: ArrayLike | None = None) -> NDArray[np.int64]:
    """Rows drawn with equal chances without replacement; with labels each class gives its budget.

    Args:
        n: Rows to draw from.
        size: Rows to draw.
        seed: Of the draw.
        labels: (n,) class numbers or names; None draws from all rows alike.

    Returns:
        (size,) rising row numbers.

    Raises:
        SettingError: A size outside 1..n, labels of another length, or fewer rows than classes.

    Example:
        >>> random_subset(6, 2, labels=[0, 0, 0, 1, 1, 1]).size
        2
    """
    generator = np.random.default_rng(seed)
    return by_class(
        n,
        size,
        labels,
        lambda rows, budget: np.sort(generator.choice(len(rows), budget, replace=False, shuffle=False)),
    )


def by_class(
    n: int,
    size: int,
    labels: ArrayLike | None,
    pick: Callable[[NDArray[np.int64], int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Run one method on each class with its budget, or on all rows where there are no labels.

    Args:
        n: Rows of the data set.
        size: Rows to keep.
        labels: (n,) class numbers or names, or None.
        pick: `pick(rows, budget)` gives positions within `rows`, as many as the budget, each once. It is not asked
            for classes that keep all of their rows.

    Returns:
        (size,) rising row numbers.

    Raises:
        SettingError: As for `random_subset`.
    """
    size = check_size(size, n)
    if labels is None:
        groups = [(np.arange(n), size)]
    else:
        labels = check_labels(labels, n)
        groups = [(np.flatnonzero(labels == label), budget) for label, budget in class_budgets(labels, size).items()]
    kept = [rows if budget == len(rows) else rows[pick(rows, budget)] for rows, budget in groups]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def check_size(size: int, n: int) -> int:
    """The size, if it lies in 1..n.

    Raises:
        SettingError: It does not, or is not a whole number.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= n:
        raise SettingError(f"size must be a whole number in 1..{n}, the rows that there are, got {size!r}.")
    return int(size)


def check_labels(labels: ArrayLike, n: int | None = None) -> NDArray[Any]:
    """The labels as an array, if they are one class for each row.

    Raises:
        SettingError: Several labels a row, real numbers, a missing label, or another count than `n`.
    """
    if any(label is None for label in np.asarray(labels, dtype=object).flat):
        raise SettingError("A label is missing (None). Filter such rows out, or select without labels.")
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "biuU":
        raise SettingError(
            f"labels must be one class number or name for each row, got {array.dtype} of shape {array.shape}. "
            "For targets that are real numbers or lists select without labels."
        )
    if n is not None and len(array) != n:
        raise SettingError(f"labels must be as many as the rows ({n}), got {len(array)}.")
    return array
