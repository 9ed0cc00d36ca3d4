"""`cache_teacher`: run the teacher once over a data set and keep its answers, in memory or in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hfshrink.data import INPUT_COLUMNS, LANGUAGE_TASKS, encode, read_dataset, row_lengths
from hfshrink.distillation.teachers.answers import TeacherRun, row_parts
from hfshrink.distillation.teachers.collator import TEACHER_COLUMNS, TeacherCollator, check_collator, teacher_outputs
from hfshrink.distillation.teachers.fingerprints import cache_settings
from hfshrink.distillation.teachers.store import KEY_BYTES, TABLES, Row, open_store
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.labels import find_label_column
from hfshrink.loading import infer_task, load

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TEACHER_COLUMNS", "TeacherCollator", "cache_teacher", "teacher_outputs"]

logger = logging.getLogger(__name__)

SIGNALS = ("full", "sampled", "top_k")
LARGE_BYTES = 2**30  # full logits above this are worth a warning
SAMPLED_BYTES = 40  # per position: about 12 different ids of 50 draws, 3 bytes each
TABLE_BYTES = 64 * 2**20  # of one record batch: what is in memory at once
TABLE_ROWS = 1000
KEPT_TABLES = 8  # row orders that stay on disk


def cache_teacher(
    dataset: Any,
    teacher: Any,
    processor: Any = None,
    *,
    cache_dir: str | Path | None = None,
    signal: str | None = None,
    entries: int = 50,
    dtype: str = "float32",
    batch_size: int = 32,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    text_columns: Any = None,
    seed: int = 0,
) -> Dataset:
    """Run the teacher once over a data set and keep its answers as columns, so that training need not run it.

    Heads of few classes keep their logits: `teacher_logits`, (classes,) per example, (sequence, classes) for token
    classification, (sequence, 2) for question answering. Language models keep a random sample of each position's
    distribution, `teacher_ids` and `teacher_counts` (Random Sampling KD, Anshumann et al. 2025, arXiv:2503.16870): its
    mean is the teacher's distribution, where the largest entries alone are biased. Collate the rows with
    `TeacherCollator`. The answers stay in the teacher's own label order, and the data must be the same in every epoch:
    no augmentation, no masks drawn anew. Cached answers equal live ones bit for bit in batches of the same shape;
    other padding or batch sizes give the noise of floats, about 1e-6 of the logits.

    Args:
        dataset: A `datasets.Dataset`, raw or encoded.
        teacher: A model, folder or Hub id with any head.
        processor: Its tokenizer or processor; None looks beside the model. Needed for raw rows.
        cache_dir: A folder that keeps the answers by the content of each row: rows may be shuffled, cut, added or
            doubled later, and only new ones are computed; a killed run goes on where it was. A copy for each order
            of rows lies in its folder `tables`, the last 8 of them. None keeps them in memory.
        signal: "full" logits, "sampled", or "top_k" probabilities (`teacher_probabilities`; what they leave over to 1
            is one bucket of all others); None takes "full" for classes and "sampled" for language models.
        entries: Draws per position of "sampled" (50 give about 12 different ids), or k of "top_k".
        dtype: "float32", exact, or "float16" for full logits.
        batch_size: Rows per forward pass.
        data_collator: Makes the teacher's batches; None pads to the longest row. It may pad and make masks of
            lengths, but not change, drop or add what the teacher reads.
        text_columns: Columns of text of raw rows, as in `evaluate`.
        seed: Of the draws. They depend on it and on the row's content only, not on order, batch or process.

    Returns:
        The encoded data set with the columns added; labels, untouched, are in the column `labels` (tags of raw words
        lie on each word's first token; tags that are text become the teacher's label ids).

    Raises:
        SettingError: Unknown settings, a collator that masks at random or changes inputs, empty data, inputs that
            hold None or NaN, answers that are not finite.
        UnsupportedModelError: The teacher has no head.
        CheckpointError: `cache_dir` holds another teacher's answers, other settings, or corrupt files; the message
            names what differs.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [0, 1]})
        >>> cache_teacher(rows, BertForSequenceClassification(config)).column_names
        ['input_ids', 'labels', 'teacher_logits']
    """
    from datasets import concatenate_datasets

    model, found = load(teacher)
    processor = processor or found
    task = _check_teacher(model)
    signal = _check_settings(task, signal, entries, dtype, batch_size)
    if data_collator is not None:
        check_collator(data_collator)
    encoded = _encode(dataset, model, processor, task, text_columns)
    classes = _classes(model, task)
    if task in LANGUAGE_TASKS and signal == "full":
        _warn_of_size(encoded, classes, 4 if dtype == "float32" else 2)
    parts = row_parts(signal, entries, dtype, classes)
    run = TeacherRun(model, task, signal, entries, seed, classes, parts, batch_size, data_collator, processor)
    keys = row_keys(encoded, run.input_columns(encoded))
    run.check_collator(encoded)
    if cache_dir is None:
        rows = dict(run.answers(encoded, keys, set(keys)))
        size = sum(part.nbytes for part in next(iter(rows.values())).values())
        table = build_table(keys, lambda wanted: [rows[key] for key in wanted], size, run.per_row, None)
    else:
        table = _through_store(run, encoded, keys, cache_dir)
    if encoded._indices is not None:  # else both sides are copied, the teacher's too
        encoded = encoded.flatten_indices()
    return concatenate_datasets([encoded.with_format(None), table], axis=1)


def _check_teacher(model: Any) -> str:
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"The teacher must be a PyTorch model, got {type(model).__name__}. Cache the float model's answers."
        )
    task = infer_task(model)
    if task == "feature-extraction":
        raise UnsupportedModelError(
            f"The teacher ({type(model).__name__}) has no head and so no logits to keep. Load it with a head."
        )
    return task


def _check_settings(task: str, signal: str | None, entries: int, dtype: str, batch_size: int) -> str:
    signal = signal or ("sampled" if task in LANGUAGE_TASKS else "full")
    if signal not in SIGNALS:
        raise SettingError(f"signal must be one of {', '.join(SIGNALS)}, got {signal!r}.")
    if signal != "full" and task not in LANGUAGE_TASKS:
        raise SettingError(
            f"signal={signal!r} is for language models; the teacher does {task}, with few classes. Give signal='full'."
        )
    if dtype not in ("float32", "float16"):
        raise SettingError(f"dtype must be 'float32' or 'float16', got {dtype!r}.")
    for name, value, most in (("entries", entries, 2**16 - 1), ("batch_size", batch_size, 2**31 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise SettingError(f"{name} must be a whole number in 1..{most}, got {value!r}.")
    return signal


def _classes(model: Any, task: str) -> int:
    if task == "question-answering":
        return 2  # start and end
    return int(model.config.get_text_config().vocab_size if task in LANGUAGE_TASKS else model.config.num_labels)


def _warn_of_size(encoded: Dataset, classes: int, item: int) -> None:
    tokens = sum(row_lengths(encoded))
    size = tokens * classes * item
    if size > LARGE_BYTES:
        logger.warning(
            "Full logits of %s tokens and %s classes take %.1f GB; signal='sampled' takes about %.3f GB.",
            *(f"{tokens:,}", f"{classes:,}", size / 1e9, tokens * SAMPLED_BYTES / 1e9),
        )


def _encode(dataset: Any, model: Any, processor: Any, task: str, text_columns: Any) -> Dataset:
    """The rows as model inputs; labels are the student's business and stay as they are."""
    rows = read_dataset(dataset)
    if present := [name for name in TEACHER_COLUMNS if name in rows.column_names]:
        raise SettingError(
            f"The data set has the column {present[0]!r} already. Remove it: remove_columns({present})."
        )
    column = find_label_column(rows)
    is_encoded = any(name in rows.column_names for name in INPUT_COLUMNS)
    if task in LANGUAGE_TASKS and is_encoded and 0 in (lengths := row_lengths(rows)):
        rows = rows.select([row for row, length in enumerate(lengths) if length])  # as `encode` does
    if task == "token-classification" and not is_encoded and column is not None:
        plain = _without_names(rows, column)  # tags of words become tags of tokens
        return encode(plain, model, processor, task, text_columns=text_columns, label_column=column)
    unlabelled = rows if column is None else rows.remove_columns([column])
    encoded = encode(unlabelled, model, processor, task, text_columns=text_columns)
    if column is None or (task in LANGUAGE_TASKS and not is_encoded):  # a raw text's class is nothing to generate
        return encoded
    values = rows.with_format("arrow")[:][column]
    return encoded.add_column("labels", values, feature=rows.features[column])


