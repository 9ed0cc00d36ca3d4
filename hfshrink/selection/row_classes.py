"""The classes of a data set's rows, each with rows enough for what is learned of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.row_labels import read_labels

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of the rows.

    Attributes:
        column: The label column.
        values: (classes,) as the column holds them.
        numbers: (n,) position in `values` of each row's class.
        names: Of all classes of the column, in its order.
        places: (classes,) position in `names`.
        title: Name of the data set.
        notes: What the reader should know.
    """

    column: str
    values: NDArray[Any]
    numbers: NDArray[np.int64]
    names: list[str]
    places: list[int]
    title: str | None
    notes: list[str]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(classes,) rows of each."""
        return np.bincount(self.numbers)

    def members(self, sample: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
        """Row numbers of each class, or positions in a sample of rows."""
        numbers = self.numbers if sample is None else self.numbers[sample]
        return [np.flatnonzero(numbers == number) for number in range(len(self.values))]


def read_classes(rows: Dataset, per_class: int, label_column: str | None, title: str | None) -> Classes:
    """The classes that synthetic examples are learned for.

    Args:
        rows: The data set.
        per_class: Examples of each class.
        label_column: Name of the label column; None finds it.
        title: Name of the data set.

    Raises:
        SettingError: No column of labels, fewer than two classes, or a class with fewer rows than `per_class`.
    """
    notes: list[str] = []
    labels = read_labels(rows, "label" if label_column is None else label_column, label_column, notes)
    if labels.values is None or labels.column is None:
        raise SettingError(
            f"Synthetic examples are learned class by class, and found no column with one class a row among "
            f"{', '.join(rows.column_names)}. Name it with label_column=, or use select(…, 'kmeans')."
        )
    values, numbers = np.unique(labels.values, return_inverse=True)
    if values.dtype.kind == "i" and values[0] < 0:
        raise SettingError(f"Labels must be classes from 0 on, got {values[0]}. Leave rows without a label out.")
    if len(values) < 2:
        raise SettingError(f"Expected two classes or more in {labels.column!r}, got {values.tolist()}.")
    feature: Any = rows.features[labels.column]
    known = getattr(feature, "names", None)
    names = [str(value) for value in values.tolist()] if known is None else list(known)
    places = list(range(len(values))) if known is None else [int(value) for value in values]
    found = Classes(labels.column, values, numbers.astype(np.int64), names, places, title, notes)
    few = int(found.counts.argmin())
    if found.counts[few] < per_class:
        raise SettingError(
            f"per_class={per_class}, but the class {names[places[few]]!r} of {labels.column!r} has "
            f"{found.counts[few]} rows. Give a smaller per_class, or leave the class out."
        )
    return found
