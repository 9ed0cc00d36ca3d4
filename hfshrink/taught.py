"""A subset with a teacher's soft labels: picked by one room, answered for by another, trained on by a third."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hfshrink.data import INPUT_COLUMNS, LANGUAGE_TASKS
from hfshrink.distillation.teachers.cache import cache_teacher
from hfshrink.distillation.teachers.collator import TEACHER_COLUMNS
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.labels import class_names, find_label_column
from hfshrink.loading import infer_task, load
from hfshrink.record import model_name
from hfshrink.saving import MAX_CONFIG_BYTES, save_aside
from hfshrink.selection.subset import Subset
from hfshrink.selection.synthetic import Synthetic

if TYPE_CHECKING:
    from datasets import Dataset

Rows = TypeVar("Rows", Subset, Synthetic)
logger = logging.getLogger(__name__)

LABELS_FILE, ABOUT_FILE = "soft_labels.parquet", "soft_labels.json"
FORMAT_VERSION = 1
OWN_LABELS = ("label", "label_ids")  # a Trainer takes them for `labels`, which the encoded rows have


def add_soft_labels(subset: Rows, teacher: Any, processor: Any = None, **options: Any) -> Rows:
    """Put a teacher's answers beside the rows of a subset, so that `DistillationTrainer` trains on them as they are.

    The rows keep their raw columns, such as `text`, beside what the teacher's processor made of them and the answers:
    a student with another tokenizer encodes the text anew, where the answers are one per row (`teacher_logits` of a
    classifier). Logits are put in the order of the data set's class names where the teacher has the same names; a
    student needs its classes in that order, `report.details["teacher"]["labels"]`.
    Answers of language models are a sample of each position's distribution (`teacher_ids`, `teacher_counts`) or
    what `signal` says.

    Args:
        subset: What `select` or `synthesize` returned. Earlier answers in it are replaced.
        teacher: A model, folder or Hub id with any head.
        processor: Its tokenizer or processor; None looks beside the model.
        **options: As of `cache_teacher`: `cache_dir`, `signal`, `entries`, `dtype`, `batch_size`, `text_columns`,
            `data_collator`, `seed`.

    Returns:
        The same rows, indices and scores with the columns added; `report.details["teacher"]` says by whom.

    Raises:
        SettingError: Rows without tokens, another number of classes than the teacher's, or as `cache_teacher` says.
        UnsupportedModelError: The teacher has no head.
        CheckpointError: The teacher, or its answers in `cache_dir`, can't be read.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfshrink.selection import select
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3], [4], [5]], "label": [0, 0, 1, 1]})
        >>> taught = add_soft_labels(select(rows, 0.5, "random"), BertForSequenceClassification(config))
        >>> taught.dataset.column_names
        ['input_ids', 'labels', 'teacher_logits']
    """
    model, found = load(teacher)
    processor = processor or found
    task = infer_task(model)
    rows = _without_answers(subset)
    order = _class_order(rows, model) if task not in LANGUAGE_TASKS else None
    answered = cache_teacher(rows, model, processor, **options)
    if len(answered) != len(rows):
        raise SettingError(
            f"{len(rows) - len(answered)} of the subset's {len(rows)} rows have no tokens, so the teacher has no "
            "answer. Filter empty texts out before selecting."
        )
    if order is not None:
        answered = _in_order(answered, order)
    details = {
        "name": model_name(model) or type(model).__name__,
        "task": task,
        "signal": options.get("signal") or ("sampled" if task in LANGUAGE_TASKS else "full"),
        "classes": None if task in LANGUAGE_TASKS else int(model.config.num_labels),
        "labels": None if task in LANGUAGE_TASKS else _names(rows, model, order),
        "rows": len(answered),
        "columns": [name for name in answered.column_names if name not in rows.column_names or name == "labels"],
    }
    return _with_dataset(subset, _join(rows, answered), details)


def save_soft_labels(subset: Subset, folder: str | Path, overwrite: bool = False) -> None:
    """Write what `Subset.save` writes, and the answers and encoded inputs: `soft_labels.parquet`, `soft_labels.json`.

    Args:
        subset: What `add_soft_labels` or `synthesize` returned.
        folder: Missing or empty.
        overwrite: Whether a folder that holds files is replaced as a whole.

    Raises:
        SettingError: The subset has no soft labels.
        CheckpointError: The folder holds files, or can't be written; it is as it was then.
    """
    names = [name for name in TEACHER_COLUMNS if name in subset.dataset.column_names]
    about = subset.report.details.get("teacher")
    if not names or not about:
        raise SettingError(
            f"The subset has no soft labels (its columns: {', '.join(subset.dataset.column_names)}). Call "
            "add_soft_labels(subset, teacher) first, or subset.save(folder) to save it without."
        )
    with save_aside(folder, overwrite) as aside:
        subset.save(aside)
        path = aside / LABELS_FILE
        subset.dataset.select_columns(about["columns"]).with_format(None).to_parquet(path)
        content = {"format_version": FORMAT_VERSION, "rows": len(subset), "sha256": _sha256(path)}
        content["indices"] = _digest(subset.indices)
        (aside / ABOUT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_soft_labels(folder: str | Path, dataset: Dataset) -> Subset:
    """The subset with its soft labels that `save_soft_labels` wrote.

    Args:
        folder: Where it lies.
        dataset: The full data set that it was picked from.

    Raises:
        CheckpointError: No subset with soft labels lies there, or a file is corrupt or of another subset.
        SettingError: The data set has other rows than the one that the subset was picked from.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    folder = Path(folder)
    about = _read_about(folder / ABOUT_FILE)
    subset = Subset.load(folder, dataset)
    path = folder / LABELS_FILE
    try:
        same = _sha256(path) == about["sha256"]
    except OSError as error:
        raise CheckpointError(f"Can't read {path}: {error}. Give the folder that save_soft_labels wrote.") from None
    if not same:
        raise CheckpointError(f"{path} is not the file that was saved: its sha256 differs. It is corrupt or changed.")
    if about["indices"] != _digest(subset.indices):
        raise CheckpointError(f"{path} was made for other rows than {folder / 'indices.npy'} names.")
    try:
        answered = datasets.Dataset(InMemoryTable(parquet.read_table(path)))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CheckpointError(f"Can't read {path}: {error}.") from None
    if len(answered) != len(subset):
        raise CheckpointError(f"{path} must hold {len(subset)} rows, as the report says, got {len(answered)}.")
    return dataclasses.replace(subset, dataset=_join(subset.dataset, answered))


