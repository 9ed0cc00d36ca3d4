"""The dangers of training on a subset, shown: which groups of rows it loses or thins out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.data import read_dataset
from hfshrink.errors import SettingError
from hfshrink.labels import find_label_column
from hfshrink.selection.blockwise import check_embeddings
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.coverage_table import (
    MOST_GROUPS,
    Coverage,
    GroupShare,
    PartitionCoverage,
    Radius,
    Thresholds,
)
from hfshrink.selection.group_measures import (
    chance_of_at_most,
    chi_squared,
    expected_variation,
    nearest_distances,
    total_variation,
)
from hfshrink.selection.partitions import (
    Partition,
    cross,
    divide_by_cluster,
    divide_by_column,
    divide_by_label,
    divide_by_length,
)

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = 10**9  # full × kept rows whose distances are computed; above that a sample of the full rows is measured
NAMED = 5  # groups that a warning names


def coverage(  # noqa: PLR0913
    dataset: Any,
    indices: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    embeddings: Any | None = None,
    columns: Sequence[str] = (),
    length_buckets: int = 4,
    clusters: int = 20,
    text_columns: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    seed: int = 0,
) -> Coverage:
    """What a subset keeps of each group of rows, and how far its distribution is from that of all rows.

    The rows are divided by label, by length, by each metadata column and by k-means cluster; then by the label with
    each of the others, and by all together. Each group's kept share is held against the overall fraction, each
    partition by total variation and χ², the whole by the distance from every row to its nearest kept row
    (k-center's radius, arXiv:1708.00489). All of it stands beside what a random subset of the same size would do.

    Args:
        dataset: The full data, a `datasets.Dataset`.
        indices: The kept rows.
        labels: (n,) class numbers or names; None takes the data set's label column, if it has one label a row.
        embeddings: (n, d) real numbers; None leaves out clusters and distances.
        columns: Names of metadata columns, such as the source of a row.
        length_buckets: Number of length buckets; 0 leaves them out.
        clusters: Number of clusters; 0 leaves them out.
        text_columns: One or two names of columns of text; None finds them.
        thresholds: From where on to warn.
        seed: Of the clusters and of the random subset.

    Raises:
        SettingError: Row numbers that are not in the data set or come twice, arrays of another length, a column that
            makes no groups, NaN.
        MissingDependencyError: Several clusters, and scikit-learn is not installed.

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": ["x", "x", "y", "y"]})
        >>> found = coverage(data, [0, 1])
        >>> found.partitions[0].total_variation, [group.name for group in found.lost]
        (0.5, ['y'])
    """
    dataset, thresholds = read_dataset(dataset), thresholds or Thresholds()
    n = len(dataset)
    kept = _check_indices(indices, n)
    if embeddings is not None and len(check_embeddings(embeddings)) != n:
        raise SettingError(f"embeddings must have one row for each of the {n} rows, got {len(embeddings)}.")
    for name, value, least in (("length_buckets", length_buckets, 0), ("clusters", clusters, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name} must be a whole number from {least} on, got {value!r}.")
    margins, notes = _divide(dataset, labels, columns, length_buckets, text_columns)
    if embeddings is None:
        notes.append("clusters and distances: no embeddings were given.")
    elif clusters:
        margins.append(divide_by_cluster(embeddings, clusters, seed))
    keep = np.zeros(n, dtype=bool)
    keep[kept] = True
    parts, warnings = _judge_all(margins, keep, thresholds)
    radius = None if embeddings is None else _measure_radius(embeddings, kept, seed)
    warnings += _radius_warnings(radius, thresholds)
    return Coverage(n, len(kept), tuple(parts), radius, tuple(warnings), tuple(notes), thresholds, seed)


def _divide(
    dataset: Dataset,
    labels: ArrayLike | None,
    columns: Sequence[str],
    length_buckets: int,
    text_columns: Sequence[str] | None,
) -> tuple[list[Partition], list[str]]:
    """The partitions of single factors that need no embeddings, the label first; and what could not be divided by."""
    if isinstance(columns, str):
        columns = [columns]
    margins, notes = [], []
    label = divide_by_label(dataset, labels, max(1, length_buckets))
    if label is None:
        notes.append("labels: none were given, and no column has one label a row.")
    else:
        margins.append(label)
    others = [divide_by_column(dataset, column, max(1, length_buckets)) for column in dict.fromkeys(columns)]
    if length_buckets:
        skip = [*columns, *filter(None, [find_label_column(dataset)])]
        try:
            margins.append(divide_by_length(dataset, length_buckets, text_columns, skip))
        except SettingError as error:
            if text_columns is not None:
                raise
            notes.append(f"lengths: {error}")
    return margins + others, notes


def _judge_all(
    margins: Sequence[Partition], keep: NDArray[np.bool_], thresholds: Thresholds
) -> tuple[list[PartitionCoverage], list[str]]:
    """Every factor, the label with each other, and all together; with the warnings.

    A group of crossed factors is warned of only where no single factor's group was: the loss of a class loses its
    clusters too.
    """
    parts, warnings, flags = [], [], []
    for margin in margins:
        part, flagged, texts = _judge(margin, keep, thresholds, np.zeros(len(margin), dtype=bool))
        parts.append(part)
        flags.append(flagged)
        warnings += texts
    for chosen in _crosses(margins):
        crossed = cross(*(margins[factor] for factor in chosen))
        known = np.zeros(len(crossed), dtype=bool)
        for column, factor in enumerate(chosen):
            known |= flags[factor][crossed.keys[:, column]]
        part, _, texts = _judge(crossed, keep, thresholds, known)
        parts.append(part)
        warnings += texts
    return parts, warnings


def _crosses(margins: Sequence[Partition]) -> list[tuple[int, ...]]:
    """Positions of the factors to cross."""
    count = len(margins)
    pairs = [(0, other) for other in range(1, count)] if count and margins[0].by == "label" else []
    return pairs + [tuple(range(count))] * (count > 2 or (count == 2 and not pairs))


def _judge(
    partition: Partition, keep: NDArray[np.bool_], thresholds: Thresholds, known: NDArray[np.bool_]
) -> tuple[PartitionCoverage, NDArray[np.bool_], list[str]]:
    """The record of a partition, whether each group is lost or thinned out, and warnings of those not yet known."""
    n, size = len(keep), int(keep.sum())
    rows = np.bincount(partition.codes)
    kept = np.bincount(partition.codes[keep], minlength=len(rows))
    ratios = kept * n / (rows * size)
    chances = np.full(len(rows), np.nan)
    for group in np.flatnonzero((ratios < thresholds.least_ratio) | (kept == 0)):
        chances[group] = chance_of_at_most(int(kept[group]), int(rows[group]), size, n)
    order = np.arange(len(rows))
    if len(rows) > MOST_GROUPS:
        order = np.sort(np.lexsort((-rows, ratios))[:MOST_GROUPS])
    shares = tuple(
        GroupShare(partition.name(g), int(rows[g]), int(kept[g]), float(ratios[g]), _known_number(chances[g]))
        for g in order.tolist()
    )
    losing = np.array([chance_of_at_most(0, count, size, n) for count in rows.tolist()])
    part = _summary(partition, shares, (rows, kept), float(losing.sum()))
    large = rows >= (1 if partition.by == "label" else thresholds.min_rows)
    lost = large & (kept == 0)
    thin = large & (kept > 0) & (chances <= thresholds.significance / max(1, int(large.sum())))
    texts = [
        *_lost_warning(partition, np.flatnonzero(lost & ~known), rows, float(losing[large & ~known].sum())),
        *_thin_warning(part, partition, np.flatnonzero(thin & ~known), ratios),
    ]
    if part.total_variation > part.expected_variation + thresholds.largest_distance:
        texts.append(
            f"by {part.by}: {100 * part.total_variation:.1f} % of the subset would have to change groups to be "
            f"distributed as the full data (a random subset: {100 * part.expected_variation:.1f} %)."
        )
    return part, lost | thin, texts


def _summary(
    partition: Partition,
    shares: tuple[GroupShare, ...],
    counts: tuple[NDArray[np.int64], NDArray[np.int64]],
    expected_lost: float,
) -> PartitionCoverage:
    rows, kept = counts
    lost = kept == 0
    statistic, p_value = chi_squared(rows, kept)
    return PartitionCoverage(
        by=partition.by,
        factors=len(partition.parts),
        groups=shares,
        group_count=len(rows),
        lost_count=int(lost.sum()),
        lost_rows=int(rows[lost].sum()),
        expected_lost=expected_lost,
        total_variation=total_variation(rows, kept),
        expected_variation=expected_variation(rows, int(kept.sum())),
        chi_squared=statistic,
        p_value=p_value,
    )


def _lost_warning(
    partition: Partition, lost: NDArray[np.int64], rows: NDArray[np.int64], expected: float
) -> list[str]:
    """Of a single factor any lost group is told; of crossed ones, which are many, only more than chance loses."""
    if not len(lost) or (len(partition.parts) > 1 and len(lost) <= expected + 2 * expected**0.5):
        return []
    largest = lost[np.argsort(-rows[lost], kind="stable")]
    named = [f"{partition.name(group)} ({rows[group]:,} rows)" for group in largest[:NAMED].tolist()]
    return [
        f"by {partition.by}: {len(lost):,} of {len(partition):,} groups are lost: {_listed(named, len(lost))}. "
        f"A random subset loses {expected:.1f} of such groups on average."
    ]


def _thin_warning(
    part: PartitionCoverage, partition: Partition, thin: NDArray[np.int64], ratios: NDArray[np.float64]
) -> list[str]:
    if not len(thin):
        return []
    least = thin[np.argsort(ratios[thin], kind="stable")]
    named = [f"{partition.name(group)} ({ratios[group]:.2f} of its share)" for group in least[:NAMED].tolist()]
    return [
        f"by {part.by}: {len(thin):,} of {part.group_count:,} groups are kept far below their share, "
        f"and not by chance: {_listed(named, len(thin))}."
    ]


def _listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + f" and {count - len(names):,} more" * (count > len(names))


def _known_number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _measure_radius(embeddings: Any, kept: NDArray[np.int64], seed: int) -> Radius:
    array = check_embeddings(embeddings)
    n, size = len(array), len(kept)
    measured = min(n, max(1, PAIRS // size))
    # draws of their own: with the seed of the subset they would meet the rows that it kept
    positions = None if measured == n else random_subset(n, measured, seed + 10**6)
    ours = nearest_distances(array, kept, positions)
    theirs = nearest_distances(array, random_subset(n, size, seed + 2 * 10**6), positions, "coverage, random")
    means = (float(ours.mean(dtype=np.float64)), float(theirs.mean(dtype=np.float64)))
    return Radius(float(ours.max()), means[0], float(theirs.max()), means[1], measured)


def _radius_warnings(radius: Radius | None, thresholds: Thresholds) -> list[str]:
    if radius is None:
        return []
    pairs = {"mean": (radius.mean, radius.random_mean), "largest": (radius.largest, radius.random_largest)}
    return [
        f"embeddings: the {name} distance from a row to its nearest kept row is {ours:.3g}, "
        f"that of a random subset {theirs:.3g}."
        for name, (ours, theirs) in pairs.items()
        if ours > thresholds.largest_radius_ratio * theirs
    ]


def _check_indices(indices: ArrayLike, n: int) -> NDArray[np.int64]:
    """The kept rows, rising."""
    array = np.asarray(indices)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise SettingError(
            f"indices must be the numbers of the kept rows, at least one, got {array.dtype} of shape {array.shape}."
        )
    kept = np.unique(array.astype(np.int64))
    if kept[0] < 0 or kept[-1] >= n:
        raise SettingError(f"indices must lie in 0..{n - 1}, the rows of the full data, got {kept[0]}..{kept[-1]}.")
    if len(kept) < len(array):
        raise SettingError(f"indices must name each row once; {len(array) - len(kept)} of {len(array)} are repeated.")
    return kept