def _without_names(rows: Dataset, column: str) -> Dataset:
    """Class numbers without their names, so that nobody puts them into the teacher's order."""
    import datasets

    inner = getattr(rows.features[column], "feature", None)
    if not isinstance(inner, datasets.ClassLabel):
        return rows
    return rows.cast_column(column, datasets.Sequence(datasets.Value("int64")))


def row_keys(encoded: Dataset, names: list[str]) -> list[bytes]:
    """A hash (BLAKE2b, 16 bytes) of each row's model inputs: names, shapes and values, whatever their Arrow types.

    Args:
        encoded: The rows.
        names: The columns that count.

    Raises:
        SettingError: A value is None or NaN.
    """
    rows, keys = encoded.select_columns(sorted(names)).with_format("numpy"), []
    step = 1000 if "input_ids" in names else 50
    for start in range(0, len(rows), step):
        columns = rows[start : start + step]
        for number in range(min(step, len(rows) - start)):
            digest = hashlib.blake2b(digest_size=KEY_BYTES)
            for name in sorted(names):
                try:
                    value = _dense(columns[name][number])
                except (TypeError, ValueError) as error:
                    raise SettingError(
                        f"Row {start + number} can't be read in the column {name!r}: {error}."
                    ) from None
                digest.update(f"{name}:{value.dtype.kind}{value.shape};".encode())
                digest.update(value.tobytes())
            keys.append(digest.digest())
    return keys


