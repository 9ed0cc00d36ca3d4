"""The labels of a data set as references: which kind of output they belong to, and whether they fit the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hfshrink.data import INPUT_COLUMNS, LANGUAGE_TASKS
from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED, check_class_labels, find_label_column

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    "token-classification": "tokens",
    "question-answering": "answers",
    "feature-extraction": "features",
    **dict.fromkeys(LANGUAGE_TASKS, "language"),
}
"""task -> kind of output; the tasks of classification are told apart by config and labels."""


def find_references(task: str, encoded: Dataset, config: Any) -> tuple[str, Any]:
    """The kind of output and its references, checked before the model runs; None where they come batch by batch."""
    kind = KINDS.get(task)
    has_labels = "labels" in encoded.column_names
    if kind == "language":
        if not has_labels and task != "text-generation":
            raise SettingError(
                f"{task} needs the column 'labels' (token ids, -100 where nothing is to be predicted); "
                f"the data set has {', '.join(encoded.column_names)}. " + _LABEL_HELP[task]
            )
        return kind, None
    labels = list(encoded.with_format(None)["labels"])
    if kind == "features":
        return kind, labels
    if kind == "tokens":
        check_class_labels(labels, config.num_labels)
        return kind, None
    kind = _classification_kind(labels, config)
    check = {"single_label": _class_numbers, "multi_label": _label_rows, "regression": _numbers}
    return kind, check[kind](labels, config.num_labels)


_LABEL_HELP = {
    "fill-mask": (
        "Mask the rows once with DataCollatorForLanguageModeling and keep its labels, "
        "so that every model sees the same masks."
    ),
    "text2text-generation": "Or give two columns of text: text_columns=[source, target].",
}


def _classification_kind(labels: list[Any], config: Any) -> str:
    problem = getattr(config, "problem_type", None)
    if problem == "single_label_classification" and isinstance(labels[0], list):
        raise SettingError(
            "This model chooses one label per row, but the data set has lists of labels. Give one number each."
        )
    if problem == "multi_label_classification" or isinstance(labels[0], list):
        return "multi_label"
    return "regression" if config.num_labels == 1 or problem == "regression" else "single_label"


def _class_numbers(labels: list[Any], num_labels: int) -> np.ndarray:
    if not all(isinstance(label, int) for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int))
        raise SettingError(
            f"Labels must be class numbers or the model's class names, got {wrong!r} ({type(wrong).__name__}). "
            "Cast the column to int64; for several labels per row give rows of 0 and 1."
        )
    if IGNORED in labels:
        raise SettingError(
            f"Row {labels.index(IGNORED)} has the label {IGNORED}, which means none. Filter those rows out."
        )
    check_class_labels(labels, num_labels)
    return np.array(labels, dtype=np.int64)


def _label_rows(labels: list[Any], num_labels: int) -> np.ndarray:
    for row, values in enumerate(labels):
        if not isinstance(values, list) or len(values) != num_labels or not set(values) <= {0, 1}:
            raise SettingError(
                f"With several labels per row each must be a list of {num_labels} numbers 0 or 1, "
                f"one per label of the model, got {str(values)[:80]} in row {row}."
            )
    return np.array(labels, dtype=np.int64)


def _numbers(labels: list[Any], num_labels: int) -> np.ndarray:
    if num_labels != 1:
        raise SettingError(
            f"Regression is measured for one output, this model has {num_labels}. "
            "Pass a metric= of your own on features."
        )
    for row, value in enumerate(labels):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise SettingError(f"The label in row {row} must be a finite number, got {value!r}.")
    return np.array(labels, dtype=float)


def require_label_column(rows: Dataset, label_column: str | None) -> str:
    found = find_label_column(rows, label_column)
    if found is None:
        raise SettingError(
            f"The data set has no labels: expected a column labels, label, label_ids, ner_tags or tags, got "
            f"{', '.join(rows.column_names)}. Name it with label_column=."
        )
    return found


def without_class_column(rows: Dataset, label_column: str | None) -> Dataset:
    """Rows for a language model: a class label beside the text is no label of its tokens."""
    found = find_label_column(rows, label_column)
    if found is None or label_column is not None:
        return rows
    first = rows.with_format(None)[0][found]
    is_text = isinstance(first, str) and not any(name in rows.column_names for name in INPUT_COLUMNS)
    if is_text or (isinstance(first, list) and all(isinstance(item, int) for item in first)):
        return rows
    return rows.remove_columns([found])
