"""Rows of an embedding array read block by block, so that a memory map of any length takes bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.terminal import progress

Floats = NDArray[np.float32]
BLOCK_NUMBERS = 2**22  # float32 numbers of one block, 16 MB: near the processor's cache, large enough for BLAS


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an embedding array; each block is made float32, scaled and shifted when it is read.

    Attributes:
        embeddings: (n, d) real numbers, in memory or memory-mapped.
        positions: (m,) rising row numbers; None is all rows.
        normalize: Whether each row is divided by its Euclidean length (rows of zeros stay).
        shift: (d,) vector subtracted after that; 0 is no shift.
    """

    embeddings: NDArray[Any]
    positions: NDArray[np.int64] | None = None
    normalize: bool = False
    shift: Floats | float = 0.0

    def __len__(self) -> int:
        return len(self.embeddings) if self.positions is None else len(self.positions)

    def only(self, positions: NDArray[np.int64]) -> Rows:
        """The rows at these positions of this view."""
        rows = positions if self.positions is None else self.positions[positions]
        return dataclasses.replace(self, positions=rows)

    def take(self, positions: NDArray[np.int64]) -> Floats:
        """(len(positions), d) rows, in memory."""
        rows = positions if self.positions is None else self.positions[positions]
        return self._prepared(self.embeddings[rows])

    def blocks(self, columns: int = 1) -> Iterator[tuple[slice, Floats]]:
        """(where, rows) of the whole view in order; a block has room for `columns` numbers beside each row."""
        length = max(1, BLOCK_NUMBERS // max(1, columns, self.embeddings.shape[1]))
        for start in range(0, len(self), length):
            where = slice(start, min(start + length, len(self)))
            rows = where if self.positions is None else self.positions[where]
            yield where, self._prepared(self.embeddings[rows])

    def mean(self) -> NDArray[np.float64]:
        """(d,) mean of the rows.

        Raises:
            SettingError: A number is NaN or infinite.
        """
        total = np.zeros(self.embeddings.shape[1])
        for where, block in self.blocks():
            with np.errstate(invalid="ignore"):  # inf − inf is NaN, which is what is looked for
                part = block.sum(axis=0, dtype=np.float64)
            if not np.isfinite(part).all():
                raise SettingError(_first_bad(self, where, block))
            total += part
        return total / len(self)

    def centred(self) -> Rows:
        """The rows less their mean: small numbers, whose squared distances keep their digits in float32."""
        return dataclasses.replace(self, shift=self.mean().astype(np.float32))

    def squared_lengths(self) -> Floats:
        """(m,) squared Euclidean length of each row."""
        lengths = np.empty(len(self), dtype=np.float32)
        for where, block in self.blocks():
            lengths[where] = squared_lengths(block)
        return lengths

    def _prepared(self, block: NDArray[Any]) -> Floats:
        floats = np.asarray(block, dtype=np.float32)
        if self.normalize:
            floats = unit_length(floats)
        return floats - self.shift if np.any(self.shift) else floats


def nearest(rows: Rows, centres: Floats, description: str = "") -> tuple[NDArray[np.int64], Floats]:
    """The nearest centre of each row: argmin and min over c of ‖x − c‖² = ‖x‖² + ‖c‖² − 2 x·c.

    Args:
        rows: m rows; centre them first, for the digits.
        centres: (k, d) points in the same coordinates.
        description: Title of the progress bar; without one there is no bar.

    Returns:
        (m,) number of the centre, and (m,) squared distance, not below 0.
    """
    index, squared = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    doubled, lengths = np.ascontiguousarray(-2 * centres.T), squared_lengths(centres)
    blocks = rows.blocks(len(centres))
    for where, block in progress(blocks, description) if description else blocks:
        scores = block @ doubled
        scores += lengths
        index[where] = best = scores.argmin(axis=1)
        squared[where] = scores[np.arange(len(best)), best] + squared_lengths(block)
    return index, np.maximum(squared, 0, out=squared)


def squared_distances(vectors: Floats, point: Floats) -> Floats:
    """(m,) ‖x − p‖² of vectors (m, d) in memory to one point (d,)."""
    squared = vectors @ (-2 * point) + squared_lengths(vectors) + point @ point
    return np.maximum(squared, 0, out=squared)


def squared_lengths(vectors: Floats) -> Floats:
    """(m,) ‖x‖² of vectors (m, d)."""
    return np.einsum("ij,ij->i", vectors, vectors)


def unit_length(vectors: Floats) -> Floats:
    """Vectors (m, d) divided by their Euclidean lengths; zeros stay zeros."""
    lengths = np.sqrt(squared_lengths(vectors))[:, None]
    lengths[lengths == 0] = 1
    with np.errstate(invalid="ignore"):  # infinite rows become NaN, which `Rows.mean` refuses
        return np.divide(vectors, lengths, dtype=np.float32)


def check_embeddings(embeddings: Any, n: int | None = None) -> NDArray[Any]:
    """The embeddings as an array that is not copied, if they are real numbers of shape (n, d).

    Raises:
        SettingError: Another shape, kind or count. NaN is found later, when the rows are read.
    """
    array = np.asanyarray(embeddings)
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise SettingError(
            f"embeddings must be real numbers of shape (rows, dimensions), got {array.dtype} of shape {array.shape}."
        )
    if n is not None and len(array) != n:
        raise SettingError(f"embeddings must have one row for each of the {n} labels or texts, got {len(array)}.")
    return array


def _first_bad(rows: Rows, where: slice, block: Floats) -> str:
    position = where.start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
    number = position if rows.positions is None else int(rows.positions[position])
    return f"The embedding of row {number} holds NaN or infinity. Embed that row again, or leave it out."