def _dense(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind not in "Oiufb" or value is None or (array.dtype.kind == "f" and np.isnan(array).any()):
        raise ValueError("it holds None, NaN or text, expected numbers")
    if array.dtype == object:
        array = np.stack([_dense(item) for item in array])
    return array.astype({"i": np.int64, "u": np.int64, "f": np.float32}.get(array.dtype.kind, array.dtype))


def _through_store(run: TeacherRun, encoded: Dataset, keys: list[bytes], cache_dir: Any) -> Dataset:
    with open_store(cache_dir, cache_settings(run)) as store:
        for key, row in run.answers(encoded, keys, set(keys) - store.find(keys)):
            store.add(key, row)
        store.flush()
        digest = hashlib.blake2b(store.identity.encode() + b"".join(keys), digest_size=16).hexdigest()
        path = store.folder / TABLES / f"{digest}.arrow"
        table = _known_table(path, len(keys))
        if table is None:
            table = build_table(keys, store.read, store.row_bytes(), run.per_row, path)
        used = sorted(path.parent.glob(f"{'?' * 32}.arrow"), key=lambda file: file.lstat().st_atime_ns)
        for old in used[:-KEPT_TABLES]:
            with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
                old.unlink()
        return table


def _known_table(path: Path, rows: int) -> Dataset | None:
    """The table of an earlier call for the same rows in the same order."""
    import datasets
    import pyarrow as pa

    try:
        table = datasets.Dataset.from_file(str(path))
    except (OSError, pa.ArrowException):  # not there, or cut short
        return None
    # Used now; the time of change is part of the data set's fingerprint and stays.
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return table if len(table) == rows else None


def build_table(
    keys: list[bytes], read: Callable[[list[bytes]], list[Row]], row_bytes: int, per_row: bool, path: Path | None
) -> Dataset:
    """A data set of the teacher's columns, one row per key.

    Args:
        keys: The rows' keys, in order.
        read: The answers to some keys.
        row_bytes: About the size of one answer; the answers are read in portions of `TABLE_BYTES`.
        per_row: Whether logits are one per example, so that the column has no positions.
        path: Arrow file to write and to map into memory; None keeps the table in memory.

    Raises:
        CheckpointError: The file can't be written.
    """
    import datasets
    import pyarrow as pa

    step = max(1, min(TABLE_ROWS, TABLE_BYTES // max(row_bytes, 1)))
    portions = (_record_batch(read(keys[i : i + step]), per_row) for i in range(0, len(keys), step))
    if path is None:
        sink = pa.BufferOutputStream()
        _write_stream(sink, portions)
        return datasets.Dataset.from_buffer(sink.getvalue())
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        with pa.OSFile(str(aside), "wb") as sink:
            _write_stream(sink, portions)
        aside.replace(path)
    except OSError as error:  # a full disk, most likely
        raise CheckpointError(f"Can't write {path}: {error}. The answers themselves are kept.") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def _write_stream(sink: Any, portions: Iterator[Any]) -> None:
    import pyarrow as pa

    first = next(portions)
    with pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_batch(first)
        for portion in portions:
            writer.write_batch(portion)


def _record_batch(rows: list[Row], per_row: bool) -> Any:
    """Arrow columns around the arrays as they are: no number becomes a Python object."""
    import pyarrow as pa

    if "logits" in rows[0]:
        logits = np.concatenate([row["logits"] for row in rows])  # (Σ positions, classes)
        widths = np.full(len(logits), logits.shape[1])
        column = _lists(pa.array(logits.reshape(-1)), widths)
        if not per_row:
            column = _lists(column, [len(row["logits"]) for row in rows])
        return pa.record_batch({"teacher_logits": column})
    positions = [len(row["widths"]) for row in rows]
    widths = np.concatenate([row["widths"] for row in rows])
    columns = {}
    for name in ("ids", "counts", "probabilities"):
        if name in rows[0]:
            values = pa.array(np.concatenate([row[name] for row in rows]))
            columns[f"teacher_{name}"] = _lists(_lists(values, widths), positions)
    return pa.record_batch(columns)


def _lists(values: Any, lengths: list[int] | NDArray[Any]) -> Any:
    import pyarrow as pa

    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if starts[-1] > 2**31 - 1:
        raise SettingError(f"A row's answer has {starts[-1]:,} numbers, at most 2^31 - 1 fit. Give signal='sampled'.")
    return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), values)
