"""Which texts a teacher is sure of, as many of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfshrink.data import INPUT_COLUMNS, batches, encode, find_text_columns, read_dataset
from hfshrink.distillation.checks import check_counts, check_number, check_texts
from hfshrink.distillation.teachers.alignment import ask_teacher, check_finite, head_kind
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.labels import find_label_column
from hfshrink.loading import infer_task, load
from hfshrink.modules import accepted_inputs
from hfshrink.record import config_of

if TYPE_CHECKING:
    from datasets import Dataset

TEACHER_LABEL, TEACHER_CONFIDENCE = "teacher_label", "teacher_confidence"


def filter_by_teacher(
    dataset: Any,
    teacher: Any,
    processor: Any = None,
    *,
    min_confidence: float = 0.7,
    max_per_class: int | None = None,
    balance: bool = True,
    text_columns: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Dataset:
    """Keep the rows that a teacher is sure of, the same number of each class.

    A row's confidence is max softmax(logits), its class the one where the maximum lies. Rows below `min_confidence`
    go. Of each class the most confident rows stay, as many as the rarest class has (`balance`), at most
    `max_per_class`; of equally confident ones the first.

    Args:
        dataset: A `datasets.Dataset`, folder or Hub id, raw or encoded; labels in it are not looked at.
        teacher: A model for text classification (one class per text), folder or Hub id.
        processor: Its tokenizer; None looks beside the model.
        min_confidence: Lowest probability of the predicted class, in [0, 1].
        max_per_class: Most rows per class; None sets no bound.
        balance: Whether no class may have more rows than the rarest.
        text_columns: Columns of text of raw rows; None finds them.
        batch_size: Rows per forward pass.

    Returns:
        The kept rows as they were, in their order, with the columns `teacher_label` (a `ClassLabel` of the teacher's
        names) and `teacher_confidence` (float64).

    Raises:
        SettingError: A number out of range, an empty text, logits that are not finite, no row that is confident
            enough, or, with `balance`, a class without one; the message has the number of rows per class.
        UnsupportedModelError: A head that does not pick one class per text.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> teacher = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=1))
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]})
        >>> filter_by_teacher(rows, teacher, min_confidence=0.5, balance=False).column_names
        ['input_ids', 'teacher_label', 'teacher_confidence']
    """
    import datasets

    if max_per_class is not None:
        check_counts(max_per_class=max_per_class)
    check_number("min_confidence", min_confidence, "in [0, 1]", lambda value: 0 <= value <= 1)
    model, found = load(teacher)
    _check_classifier(model)
    rows = read_dataset(dataset).with_format(None)
    _check_rows(rows, text_columns)
    labels, confidences = _ask(rows, model, processor or found, text_columns, batch_size)
    names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
    sure = confidences >= min_confidence
    _check_counts_per_class(labels, sure, names, min_confidence, balance)
    kept = balanced_rows(labels, confidences, sure, max_per_class, balance)
    chosen = rows.select(kept.tolist())
    chosen = chosen.add_column(TEACHER_LABEL, labels[kept].tolist(), feature=datasets.ClassLabel(names=names))
    feature = datasets.Value("float64")
    return chosen.add_column(TEACHER_CONFIDENCE, confidences[kept].tolist(), feature=feature)


def balanced_rows(
    labels: Tensor, confidences: Tensor, allowed: Tensor, max_per_class: int | None = None, balance: bool = True
) -> Tensor:
    """Row numbers, ascending: of each class the most confident allowed rows, ties to the first.

    Args:
        labels: Class of each row, (rows,) int64.
        confidences: (rows,).
        allowed: Rows that may be kept, (rows,) bool.
        max_per_class: Most rows per class.
        balance: Whether the rarest class among the allowed rows sets the number for all.

    Returns:
        (kept,) int64; empty where no row is allowed.

    Example:
        >>> labels, confidences = torch.tensor([0, 0, 1, 0]), torch.tensor([0.8, 0.9, 0.7, 0.9])
        >>> balanced_rows(labels, confidences, confidences > 0.5).tolist()
        [1, 2]
    """
    if not allowed.any():
        return allowed.nonzero().flatten()
    groups = [torch.nonzero(allowed & (labels == label)).flatten() for label in labels[allowed].unique()]
    most = min(len(group) for group in groups) if balance else len(labels)
    most = most if max_per_class is None else min(most, max_per_class)
    best = [group[confidences[group].argsort(descending=True, stable=True)[:most]] for group in groups]
    return torch.cat(best).sort().values


def _check_classifier(model: Any) -> None:
    task = infer_task(model)
    kind = head_kind(task, config_of(model)) if task == "text-classification" else task
    if kind != "single_label":
        raise UnsupportedModelError(
            f"Expected a teacher that picks one class per text, got {type(model).__name__} ({kind}). "
            "Filter by another model, or keep all texts."
        )


def _check_rows(rows: Dataset, text_columns: Sequence[str] | None) -> None:
    for name in (TEACHER_LABEL, TEACHER_CONFIDENCE):
        if name in rows.column_names:
            raise SettingError(f"The data set has a column {name!r} already. Remove or rename it first.")
    if not any(name in rows.column_names for name in INPUT_COLUMNS):
        for name in find_text_columns(rows, text_columns):
            check_texts(list(rows[name]), f"The column {name!r}")


def _ask(
    rows: Dataset, model: Any, processor: Any, text_columns: Sequence[str] | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The teacher's class, (rows,) int64, and its probability, (rows,) float64, of each row."""
    column = find_label_column(rows)
    unlabelled = rows if column is None else rows.remove_columns([column])
    encoded = encode(unlabelled, model, processor, "text-classification", text_columns=text_columns)
    labels, confidences = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.float64)
    accepted = accepted_inputs(model)
    with eval_mode(model):
        for numbers, inputs in batches(encoded, model, processor, batch_size, "teacher's confidence"):
            logits = ask_teacher(model, inputs, accepted, set()).logits.float().cpu()
            check_finite(logits, "The teacher's logits")
            confidences[numbers], labels[numbers] = logits.double().softmax(dim=-1).max(dim=-1)
    return labels, confidences


def _check_counts_per_class(
    labels: Tensor, sure: Tensor, names: Sequence[str], min_confidence: float, balance: bool
) -> None:
    counts = labels[sure].bincount(minlength=len(names)).tolist()
    if sum(counts) and (all(counts) or not balance):
        return
    shown = ", ".join(
        f"{name}: {kept} of {total}"
        for name, kept, total in zip(names, counts, labels.bincount(minlength=len(names)).tolist(), strict=True)
    )
    raise SettingError(
        f"Too few rows have a confidence of {min_confidence} or more. Per class predicted: {shown}. Lower "
        "min_confidence, add texts of the missing classes, or set balance=False."
    )
