"""Predictions by group of rows: the mean hides the group that a smaller model or a subset fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError
from hfshrink.evaluation.bootstrap import percentile_interval, resample_values
from hfshrink.evaluation.measures import Measure, share
from hfshrink.terminal import progress, table

SHOWN_GROUPS = 20  # rows of a printed table


@dataclass(frozen=True)
class GroupScore:
    """Mean score of one group, with its 95 % bootstrap interval."""

    name: str
    value: float
    low: float | None
    high: float | None
    rows: int


@dataclass(frozen=True)
class GroupScores:
    """Scores by group, the worst group first.

    Attributes:
        mean: Mean over all rows.
        groups: The groups with enough rows.
        small: Groups with fewer, name -> rows; they are in the mean alone.
        min_rows: How many are enough.
    """

    mean: float
    groups: tuple[GroupScore, ...]
    small: Mapping[str, int]
    min_rows: int

    @property
    def worst(self) -> GroupScore:
        """The group with the lowest mean. Of many groups the lowest is low by chance too: look at its interval."""
        return self.groups[0]

    @property
    def gap(self) -> float:
        """How far the worst group lies below the mean of all rows."""
        return self.mean - self.worst.value

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            (group.name, f"{group.rows:,}", f"{group.value:.4f} [{group.low:.4f}, {group.high:.4f}]")
            for group in self.groups[:SHOWN_GROUPS]
        ]
        small = (
            f"\n\n{len(self.small):,} groups of fewer than {self.min_rows} rows are left out." if self.small else ""
        )
        return table(("group", "rows", "mean [95 % interval]"), [*rows, ("all", "", f"{self.mean:.4f}")]) + small


def worst_group(
    correct_or_scores: ArrayLike, groups: ArrayLike, *, min_rows: int = 10, resamples: int = 1000, seed: int = 0
) -> GroupScores:
    """Mean of each group with its 95 % bootstrap interval, the worst group first.

    Args:
        correct_or_scores: (n,) whether each prediction is right, or a score of which more is better.
        groups: (n,) name or number of each row's group, such as `Partition.row_names()`.
        min_rows: Groups with fewer rows are not judged.
        resamples: Number of bootstrap samples of each group's rows.
        seed: Their seed.

    Raises:
        SettingError: No rows, arrays of different lengths, NaN, or no group that is large enough.

    Example:
        >>> found = worst_group([True] * 9 + [False] * 3, ["a"] * 8 + ["b"] * 4, min_rows=2)
        >>> found.worst.name, found.worst.value, found.mean
        ('b', 0.25, 0.75)
    """
    scores = _check_scores(correct_or_scores)
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    if np.shape(groups) != scores.shape:
        raise SettingError(f"groups must be one for each of the {len(scores)} scores, got shape {np.shape(groups)}.")
    counts = np.bincount(codes)
    if not isinstance(min_rows, int) or min_rows < 1 or counts.max() < min_rows:
        raise SettingError(
            f"min_rows must be a whole number in 1..{counts.max()}, the rows of the largest of {len(names)} groups, "
            f"got {min_rows!r}."
        )
    measure = Measure("mean", ("mean",), _with_count, lambda sums: {"mean": share(sums)})
    found = []
    for code in progress(np.flatnonzero(counts >= min_rows).tolist(), "groups"):
        values = scores[codes == code]
        drawn = resample_values(measure, values, values, key="mean", resamples=resamples, seed=seed)
        low, high = percentile_interval(drawn)
        found.append(GroupScore(str(names[code]), float(values.mean()), low, high, len(values)))
    small = {str(names[code]): int(counts[code]) for code in np.flatnonzero(counts < min_rows)}
    found.sort(key=lambda group: (group.value, -group.rows))
    return GroupScores(float(scores.mean()), tuple(found), small, min_rows)


def _check_scores(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "biuf":
        raise SettingError(
            "Scores must be one number or truth value for each row, at least one, "
            f"got {array.dtype} of shape {array.shape}."
        )
    scores = array.astype(np.float64)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise SettingError(f"The score of row {row} is {scores[row]}. Leave such rows out, or score them again.")
    return scores


def _with_count(values: Any, _: Any) -> NDArray[np.float64]:
    """(value, 1) of each row: the sums of a mean."""
    return np.stack([values, np.ones(len(values))], axis=1)
