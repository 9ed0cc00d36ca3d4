"""The labels of a data set's rows, and the groups that each give their share of a subset."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED, find_label_column
from hfshrink.selection.budgets import check_labels

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MOST_TAGS = 500  # distinct labels of lists that can be tags; more are a vocabulary


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of the rows and the groups that each give their share.

    Attributes:
        column: Name of the label column; None without.
        values: (n,) classes; None where rows have several or none.
        strata_column: Name of what is stratified by; None without.
        strata: (n,) groups that each give their share; None takes all rows alike.
    """

    column: str | None = None
    values: NDArray[Any] | None = None
    strata_column: str | None = None
    strata: NDArray[Any] | None = None

    @property
    def can_be_learnt(self) -> bool:
        """Whether there are classes that a probe can learn: two or more, one a row."""
        return self.values is not None and len(np.unique(self.values)) > 1


def read_labels(rows: Dataset, stratify: str | None, label_column: str | None, notes: list[str]) -> Labels:
    """The classes of the rows and the groups that they are stratified by.

    Rows with a list of tags are put into the group of their rarest tag, so that no tag is lost.

    Args:
        rows: The data set.
        stratify: A column; "label" is the label column whatever its name, None no groups.
        label_column: Name of the label column; None finds it.
        notes: Gets what the reader should know.

    Raises:
        SettingError: A named column is missing, or has no classes; a label is missing.
    """
    column = find_label_column(rows, label_column)
    values = None if column is None else _classes(rows, column)
    if stratify is None:
        return Labels(column, values)
    if stratify == "label" and (column is not None or "label" not in rows.column_names):
        if column is None:
            notes.append("No label column was found: all rows were taken alike.")
            return Labels()
        strata = values if values is not None else _rarest_tags(rows, column)
        if strata is None:
            notes.append(f"The column {column!r} has no classes: all rows were taken alike.")
            return Labels(column)
    else:
        column_of_groups = find_label_column(rows, stratify)
        strata = None if column_of_groups is None else _classes(rows, column_of_groups)
        if strata is None:
            raise SettingError(
                f"stratify={stratify!r} must name a column with one class or name a row. Pass stratify=None to take "
                "all rows alike."
            )
    _warn_of_single_rows(strata, notes)
    name = column if stratify == "label" else stratify
    return Labels(column, values, name, strata)


def _classes(rows: Dataset, column: str) -> NDArray[Any] | None:
    """(n,) classes of a column; None where it holds lists or real numbers."""
    feature = rows.features[column]
    kind = str(getattr(feature, "dtype", ""))
    if kind.startswith("float") or not kind or kind in ("list", "dict") or isinstance(feature, list):
        return None
    values = _values(rows, column)
    if any(isinstance(value, list | dict) for value in values[:1]):
        return None
    try:
        return check_labels(values, len(rows))
    except SettingError as error:
        raise SettingError(f"The column {column!r}: {error}") from None


def _rarest_tags(rows: Dataset, column: str) -> NDArray[Any] | None:
    """(n,) the tag of each row that is rarest in the data set; None where the lists hold no tags."""
    lists = _values(rows, column)
    if not all(isinstance(tags, list) and all(isinstance(tag, int | str) for tag in tags) for tags in lists):
        return None
    if "input_ids" in rows.column_names and _values(rows.select(range(min(8, len(rows)))), "input_ids") == lists[:8]:
        return None  # a language model's own tokens
    inner: Any = getattr(rows.features[column], "feature", None)
    names = getattr(inner, "names", None)
    found = [[str(tag) if names is None else names[tag] for tag in tags if tag != IGNORED] for tags in lists]
    known, counts = np.unique([tag for tags in found for tag in tags] or [""], return_counts=True)
    if not 2 <= len(known) <= MOST_TAGS:
        return None
    count = dict(zip(known.tolist(), counts.tolist(), strict=True))
    return np.array([min(tags, key=lambda tag: (count[tag], tag), default="") for tags in found])


def _values(rows: Dataset, column: str) -> list[Any]:
    """All values of a column, whatever the data set's format; read at once, which is far faster than row by row."""
    values: list[Any] = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values


def _warn_of_single_rows(strata: NDArray[Any], notes: list[str]) -> None:
    classes, counts = np.unique(strata, return_counts=True)
    single = classes[counts == 1].tolist()
    if single:
        shown = ", ".join(map(str, single[:5]))
        note = f"Classes with one row only, which is kept but can't be learnt from: {len(single)} ({shown})."
        notes.append(note)
        logger.warning("%s", note)
