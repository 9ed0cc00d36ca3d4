"""From a data set to batches: read it, find its columns, encode it with the model's processor, order its labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.labels import IGNORED, LABEL_COLUMNS, find_label_column, first_piece_labels, model_labels
from hfshrink.modules import max_positions
from hfshrink.record import config_of
from hfshrink.terminal import progress

if TYPE_CHECKING:
    from datasets import Dataset

LANGUAGE_TASKS = ("fill-mask", "text-generation", "text2text-generation")
INPUT_COLUMNS = ("input_ids", "pixel_values")


def read_dataset(data: Any, split: str | None = None) -> Dataset:
    """A `datasets.Dataset` from itself, a folder written by `save_to_disk`, or a Hub id.

    Raises:
        SettingError: Wrong type, empty, several splits and none named, or a streaming data set.
        CheckpointError: The folder or Hub id can't be read.
    """
    import datasets

    if isinstance(data, str | Path):
        data = _read_by_name(str(data), split)
    if isinstance(data, datasets.DatasetDict):
        if split is None or split not in data:
            raise SettingError(
                f"This data set has the splits {', '.join(data)}; choose one, as in dataset[{next(iter(data))!r}]."
            )
        data = data[split]
    if isinstance(data, datasets.IterableDataset):
        raise SettingError(
            "Expected a data set with a length, got a streaming one. Take some rows first: "
            "Dataset.from_list(list(it.take(n)))."
        )
    if not isinstance(data, datasets.Dataset):
        raise SettingError(f"Expected a datasets.Dataset, a folder or a Hub id, got {type(data).__name__}.")
    if len(data) == 0:
        raise SettingError("The data set is empty: it has no rows.")
    return data


def data_title(data: Any) -> str:
    """A data set's name for the record, without the machine's folders."""
    if isinstance(data, str | Path):
        path = Path(data)
        return path.name if path.is_absolute() or path.exists() else str(path)
    info = getattr(data, "info", None)
    return getattr(info, "dataset_name", None) or type(data).__name__


def encode(
    dataset: Dataset,
    model: Any,
    processor: Any,
    task: str,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
) -> Dataset:
    """Turn raw rows into model inputs, with the column `labels` where the data set has labels.

    A data set that already has `input_ids` or `pixel_values` is taken as encoded. Text comes from `text_columns`, else
    from the only one or two columns of strings (two are a pair). Labels are put in the order of the model's `label2id`
    by their names.

    Args:
        dataset: The rows.
        model: A model or export; its config tells the labels, its position embeddings the longest input.
        processor: Its tokenizer or image processor; None is fine for encoded rows.
        task: One of `hfshrink.loading.TASKS`.
        text_columns: One or two names of columns of text (or of lists of words).
        label_column: Name of the label column; None takes `labels`, `label`, `label_ids`, `ner_tags` or `tags`.
        max_length: Longest input in tokens; None takes what tokenizer and model can read.

    Raises:
        SettingError: Columns that are missing or can't be told apart, labels that the model does not have, no
            processor.
    """
    if max_length is not None and max_length < 1:
        raise SettingError(f"max_length must be at least 1, got {max_length}.")
    label_column = find_label_column(dataset, label_column)
    labels = None if label_column is None else model_labels(dataset, label_column, model)
    if any(name in dataset.column_names for name in INPUT_COLUMNS):
        unused = [name for name in dataset.column_names if name in (label_column, "labels")]
        encoded = dataset.remove_columns(unused)
    elif processor is None:
        raise SettingError(
            f"The data set has raw columns ({', '.join(dataset.column_names)}) and the model no tokenizer or "
            "processor beside it. Pass processor=, or a data set with input_ids or pixel_values."
        )
    elif task == "image-classification":
        encoded = _encode_images(dataset, processor)
    else:
        encoded, labels = _encode_text(dataset, model, processor, task, text_columns, labels, label_column, max_length)
    encoded = encoded if labels is None else encoded.add_column("labels", labels)
    if "input_ids" not in encoded.column_names:
        return encoded
    if task in LANGUAGE_TASKS and 0 in (lengths := row_lengths(encoded)):  # empty lines of a text say nothing
        encoded = encoded.select([row for row, length in enumerate(lengths) if length])
    if len(encoded) == 0:
        raise SettingError("Every row of the data set is empty: no tokens are left.")
    _check_tokens(encoded, model, task)
    return encoded


def _check_tokens(encoded: Dataset, model: Any, task: str) -> None:
    """Raise `SettingError` for what would fail inside the model: rows too long or empty, ids that it does not have."""
    import pyarrow.compute as pc

    lengths, limit = row_lengths(encoded), max_positions(model)
    if limit is not None and max(lengths) > limit:
        row = lengths.index(max(lengths))
        raise SettingError(f"Row {row} has {lengths[row]} tokens, but the model reads at most {limit}. Truncate it.")
    if min(lengths) == 0:
        raise SettingError(f"Row {lengths.index(0)} has no tokens (an empty text?). Filter such rows out.")
    ids = pc.min_max(pc.list_flatten(_arrow_column(encoded, "input_ids"))).as_py()
    vocabulary = getattr(config_of(model).get_text_config(), "vocab_size", None)
    if vocabulary is not None and not 0 <= ids["min"] <= ids["max"] < vocabulary:
        raise SettingError(
            f"input_ids must lie in 0..{vocabulary - 1} for this model, got {ids['min']}..{ids['max']}. "
            "Were the rows encoded with another tokenizer?"
        )
    if task == "token-classification" and "labels" in encoded.column_names:
        for row, (labels, length) in enumerate(zip(encoded.with_format(None)["labels"], lengths, strict=True)):
            if not isinstance(labels, list) or len(labels) != length:
                raise SettingError(
                    f"Row {row} has {length} tokens; its labels must be as many, got {str(labels)[:60]}."
                )


def _arrow_column(encoded: Dataset, name: str) -> Any:
    return encoded.select_columns([name]).with_format("arrow")[:][name]


def batches(
    encoded: Dataset, model: Any, processor: Any = None, batch_size: int = 32, description: str = ""
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Padded batches of rows of like length, longest first (so that memory runs out at once or never).

    Yields:
        (row numbers, inputs): each input a tensor of shape (batch, …); `labels` among them where the data set has
        them.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"batch_size must be a number from 1 on, got {batch_size!r}.")
    order = list(range(len(encoded)))
    if "input_ids" in encoded.column_names:
        lengths = row_lengths(encoded)
        order.sort(key=lambda row: -lengths[row])
    plain = encoded.with_format(None)
    starts = range(0, len(order), batch_size)
    for start in progress(starts, description, total=len(starts)) if description else starts:
        rows = order[start : start + batch_size]
        columns = plain[rows]
        yield rows, collate(columns, model, processor)


def collate(columns: Mapping[str, Sequence[Any]], model: Any, processor: Any = None) -> dict[str, torch.Tensor]:
    """Stack columns into tensors; shorter sequences are padded on the tokenizer's side (right without one).

    Raises:
        SettingError: A column can't be stacked, or needs padding and has no pad id.
    """
    tensors = {}
    left = getattr(processor, "padding_side", "right") == "left"
    for name, values in columns.items():
        if name == "labels" and any(label is None for label in values):
            raise SettingError("A label is missing (None) in the column 'labels'. Filter those rows out.")
        try:
            rows = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            continue  # a text column kept for the user's own sake
        shapes = {row.shape for row in rows}
        if len(shapes) == 1:
            tensors[name] = torch.stack(rows)
            continue
        if any(len(shape) != 1 for shape in shapes):
            raise SettingError(
                f"Rows of the column {name!r} have different shapes ({sorted(map(tuple, shapes))[:3]}); "
                "can't stack them."
            )
        fill = _pad_value(name, model, processor)
        longest = max(len(row) for row in rows)
        padding = [((longest - len(row), 0) if left else (0, longest - len(row))) for row in rows]
        tensors[name] = torch.stack(
            [torch.nn.functional.pad(row, p, value=fill) for row, p in zip(rows, padding, strict=True)]
        )
    if "input_ids" in tensors and "attention_mask" not in tensors:
        mask = [torch.ones(len(row), dtype=torch.long) for row in columns["input_ids"]]
        tensors["attention_mask"] = collate({"attention_mask": mask}, model, processor)["attention_mask"]
    return tensors


def row_lengths(encoded: Dataset) -> list[int]:
    """Number of tokens of each row, read from the Arrow offsets without decoding the rows."""
    import pyarrow.compute as pc

    return [int(n) for n in pc.list_value_length(_arrow_column(encoded, "input_ids")).to_pylist()]


def _read_by_name(name: str, split: str | None) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Can't read the data set {name!r}: {error}. "
            "Give a folder that save_to_disk wrote, or check the name and the network."
        ) from error


def _encode_images(dataset: Dataset, processor: Any) -> Dataset:
    import datasets

    column = next((n for n, f in dataset.features.items() if isinstance(f, datasets.Image)), None)
    column = column or next((name for name in ("image", "img", "pixels") if name in dataset.column_names), None)
    if column is None:
        raise SettingError(f"Found no column of images among {', '.join(dataset.column_names)}; call it 'image'.")

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") if hasattr(image, "convert") else image for image in rows[column]]
        return {"pixel_values": processor(images, return_tensors="np")["pixel_values"]}

    return dataset.map(pixels, batched=True, batch_size=64, remove_columns=dataset.column_names)


def find_text_columns(dataset: Dataset, text_columns: Sequence[str] | None = None) -> list[str]:
    """The one or two columns that hold text (or lists of words).

    Raises:
        SettingError: A named column is missing, or none or more than two could be meant.
    """
    if text_columns is not None:
        names = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        missing = [name for name in names if name not in dataset.column_names]
        if missing or not 1 <= len(names) <= 2:
            raise SettingError(f"text_columns must be one or two of {', '.join(dataset.column_names)}, got {names}.")
        return names
    names = [
        name
        for name, feature in dataset.features.items()
        if name not in LABEL_COLUMNS
        and "string" in (getattr(feature, "dtype", ""), getattr(getattr(feature, "feature", None), "dtype", ""))
    ]
    if not 1 <= len(names) <= 2:
        raise SettingError(
            f"Found {len(names)} columns of text among {', '.join(dataset.column_names)}, expected one, "
            "or two for pairs. Name them: text_columns=[…]."
        )
    return names


def _encode_text(
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    task: str,
    text_columns: Sequence[str] | None,
    labels: list[Any] | None,
    label_column: str | None,
    max_length: int | None,
) -> tuple[Dataset, list[Any] | None]:
    columns = find_text_columns(
        dataset if label_column is None else dataset.remove_columns([label_column]), text_columns
    )
    longest = min(n for n in (max_length, max_positions(model), tokenizer.model_max_length, 2**20) if n is not None)
    words = task == "token-classification"
    target = columns.pop() if task == "text2text-generation" and len(columns) == 2 else None

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        _check_texts({name: rows[name] for name in (*columns, *([target] if target else []))}, words)
        encoded = tokenizer(
            *(rows[name] for name in columns), truncation=True, max_length=longest, is_split_into_words=words
        )
        if words:
            encoded["word_ids"] = [encoded.word_ids(i) for i in range(len(encoded["input_ids"]))]
        if target is not None:
            encoded["labels"] = tokenizer(text_target=rows[target], truncation=True, max_length=longest)["input_ids"]
        return dict(encoded)

    encoded = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    if words:
        word_ids = encoded["word_ids"]
        encoded = encoded.remove_columns(["word_ids"])
        if labels is not None:
            labels = [first_piece_labels(ids, row) for ids, row in zip(word_ids, labels, strict=True)]
    return encoded, labels


def _check_texts(rows: Mapping[str, Sequence[Any]], words: bool) -> None:
    expected = list if words else str
    for name, values in rows.items():
        wrong = next((value for value in values if not isinstance(value, expected)), "")
        if not isinstance(wrong, expected) and wrong != "":
            kind = "lists of words" if words else "text"
            raise SettingError(f"The column {name!r} must hold {kind}, got {wrong!r} ({type(wrong).__name__}).")


def _pad_value(name: str, model: Any, processor: Any) -> int:
    if name == "labels":
        return IGNORED
    if name != "input_ids":
        return 0
    pad = getattr(
        config_of(model), "pad_token_id", None
    )  # causal classifiers look for this one to find the last token
    if pad is None:
        pad = getattr(processor, "pad_token_id", None)
    return 0 if pad is None else int(pad)
