"""Ways to divide the rows of a data set: by label, length, metadata column, cluster, or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.data import find_text_columns, row_lengths
from hfshrink.errors import SettingError
from hfshrink.labels import find_label_column
from hfshrink.selection.blockwise import Rows, check_embeddings
from hfshrink.selection.budgets import check_labels
from hfshrink.selection.centroids import find_clusters

if TYPE_CHECKING:
    from datasets import Dataset

MISSING = "missing"
OWN_NAMES = ("label", "length", "cluster")
MOST_NUMBERS = 50  # distinct whole numbers that are a group each; more are cut into ranges
MOST_VALUES = 1000  # distinct texts that are a group each; more are no groups


@dataclass(frozen=True, eq=False)
class Partition:
    """Every row in one group.

    Attributes:
        by: What divides the rows, such as `"label"` or `"label × length (characters)"`.
        codes: (n,) group of each row, 0..groups−1; each group has a row.
        parts: For each of the factors that are crossed the names of its groups; one tuple where nothing is crossed.
        keys: (groups, factors) position of each group's names in `parts`.
    """

    by: str
    codes: NDArray[np.int64]
    parts: tuple[tuple[str, ...], ...]
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, group: int) -> str:
        """Name of a group."""
        return " × ".join(names[key] for names, key in zip(self.parts, self.keys[group].tolist(), strict=True))

    def row_names(self) -> NDArray[np.str_]:
        """(n,) name of each row's group, as `worst_group` takes it."""
        return np.array([self.name(group) for group in range(len(self))])[self.codes]


