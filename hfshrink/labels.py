"""Labels: find their column, and put them into the model's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfshrink.errors import SettingError
from hfshrink.record import config_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

LABEL_COLUMNS = ("labels", "label", "label_ids", "ner_tags", "tags")
IGNORED = -100  # label id of positions that take no part in a loss or a metric


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str | None:
    """The name of the label column, None where there is none.

    Raises:
        SettingError: The named column does not exist.
    """
    if label_column is not None:
        if label_column not in dataset.column_names:
            raise SettingError(
                f"There is no column {label_column!r}; the data set has {', '.join(dataset.column_names)}."
            )
        return label_column
    return next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Names of a column's class numbers, of one class a row or several; None where the data set has none.

    Example:
        >>> from datasets import ClassLabel, Dataset
        >>> rows = Dataset.from_dict({"label": [0, 1]}).cast_column("label", ClassLabel(names=["bad", "good"]))
        >>> class_names(rows, "label")
        ['bad', 'good']
    """
    feature: Any = dataset.features[column]
    return getattr(getattr(feature, "feature", feature), "names", None)


def model_labels(dataset: Dataset, column: str, model: Any) -> list[Any]:
    """The labels of a data set as the model's label ids (class numbers, or what the column holds for other heads).

    Names, where the data set has them (strings or `ClassLabel`), decide over numbers.

    Raises:
        SettingError: A missing label, a name or number that the model does not have.
    """
    import datasets

    values = dataset.with_format(None)[column]
    values = list(values)
    if any(value is None for value in values):
        raise SettingError(f"The column {column!r} has a row without label (None). Filter those rows out.")
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    flat = _flatten(values)
    config: Any = config_of(model)
    if isinstance(inner, datasets.ClassLabel):
        mapping = _name_mapping(inner.names, config)
        return [_map(value, mapping) for value in values]
    if flat and all(isinstance(value, str) for value in flat):
        found = _look_up(set(flat), config, column)
        return [_map(value, found) for value in values]
    return values


def check_class_labels(labels: Sequence[Any], num_labels: int) -> None:
    """Raise `SettingError` where a class number lies outside 0..num_labels-1 (ignored positions are fine)."""
    bad = sorted({value for value in _flatten(labels) if value != IGNORED and not 0 <= value < num_labels})
    if bad:
        raise SettingError(
            f"Labels must lie in 0..{num_labels - 1} for this model, got {bad[:5]}. Is it the right data set?"
        )


def check_class_order(names: Sequence[Any], config: Any, what: str) -> None:
    """Refuse numbers of classes whose names the model has in another order: it would learn other classes.

    Args:
        names: Those of the classes 0, 1, …; where the model has other names nothing is known, and nothing is refused.
        config: The model's.
        what: What has the names, for the error.

    Raises:
        SettingError: The model's names are the same, in another order.
    """
    ours = [str(name) for _, name in sorted(config.id2label.items())] if names else []
    first, second = ([str(name).casefold() for name in group] for group in (names, ours))
    if first != second and sorted(first) == sorted(second):
        raise SettingError(
            f"{what} {list(names)}, in this order, and the model's are {ours}. Make the model with the same order: "
            "id2label=dict(enumerate(names)), label2id={name: number, …}."
        )


def _name_mapping(names: Sequence[str], config: Any) -> dict[int, int]:
    unnamed = all(name == f"LABEL_{index}" for name, index in config.label2id.items())
    if unnamed and len(names) == len(config.label2id):
        return {index: index for index in range(len(names))}
    found = _look_up(names, config, "the data set's features")
    return {index: found[name] for index, name in enumerate(names)}


def _look_up(names: Iterable[str], config: Any, where: str) -> dict[str, int]:
    """Name -> the model's label id: by the exact name, else by the name in any case of letters."""
    exact = {str(name): int(index) for name, index in config.label2id.items()}
    loose = {name.casefold(): index for name, index in exact.items()}
    missing = sorted(name for name in names if name not in exact and name.casefold() not in loose)
    if missing:
        raise SettingError(f"The labels {missing[:5]} in {where} are not among the model's: {config.label2id}.")
    return {name: exact.get(name, loose[name.casefold()]) for name in names}


def _map(value: Any, mapping: Mapping[Any, int]) -> Any:
    return [_map(item, mapping) for item in value] if isinstance(value, list) else mapping.get(value, value)


def _flatten(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (_flatten(value) if isinstance(value, list | tuple) else [value])]


def first_piece_labels(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Labels per token: each word's label on its first piece, -100 on further pieces and special tokens.

    Example:
        >>> first_piece_labels([None, 0, 0, 1, None], [7, 8])
        [-100, 7, -100, 8, -100]
    """
    words = max((word for word in word_ids if word is not None), default=-1) + 1
    if words > len(labels):
        raise SettingError(f"A row has {words} words or more, but {len(labels)} labels ({list(labels)[:8]}, …).")
    before = [None, *word_ids[:-1]]
    return [
        IGNORED if word is None or word == last else labels[word] for word, last in zip(word_ids, before, strict=True)
    ]


def next_token_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A language model's batch whose own tokens are its labels, padding left out.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> next_token_labels(batch)["labels"].tolist()
        [[5, -100]]
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, IGNORED)}
