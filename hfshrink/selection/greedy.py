"""The greedy searches behind the coresets, as generators: each names one row after the other, best first, no end.

Searches over all rows keep a pool: the most promising rows, in memory. As long as the best of the pool beats the
upper bound of every row outside, it is the best of all, and nothing else needs to be read. So the answer is that of
the plain search, in a fraction of the passes over the memory map.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hfshrink.selection.blockwise import Floats, Rows, nearest, squared_distances, squared_lengths

POOL_NUMBERS = 2**22  # float32 numbers of a pool, 16 MB
RECHECKED = 32  # stale candidates whose gain is computed anew together
LOCAL_SAMPLE, NEIGHBOURS = 1_000, 5  # how far a row lies outside: mean distance to 5 of 1,000 random rows


def herd(vectors: Floats) -> Iterator[int]:
    """Rows whose sum stays nearest to 0: argmin_x ‖s + x‖² = argmin_x 2 x·s + ‖x‖².

    Args:
        vectors: (m, d) rows less the mean that they shall match.
    """
    total, lengths = np.zeros(vectors.shape[1]), squared_lengths(vectors)
    while True:
        row = int(np.argmin(vectors @ (2 * total).astype(np.float32) + lengths))
        yield row
        total += vectors[row]
        lengths[row] = np.inf  # taken


def farthest_first(rows: Rows) -> Iterator[int]:
    """The row nearest to 0, then always the row farthest from all named before.

    Distances to the named rows only fall. So those of the last pass are upper bounds, and one pass over the rows
    serves all centres that the pool has given since.

    Args:
        rows: Rows less their mean.
    """
    fresh = [int(np.argmin(rows.squared_lengths()))]
    yield fresh[0]
    distances = np.full(len(rows), np.inf, dtype=np.float32)
    while True:
        distances = np.minimum(distances, nearest(rows, rows.take(np.sort(fresh)))[1])
        distances[fresh] = -1  # taken: even rows that repeat are named once each
        pool, limit = _largest(distances, POOL_NUMBERS // rows.embeddings.shape[1])
        vectors, near = rows.take(pool), distances[pool]
        fresh = []
        while not fresh or near.max() >= limit:
            best = int(near.argmax())
            fresh.append(int(pool[best]))
            yield fresh[-1]
            near = np.minimum(near, squared_distances(vectors, vectors[best]))
            near[best] = -1


def best_facilities(rows: Rows, references: Floats) -> Iterator[int]:
    """The row that adds most to Σ_i max_{j∈S} (1 + x_i·x_j), over and over.

    Args:
        rows: Rows of length 1.
        references: (m, d) rows i of the sum, of length 1.
    """
    gains, total = np.empty(len(rows)), references.sum(axis=0)
    for where, block in rows.blocks():
        gains[where] = len(references) + block @ total  # nothing is chosen yet: the sum of all similarities
    covered = np.zeros(len(references), dtype=np.float32)
    while True:
        pool, limit = _largest(gains, POOL_NUMBERS // len(references))
        similarities = 1 + rows.take(pool) @ references.T
        bounds = np.where(gains[pool] == -np.inf, -np.inf, _gains(similarities, covered))
        exact = np.ones(len(pool), dtype=bool)
        while bounds[best := int(bounds.argmax())] >= limit:
            if exact[best]:
                yield int(pool[best])
                covered = np.maximum(covered, similarities[best])
                bounds[best] = -np.inf  # taken
                exact[:] = False
            else:
                again, _ = _largest(np.where(exact, -np.inf, bounds), RECHECKED)
                again = again[~exact[again] & (bounds[again] > -np.inf)]
                bounds[again] = _gains(similarities[again], covered)
                exact[again] = True
        gains[pool] = bounds


def inliers(rows: Rows, count: int, seed: int) -> NDArray[np.int64]:
    """The `count` rows with the smallest mean distance to their five nearest of 1,000 random rows, rising.

    Args:
        rows: Rows less their mean.
        count: Rows to keep.
        seed: Of the draw of the 1,000.
    """
    size = min(LOCAL_SAMPLE, len(rows))
    sample = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False, shuffle=False))
    others, near = rows.take(sample), min(NEIGHBOURS, size - 1)
    doubled, lengths = np.ascontiguousarray(-2 * others.T), squared_lengths(others)
    means = np.zeros(len(rows))
    for where, block in rows.blocks(size):
        squared = np.maximum(block @ doubled + lengths + squared_lengths(block)[:, None], 0)
        own = np.flatnonzero((sample >= where.start) & (sample < where.stop))
        squared[sample[own] - where.start, own] = np.inf  # a row is no neighbour of itself
        means[where] = np.sqrt(np.partition(squared, near - 1, axis=1)[:, :near]).mean(axis=1)
    return np.sort(np.argsort(means, kind="stable")[:count])


def _gains(similarities: Floats, covered: Floats) -> Floats:
    """(candidates,) Σ_i max(0, s_ji − covered_i)."""
    return np.maximum(similarities - covered, 0).sum(axis=1)


def _largest(values: NDArray[np.floating], count: int) -> tuple[NDArray[np.int64], float]:
    """Rising positions of the `count` largest values, and the largest of the others (−∞ where there are none)."""
    count = max(1, count)
    if len(values) <= count:
        return np.arange(len(values)), -np.inf
    order = np.argpartition(values, len(values) - count)
    return np.sort(order[-count:]), float(values[order[:-count]].max())