def cross(*partitions: Partition) -> Partition:
    """The groups of rows that agree in every one of the partitions; combinations without rows are left out.

    Example:
        >>> halves = divide_by_values("half", ["a", "a", "b", "b"])
        >>> both = cross(halves, divide_by_values("sign", ["+", "-", "+", "+"]))
        >>> both.by, [both.name(group) for group in range(len(both))]
        ('half × sign', ['a × +', 'a × -', 'b × +'])
    """
    codes, keys = partitions[0].codes, partitions[0].keys
    for other in partitions[1:]:
        found, codes = np.unique(codes * len(other) + other.codes, return_inverse=True)
        keys = np.concatenate([keys[found // len(other)], other.keys[found % len(other)]], axis=1)
    parts = tuple(names for partition in partitions for names in partition.parts)
    return Partition(" × ".join(partition.by for partition in partitions), codes, parts, keys)


def divide_by_values(by: str, values: ArrayLike) -> Partition:
    """One group for each value, in the order of the values; (n,) names or whole numbers."""
    found, codes = np.unique(np.asarray(values), return_inverse=True)
    return _partition(by, codes, [str(value) for value in found.tolist()])


def divide_by_label(dataset: Dataset, labels: ArrayLike | None = None, ranges: int = 4) -> Partition | None:
    """One group for each class.

    Args:
        dataset: The rows; its `ClassLabel` names the classes.
        labels: (n,) class numbers or names; None takes the data set's label column.
        ranges: Groups of labels that are real numbers, as in regression.

    Returns:
        None where there is no column of labels, or rows have several.

    Raises:
        SettingError: Labels that are no classes, or not one for each row.
    """
    column = find_label_column(dataset)
    if labels is None:
        if column is None or _is_list(dataset, column):
            return None
        return divide_by_column(dataset, column, ranges, by="label")
    array = check_labels(labels, len(dataset))
    if array.dtype.kind in "iu" and column is not None and not _is_list(dataset, column):
        named = divide_by_column(dataset, column, ranges, by="label")
        if np.array_equal(array, _arrow_column(dataset, column).to_numpy()):
            return named
    return divide_by_values("label", array)


def divide_by_column(dataset: Dataset, column: str, ranges: int = 4, by: str | None = None) -> Partition:
    """One group for each value of a column; numbers of many values are cut into ranges of about as many rows each.

    Args:
        dataset: The rows.
        column: Its name. Texts, truth values, whole or real numbers; None and NaN are a group of their own.
        ranges: Number of ranges where the numbers are real, or whole with more than 50 values.
        by: What the partition is called; None takes the column's name.

    Raises:
        SettingError: There is no such column, its values are lists or the like, or texts with over 1,000 values.
    """
    import datasets
    import pyarrow as pa

    if column not in dataset.column_names:
        raise SettingError(f"There is no column {column!r}; the data set has {', '.join(dataset.column_names)}.")
    by = by or (f"column {column}" if column in OWN_NAMES else column)
    values, feature = _arrow_column(dataset, column), dataset.features[column]
    kind = values.type
    if pa.types.is_floating(kind):
        return divide_by_number(by, np.asarray(values.to_numpy(), dtype=np.float64), ranges)
    types = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(fits(kind) for fits in types):
        raise SettingError(
            f"The column {column!r} must hold one text, number or truth value a row to make groups, got {kind}."
        )
    codes, found = _encoded(values)
    if isinstance(feature, datasets.ClassLabel):
        count = feature.num_classes
        return _partition(by, codes, [feature.names[v] if 0 <= v < count else MISSING for v in found])
    if pa.types.is_integer(kind) and len(found) > MOST_NUMBERS and by != "label":
        return divide_by_number(by, np.append(np.array(found, dtype=np.float64), np.nan)[codes], ranges)
    if len(found) > MOST_VALUES and by != "label":
        raise SettingError(
            f"The column {column!r} has {len(found):,} different values, at most {MOST_VALUES:,} make groups. "
            "Put the values into fewer groups first."
        )
    return _partition(by, codes, [str(value) for value in found])


def divide_by_length(
    dataset: Dataset, buckets: int = 4, text_columns: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> Partition:
    """Buckets of rows of like length, of about as many rows each.

    The length is the number of tokens where the rows are encoded, of words where they are lists of words, else of
    characters; that of a pair is the sum.

    Args:
        dataset: The rows.
        buckets: Number of buckets; fewer where many rows are equally long.
        text_columns: One or two names of columns of text; None finds them.
        skip: Columns that are not the text.

    Raises:
        SettingError: No column of text or tokens is found.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if text_columns is None and "input_ids" in dataset.column_names:
        return divide_by_number("length (tokens)", np.array(row_lengths(dataset), dtype=np.float64), buckets)
    others = [name for name in dataset.column_names if name not in skip]
    names = find_text_columns(dataset.select_columns(others) if text_columns is None else dataset, text_columns)
    lengths, unit = np.zeros(len(dataset)), "characters"
    for name in names:
        values = _arrow_column(dataset, name)
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values, unit = pc.list_value_length(values), "words"
        else:
            values = pc.utf8_length(values)
        lengths += pc.fill_null(values, 0).to_numpy()
    return divide_by_number(f"length ({unit})", lengths, buckets)


def divide_by_cluster(embeddings: Any, clusters: int = 20, seed: int = 0) -> Partition:
    """K-means clusters, each named by its number and the row nearest to its centroid.

    Args:
        embeddings: (n, d) real numbers.
        clusters: Number of clusters.
        seed: Of the first centroids.

    Raises:
        SettingError: Embeddings of another form, NaN.
        MissingDependencyError: scikit-learn is not installed.
    """
    rows = Rows(check_embeddings(embeddings))
    found = find_clusters(rows, min(clusters, len(rows)), seed)
    order = np.lexsort((found.squared, found.index))  # by cluster, nearest first
    used, starts = np.unique(found.index[order], return_index=True)
    codes = np.searchsorted(used, found.index)
    names = [f"{number} (like row {order[start]})" for number, start in enumerate(starts.tolist())]
    return _partition("cluster", codes, names)


def divide_by_number(by: str, values: NDArray[np.float64], ranges: int) -> Partition:
    """Ranges of about as many rows each, their bounds quantiles of the values; equal values stay together.

    Args:
        by: What the partition is called.
        values: (n,) numbers; NaN is a group of its own.
        ranges: Number of ranges, at most.

    Example:
        >>> found = divide_by_number("age", np.array([1.0, 2.0, 3.0, 40.0, np.nan]), 2)
        >>> [found.name(group) for group in found.codes]
        ['1 to 2', '1 to 2', '3 to 40', '3 to 40', 'missing']
    """
    missing = np.isnan(values)
    known = values[~missing]
    codes = np.full(len(values), -1)
    names = []
    if len(known):
        edges = np.quantile(known, np.arange(1, ranges) / ranges, method="inverted_cdf")
        used, codes[~missing] = np.unique(np.searchsorted(np.unique(edges), known), return_inverse=True)
        for group in range(len(used)):
            inside = values[codes == group]
            low, high = _number(inside.min()), _number(inside.max())
            names.append(low if low == high else f"{low} to {high}")
    return _partition(by, codes, names)


def _partition(by: str, codes: NDArray[Any], names: Sequence[str]) -> Partition:
    """Groups that have rows, by codes into `names`; −1 and every name that says so are the group of missing values."""
    names = [*names, MISSING]
    merged = np.array([names.index(MISSING) if name == MISSING else code for code, name in enumerate(names)])
    used, codes = np.unique(merged[codes], return_inverse=True)
    return Partition(by, codes, (tuple(names[code] for code in used),), np.arange(len(used))[:, None])


def _encoded(values: Any) -> tuple[NDArray[np.int64], list[Any]]:
    """(n,) position of each value in the sorted list of different ones, −1 where it is null; and that list."""
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(values).unify_dictionaries()
    found = encoded.chunk(0).dictionary.to_pylist()
    order = sorted(range(len(found)), key=found.__getitem__)
    ranks = np.empty(len(found) + 1, dtype=np.int64)
    ranks[order], ranks[-1] = np.arange(len(found)), -1
    codes = np.concatenate([pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks])
    return ranks[codes], [found[position] for position in order]


def _arrow_column(dataset: Dataset, name: str) -> Any:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _is_list(dataset: Dataset, column: str) -> bool:
    import pyarrow as pa

    return pa.types.is_nested(_arrow_column(dataset.select([0]), column).type)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"
