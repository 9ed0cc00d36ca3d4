"""What each row says, as one text: for telling rows that say the same, within a data set and across two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfshrink.data import INPUT_COLUMNS, find_text_columns
from hfshrink.errors import SettingError
from hfshrink.labels import LABEL_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK = 1000  # rows in memory at once
IMAGE_COLUMNS = ("image", "img", "pixels")


@dataclass(frozen=True, eq=False)
class RowTexts:
    """The texts of a data set's rows, read block by block whenever they are gone through; (n,) strings.

    Attributes:
        rows: The data set.
        columns: The columns that make a row's text.
    """

    rows: Dataset
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        plain = self.rows.select_columns(list(self.columns)).with_format("arrow")
        for start in range(0, len(plain), BLOCK):
            table = plain[start : start + BLOCK]
            for values in zip(*(table[name].to_pylist() for name in self.columns), strict=True):
                yield "\0".join(map(_as_text, values))  # no white space: pairs stay apart


def row_texts(
    dataset: Dataset, text_columns: Sequence[str] | None = None, label_column: str | None = None
) -> RowTexts | None:
    """The texts of the rows: of text columns as they are, of encoded rows their ids, of images a digest of the file.

    Args:
        dataset: The rows.
        text_columns: One or two columns of text; None finds the columns that a model would read.
        label_column: The label column, which takes no part, nor do those with the usual names.

    Returns:
        None where no such column is found; then rows can't be compared.

    Raises:
        SettingError: A column of `text_columns` does not exist.

    Example:
        >>> from datasets import Dataset
        >>> list(row_texts(Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})))
        ['good', 'bad']
    """
    if text_columns is not None:
        return RowTexts(dataset, tuple(find_text_columns(dataset, text_columns)))
    labels = {*LABEL_COLUMNS, label_column}
    names = [name for name in dataset.column_names if name not in labels]
    found = [name for name in (*INPUT_COLUMNS, *IMAGE_COLUMNS) if name in names] or _image_columns(dataset, names)
    if not found:
        try:
            found = find_text_columns(dataset.select_columns(names)) if names else []
        except SettingError:
            return None
    return RowTexts(dataset, tuple(found)) if found else None


def is_text(dataset: Dataset, texts: RowTexts | None) -> bool:
    """Whether the rows are texts (raw or as ids), not images or numbers."""
    return texts is not None and not any(
        name in (*IMAGE_COLUMNS, "pixel_values") or name in _image_columns(dataset, dataset.column_names)
        for name in texts.columns
    )


def _image_columns(dataset: Dataset, names: Sequence[str]) -> list[str]:
    import datasets

    return [name for name in names if isinstance(dataset.features[name], datasets.Image)]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # an image: its bytes, or its file where it has none
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return " ".join(value)
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