def _without_answers(subset: Any) -> Dataset:
    """The rows without answers of an earlier teacher, and without inputs that were encoded for it."""
    rows = subset.dataset
    before = subset.report.details.get("teacher")
    made = set(TEACHER_COLUMNS) | ({*before["columns"]} - {"labels"} if before else set())
    return rows.remove_columns([name for name in rows.column_names if name in made])


def _class_order(rows: Dataset, model: Any) -> list[int] | None:
    """The teacher's class for each of the data set's, by name; None where they agree or have no names in common."""
    column = find_label_column(rows)
    names = None if column is None else class_names(rows, column)
    if names is None or model.config.num_labels == 1:
        return None
    if len(names) != model.config.num_labels:
        raise SettingError(
            f"The data set has {len(names)} classes ({', '.join(names[:5])}) in {column!r}, the teacher "
            f"{model.config.num_labels} ({list(model.config.id2label.values())[:5]}). Give a teacher of the same "
            "classes."
        )
    id2label = model.config.id2label
    theirs = {str(name).casefold(): int(number) for number, name in id2label.items()}
    ours = [name.casefold() for name in names]
    if set(ours) != set(theirs):
        logger.warning(
            "The data set's classes %s have other names than the teacher's %s: taken to be in the same order.",
            names,
            list(id2label.values()),
        )
        return None
    order = [theirs[name] for name in ours]
    return None if order == sorted(order) else order


def _names(rows: Dataset, model: Any, order: Sequence[int] | None) -> list[str]:
    names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
    return names if order is None else [names[number] for number in order]


def _in_order(answered: Dataset, order: list[int]) -> Dataset:
    """`teacher_logits` (…, classes) with the classes in another order."""

    def permute(batch: dict[str, Any]) -> dict[str, Any]:
        permuted = [np.asarray(row, dtype=np.float32)[..., order].tolist() for row in batch["teacher_logits"]]
        return {"teacher_logits": permuted}

    return answered.map(permute, batched=True, features=answered.features)


def _join(rows: Dataset, answered: Dataset) -> Dataset:
    """Raw columns first; where the rows were encoded, only one column is left that a Trainer takes for `labels`."""
    from datasets import concatenate_datasets

    encoded = any(name in answered.column_names for name in ("labels", *INPUT_COLUMNS))
    dropped = (*answered.column_names, *(OWN_LABELS if encoded else ()))
    kept = [name for name in rows.column_names if name not in dropped]
    if not kept:
        return answered
    return concatenate_datasets([rows.select_columns(kept).flatten_indices(), answered], axis=1)


def _with_dataset(subset: Any, dataset: Dataset, details: dict[str, Any]) -> Any:
    report = dataclasses.replace(subset.report, details={**subset.report.details, "teacher": details})
    return dataclasses.replace(subset, dataset=dataset, report=report)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large; at most {MAX_CONFIG_BYTES:,} bytes are read.")
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Can't read {path}: {error}. Give the folder that save_soft_labels wrote; Subset.load reads one without."
        ) from None
    if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} must be of format {FORMAT_VERSION}. Upgrade with: pip install -U hfshrink")
    if not all(isinstance(about.get(name), str) for name in ("sha256", "indices")):
        raise CheckpointError(f"{path} lacks the digests of the soft labels.")
    return about


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(indices: Any) -> str:
    return hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
