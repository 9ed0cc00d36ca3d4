"""Rows that say the same: equal texts by hashing, then near-equal embeddings inside clusters (arXiv:2303.09540)."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.blockwise import BLOCK_NUMBERS, Floats, Rows, check_embeddings
from hfshrink.selection.centroids import find_clusters
from hfshrink.terminal import progress

Indices = NDArray[np.int64]
TOGETHER = 5_000  # rows that are compared pair by pair: so many fit one cluster


def find_duplicates(
    embeddings: Any | None = None,
    threshold: float | None = 0.95,
    texts: Sequence[str] | None = None,
    *,
    clusters: int | None = None,
    seed: int = 0,
) -> list[Indices]:
    """Groups of rows of which one is enough: equal texts first, then pairs with cos(x, y) > threshold.

    Near-duplicates are looked for inside k-means clusters, as in SemDeDup (arXiv:2303.09540). From each cluster's
    centre outwards every row that is still free is kept and takes the free rows above the threshold into its group: no
    chains, each dropped row is itself like the kept one. Pairs in different clusters are missed; up to 5,000 rows
    there is one cluster and none is.

    Args:
        embeddings: (n, d) real numbers, of any length; None compares texts alone.
        threshold: Cosine in (0, 1) above which two rows are the same; None compares texts alone.
        texts: (n,) texts; equal after Unicode NFKC, case folding and white space made alike counts as equal. None
            compares embeddings alone.
        clusters: Number of clusters; None takes one for each 5,000 rows.
        seed: Of the clusters.

    Returns:
        Groups of two rows or more, each (rows,): the one to keep first, the others rising; ordered by the kept row.

    Raises:
        SettingError: Neither embeddings nor texts, a threshold out of range, another number of texts, NaN.
        MissingDependencyError: Several clusters, and scikit-learn is not installed.

    Example:
        >>> points = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [0.0, 2.0]], dtype=np.float32)
        >>> [group.tolist() for group in find_duplicates(points, 0.99, ["a", "b", "c", " B "])]
        [[1, 3], [2, 0]]
    """
    if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
        raise SettingError(f"clusters must be a whole number from 1 on, got {clusters!r}.")
    _check_threshold(threshold)
    if embeddings is None or threshold is None:
        if texts is None:
            raise SettingError("Looking for duplicates needs embeddings and a threshold, or texts; got neither.")
        return _groups(_equal_texts(texts))
    array = check_embeddings(embeddings, None if texts is None else len(texts))
    leaders = np.arange(len(array)) if texts is None else _equal_texts(texts)
    alone = np.flatnonzero(leaders == np.arange(len(array)))
    k = min(clusters or math.ceil(len(alone) / TOGETHER), len(alone))
    taken = alone[_near_leaders(Rows(array, alone, normalize=True), threshold, k, seed)]
    return _groups(taken[np.searchsorted(alone, leaders)])


def without_duplicates(n: int, groups: Sequence[ArrayLike]) -> Indices:
    """The rows that stay when each group keeps its first row alone.

    Args:
        n: Rows of the data set.
        groups: As `find_duplicates` returns them.

    Returns:
        Rising row numbers.

    Example:
        >>> without_duplicates(4, [[0, 2], [3, 1]]).tolist()
        [0, 3]
    """
    kept = np.ones(n, dtype=bool)
    for group in groups:
        kept[np.asarray(group)[1:]] = False
    return np.flatnonzero(kept)


def find_overlap(
    embeddings: Any | None,
    others: Any | None,
    threshold: float | None = 0.95,
    texts: Sequence[str] | None = None,
    other_texts: Sequence[str] | None = None,
) -> Indices:
    """Rows of the training data that are also in another data set, such as the test rows: by text, then by cosine.

    Every pair is compared, n × m × d multiplications.

    Args:
        embeddings: (n, d) of the training rows; None compares texts alone.
        others: (m, d) of the other rows, from the same model.
        threshold: Cosine in (0, 1) above which two rows are the same; None compares texts alone.
        texts: (n,) texts of the training rows; None compares embeddings alone.
        other_texts: (m,) texts of the other rows.

    Returns:
        Rising row numbers of the training data.

    Raises:
        SettingError: Nothing to compare, a threshold out of range, widths that differ, NaN.

    Example:
        >>> find_overlap(None, None, texts=["Good film.", "bad"], other_texts=["good  film."]).tolist()
        [0]
    """
    _check_threshold(threshold)
    found = []
    if texts is not None and other_texts is not None:
        known = {_digest(text, row) for row, text in enumerate(other_texts)}
        found.append(np.flatnonzero([_digest(text, row) in known for row, text in enumerate(texts)]))
    if embeddings is not None and others is not None and threshold is not None:
        found.append(_near_others(check_embeddings(embeddings), check_embeddings(others), threshold))
    if not found:
        raise SettingError("Finding an overlap needs both sides' embeddings and a threshold, or both sides' texts.")
    return np.unique(np.concatenate(found))


def _near_others(embeddings: NDArray[Any], others: NDArray[Any], threshold: float) -> Indices:
    if embeddings.shape[1] != others.shape[1]:
        widths = f"{embeddings.shape[1]} and {others.shape[1]} numbers"
        raise SettingError(f"Both data sets must be embedded by the same model, got embeddings of {widths}.")
    left, right = Rows(embeddings, normalize=True), Rows(others, normalize=True)
    for side in (left, right):
        side.mean()  # refuses NaN
    near = np.zeros(len(left), dtype=bool)
    for _, other in right.blocks():
        for where, block in progress(left.blocks(len(other)), "overlap"):
            near[where] |= (block @ other.T > threshold).any(axis=1)
    return np.flatnonzero(near)


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold < 1:
        raise SettingError(f"threshold must be a cosine in (0, 1), got {threshold!r}. For equal texts pass None.")


def _digest(text: Any, row: int) -> bytes:
    if not isinstance(text, str):
        raise SettingError(f"texts must be strings, got {type(text).__name__} in row {row}: {str(text)[:60]!r}.")
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _equal_texts(texts: Sequence[str]) -> Indices:
    """(n,) the first row with the same normalised text; 16 bytes a row are held, not the texts."""
    digests = np.frombuffer(b"".join(_digest(text, row) for row, text in enumerate(texts)), dtype=np.uint64)
    digests = digests.reshape(-1, 2)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first row of equal ones comes first
    new = np.ones(len(order), dtype=bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    leaders = np.empty(len(order), dtype=np.int64)
    leaders[order] = order[new][np.cumsum(new) - 1]
    return leaders


def _near_leaders(rows: Rows, threshold: float, k: int, seed: int) -> Indices:
    """(m,) position of the row that stands for each row: itself, or a kept row of its cluster above the threshold."""
    found = find_clusters(rows, k, seed)
    order = np.lexsort((found.squared, found.index))  # by cluster, from the centre outwards
    leaders = np.arange(len(rows))
    ends = np.cumsum(found.counts)
    for start, end in progress(zip(ends - found.counts, ends, strict=True), "duplicates", k):
        members = order[start:end]
        for kept, like in _outwards(rows, members, threshold):
            leaders[members[like]] = members[kept]
    return leaders


def _outwards(rows: Rows, members: Indices, threshold: float) -> Iterator[tuple[int, Indices]]:
    """(kept, its duplicates), as positions in `members`, in their order; a taken row keeps nothing."""
    free = np.ones(len(members), dtype=bool)
    length = max(1, BLOCK_NUMBERS // max(len(members), rows.embeddings.shape[1]))
    for start in range(0, len(members), length):
        here = np.arange(start, min(start + length, len(members)))
        here = here[free[here]]
        if not len(here):
            continue
        like = _pairs(rows, members, rows.take(members[here]), threshold)
        for number, kept in enumerate(here.tolist()):
            if free[kept]:
                others = like[number]
                others = others[(others > kept) & free[others]]
                free[others] = False
                if len(others):
                    yield kept, others


def _pairs(rows: Rows, members: Indices, block: Floats, threshold: float) -> list[Indices]:
    """For each row of the block the positions in `members` of the rows above the threshold."""
    numbers, others = [], []
    for where, vectors in rows.only(members).blocks(len(block)):
        number, other = np.nonzero(block @ vectors.T > threshold)
        numbers.append(number)
        others.append(other + where.start)
    number = np.concatenate(numbers)
    order = np.argsort(number, kind="stable")
    return np.split(np.concatenate(others)[order], np.searchsorted(number[order], np.arange(1, len(block))))


def _groups(leaders: Indices) -> list[Indices]:
    """The groups of two rows or more, each with its leader first and the others rising."""
    rows = np.flatnonzero(np.bincount(leaders, minlength=1)[leaders] > 1)
    order = rows[np.lexsort((rows, leaders[rows] != rows, leaders[rows]))]
    parts = np.split(order, np.flatnonzero(np.diff(leaders[order])) + 1)
    return [part for part in parts if len(part)]  # without rows np.split gives one empty part
