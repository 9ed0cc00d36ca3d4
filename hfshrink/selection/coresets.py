"""Subsets of embeddings that stand for the whole: k-means, herding, k-center, facility location, moderate.

Every function takes embeddings (n, d), in memory or memory-mapped, and the size of the subset, and returns rising row
numbers. With labels each class is worked on alone and gives its budget. No n × n matrix is made anywhere: the rows are
read in blocks, and memory beside them stays below about 0.3 GB for a million rows of 384 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.blockwise import Rows, check_embeddings
from hfshrink.selection.budgets import by_class, check_labels, check_size, share_out
from hfshrink.selection.centroids import find_clusters
from hfshrink.selection.greedy import best_facilities, farthest_first, herd, inliers
from hfshrink.terminal import progress

Indices = NDArray[np.int64]
MOST_CENTROIDS = 2_000  # up to here one centroid for each kept row is affordable
HERD = 20_000  # rows that are herded together


def kmeans_subset(
    embeddings: Any,
    size: int,
    labels: ArrayLike | None = None,
    clusters: int | None = None,
    seed: int = 0,
    *,
    normalize: bool = False,
) -> Indices:
    """The rows nearest to the centroids of k-means (the selection of DiLM's "k-centers", arXiv:2404.00264).

    Each cluster gives rows in proportion to its own, at least one where the size allows, the nearest to the centroid.

    Args:
        embeddings: (n, d) real numbers.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.
        clusters: Centroids of each class. None takes as many as rows are kept (one row of each cluster) up to a size
            of 2,000, above that √(rows of the class).
        seed: Of the first centroids.
        normalize: Whether rows are scaled to length 1 first, so that distance means angle.

    Raises:
        SettingError: A size or number of clusters out of range, arrays that don't match, fewer rows than classes, NaN.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> points = np.array([[0.0], [1.0], [2.0], [9.0], [10.0], [11.0]], dtype=np.float32)
        >>> kmeans_subset(points, 2).tolist()
        [1, 4]
    """
    if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
        raise SettingError(f"clusters must be a whole number from 1 on, got {clusters!r}.")

    def pick(rows: Rows, budget: int) -> Indices:
        k = clusters or (budget if size <= MOST_CENTROIDS else max(1, math.isqrt(len(rows))))
        found = find_clusters(rows, min(k, len(rows)), seed)
        shares = share_out(found.counts, budget, int(budget >= np.count_nonzero(found.counts)))
        order = np.lexsort((found.squared, found.index))  # by cluster, nearest first
        starts = np.cumsum(found.counts) - found.counts
        ranks = np.arange(len(rows)) - starts[found.index[order]]
        return order[ranks < shares[found.index[order]]]

    return _by_class(embeddings, size, labels, normalize, pick)


def herding(
    embeddings: Any, size: int, labels: ArrayLike | None = None, seed: int = 0, *, normalize: bool = False
) -> Indices:
    """Greedy matching of the mean: x_k = argmin_x ‖μ − (x + Σ_{j<k} x_j) / k‖ (iCaRL, arXiv:1611.07725).

    A class of more than 20,000 rows is split at random into herds of about as many, each drawn towards the mean of the
    whole class: the cost then grows with the size alone and not with rows × size.

    Args:
        embeddings: (n, d) real numbers.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.
        seed: Of the split into herds; without a split it changes nothing.
        normalize: Whether rows are scaled to length 1 first.

    Raises:
        SettingError: As for `kmeans_subset`.

    Example:
        >>> herding(np.array([[0.0], [4.0], [5.0], [6.0], [15.0]], dtype=np.float32), 1).tolist()  # the mean is 6
        [3]
    """

    def pick(rows: Rows, budget: int) -> Indices:
        centred = rows.centred()
        shuffled = np.random.default_rng(seed).permutation(len(rows))
        parts = [np.sort(part) for part in np.array_split(shuffled, math.ceil(len(rows) / HERD))]
        shares = share_out([len(part) for part in parts], budget)
        steps = (
            part[row]
            for part, share in zip(parts, shares.tolist(), strict=True)
            for row in islice(herd(centred.take(part)), share)
        )
        return _collect(steps, budget, "herding")

    return _by_class(embeddings, size, labels, normalize, pick)


def k_center(
    embeddings: Any,
    size: int,
    labels: ArrayLike | None = None,
    *,
    outliers: float = 0.0,
    seed: int = 0,
    normalize: bool = False,
) -> Indices:
    """Farthest-first traversal: each new row is the one farthest from all chosen (Gonzalez 1985; arXiv:1708.00489).

    Its radius max_x min_c ‖x − c‖ is at most twice the least possible. The first row is the one nearest to the mean.
    It runs after outliers, which are farthest by nature: `outliers` leaves some out first.

    Args:
        embeddings: (n, d) real numbers.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.
        outliers: Share in [0, 1) of each class left out: the rows whose five nearest among 1,000 random rows are
            farthest away.
        seed: Of these 1,000 rows; without outliers it changes nothing.
        normalize: Whether rows are scaled to length 1 first.

    Raises:
        SettingError: As for `kmeans_subset`, or a share of outliers out of range.

    Example:
        >>> k_center(np.array([[0.0], [1.0], [2.0], [3.0], [10.0]], dtype=np.float32), 2).tolist()
        [3, 4]
    """
    if not 0 <= outliers < 1:
        raise SettingError(f"outliers must be a share in [0, 1) of the rows, got {outliers!r}.")

    def pick(rows: Rows, budget: int) -> Indices:
        centred = rows.centred()
        dropped = min(int(outliers * len(rows) + 1e-9), len(rows) - budget)
        kept = np.arange(len(rows)) if dropped == 0 else inliers(centred, len(rows) - dropped, seed)
        return kept[_collect(farthest_first(centred.only(kept)), budget, "k-center")]

    return _by_class(embeddings, size, labels, normalize, pick)


def facility_location(
    embeddings: Any, size: int, labels: ArrayLike | None = None, *, references: int = 10_000, seed: int = 0
) -> Indices:
    """Greedy maximum of f(S) = Σ_i max_{j∈S} (1 + cos(x_i, x_j)): each row has a kept row like itself.

    Within 1 − 1/e of the best (Nemhauser 1978). Gains only fall as S grows, so that old gains are upper bounds and
    few are computed anew (lazy greedy, Minoux 1978): the answer is that of plain greedy.

    Ties are common late (two rows that are each other's nearest gain the same); the last digit decides them.

    Args:
        embeddings: (n, d) real numbers; only their direction counts.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.
        references: Rows i that the sum runs over. A class with more rows is judged by so many random ones of it; each
            of its rows can still be chosen. Cost of one round over all rows: n × references × d.
        seed: Of the draw of references.

    Raises:
        SettingError: As for `kmeans_subset`.

    Example:
        >>> points = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], dtype=np.float32)
        >>> facility_location(points, 2).tolist()
        [0, 3]
    """
    if not isinstance(references, int) or references < 1:
        raise SettingError(f"references must be a whole number from 1 on, got {references!r}.")

    def pick(rows: Rows, budget: int) -> Indices:
        rows.mean()  # refuses NaN
        count = min(len(rows), references)
        sample = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False, shuffle=False))
        return _collect(best_facilities(rows, rows.take(sample)), budget, "facility location")

    return _by_class(embeddings, size, labels, True, pick)


def moderate(embeddings: Any, size: int, labels: ArrayLike | None = None, *, normalize: bool = False) -> Indices:
    """The rows whose distance from the mean of their class is nearest to its median (Xia et al., ICLR 2023).

    Neither the easiest rows, at the centre, nor the hardest, at the rim.

    Args:
        embeddings: (n, d) real numbers.
        size: Rows to keep.
        labels: (n,) classes; None takes all rows as one.
        normalize: Whether rows are scaled to length 1 first.

    Raises:
        SettingError: As for `kmeans_subset`.

    Example:
        >>> moderate(np.array([[-4.0], [-2.0], [0.0], [1.0], [5.0]], dtype=np.float32), 1).tolist()
        [1]
    """

    def pick(rows: Rows, budget: int) -> Indices:
        distances = np.sqrt(rows.centred().squared_lengths())
        return np.argsort(np.abs(distances - np.median(distances)), kind="stable")[:budget]

    return _by_class(embeddings, size, labels, normalize, pick)


def _by_class(
    embeddings: Any, size: int, labels: ArrayLike | None, normalize: bool, pick: Callable[[Rows, int], Indices]
) -> Indices:
    array = check_embeddings(embeddings)
    size = check_size(size, len(array))
    labels = None if labels is None else check_labels(labels, len(array))
    everything = Rows(array, None, normalize)
    alone = labels is None
    return by_class(
        len(array), size, labels, lambda rows, budget: pick(everything if alone else everything.only(rows), budget)
    )


def _collect(steps: Iterator[int], size: int, description: str) -> Indices:
    """The first `size` rows that a greedy search names, under a progress bar."""
    return np.fromiter(progress(islice(steps, size), description, size), np.int64, size)
