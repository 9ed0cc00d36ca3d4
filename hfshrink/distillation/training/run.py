"""`distill`: a whole distillation in one call."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import DataCollatorForLanguageModeling, PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hfshrink.data import INPUT_COLUMNS, collate, encode, read_dataset
from hfshrink.distillation.teachers.cache import cache_teacher
from hfshrink.distillation.training.rows import has_answers
from hfshrink.distillation.training.trainer import DistillationMixin, DistillationTrainer
from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED, check_class_labels
from hfshrink.loading import infer_task, load

DEFAULTS = {
    "num_train_epochs": 3,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "report_to": "none",
}
ONE_ROW_TASKS = ("text-classification", "image-classification")  # few numbers per example: cached in memory


def distill(
    student: Any,
    teacher: Any,
    train_dataset: Any,
    *,
    eval_dataset: Any = None,
    losses: Sequence[Any] | None = None,
    label_weight: float | None = None,
    generations: int = 1,
    text_columns: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Any:
    """Train a student to do what its teacher does (Hinton et al. 2015, arXiv:1503.02531).

    Rows are tokenized, padded and batched; the teacher runs once over them where its answers are small
    (classification) and nothing looks inside it. What training needs beyond this goes to `DistillationTrainer`.

    Args:
        student: A model, folder or Hub id with the teacher's kind of head, such as `make_student(teacher, 3)`; a model
            is changed in place.
        teacher: A model, folder or Hub id, or a list of them; None with `ema_decay`, or with losses that need none.
        train_dataset: A `datasets.Dataset`, raw or encoded, a folder or a Hub id. Rows without labels, or with −100,
            are learned from the teacher alone.
        eval_dataset: Held-out rows, evaluated after each epoch: loss, accuracy, agreement with the teacher.
        losses: As for `DistillationTrainer`.
        label_weight: Factor of the student's own loss on the labels; None means 0.5 with labels and 0 without.
        generations: More than 1 trains anew as often, each time from the student's first weights, with the student of
            the generation before as the teacher (born-again networks, Furlanello et al. 2018, arXiv:1805.04770).
        text_columns: Columns of text of raw rows; None finds one or two of them.
        output_dir: Folder for checkpoints, one after each epoch; None keeps none.
        resume: Go on from the last checkpoint in `output_dir` where there is one.
        **settings: Of `TrainingArguments` (`num_train_epochs=3`, `learning_rate=1e-4`,
            `per_device_train_batch_size=32`, …) or of `DistillationTrainer` (`teacher_cache`, `ema_decay`, …).

    Returns:
        The student, in eval mode, with the step in its record.

    Raises:
        SettingError: Teacher, student and data do not fit together, or an unknown setting.
        CheckpointError: A model or data set can't be read.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfshrink import make_student
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
        >>> teacher = BertForSequenceClassification(config)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> student = distill(make_student(teacher, num_layers=1), teacher, rows, num_train_epochs=1)
        >>> student.config.hfshrink["history"][-1]["technique"]
        'distill'
    """
    if isinstance(generations, bool) or not isinstance(generations, int) or generations < 1:
        raise SettingError(f"generations must be a number from 1 on, got {generations!r}.")
    if resume and (output_dir is None or generations > 1):
        raise SettingError("resume=True needs output_dir=, and a single generation.")
    student, processor = load(student)
    given = teacher if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    teachers = [load(one) for one in given]
    if generations > 1 and not teachers:
        raise SettingError("generations needs a teacher for the first one.")
    processor = processor or next((found for _, found in teachers if found is not None), None)
    task = infer_task(student)
    rows = prepare_rows(train_dataset, student, processor, task, text_columns)
    held_out = None if eval_dataset is None else prepare_rows(eval_dataset, student, processor, task, text_columns)
    if label_weight is None:
        label_weight = 0.5 if has_labels(rows, task) else 0.0
    first = copy.deepcopy(student.state_dict()) if generations > 1 else None
    current: Any = [model for model, _ in teachers]
    with tempfile.TemporaryDirectory() as nowhere:
        arguments, how = read_settings(settings, output_dir, nowhere, rows, held_out is not None)
        how |= {"losses": losses, "label_weight": label_weight, "processing_class": processor}
        for generation in range(generations):
            if generation:
                current = [copy.deepcopy(student)]
                student.load_state_dict(first)
            if "teacher_cache" in settings and generations > 1:  # each generation has a teacher of its own
                how["teacher_cache"] = Path(settings["teacher_cache"]) / f"generation-{generation}"
            trainer = DistillationTrainer(
                student,
                arguments,
                teacher=current if len(current) > 1 else current[0] if current else None,
                train_dataset=with_answers(rows, current, processor, task, how),
                eval_dataset=held_out,
                data_collator=make_collator(student, processor, task),
                **how,
            )
            trainer.remove_callback(PrinterCallback)  # the records of the run are in its log, not on the screen
            trainer.train(resume_from_checkpoint=last_checkpoint(output_dir) if resume else None)
    return student.eval()


def prepare_rows(dataset: Any, model: Any, processor: Any, task: str, text_columns: Sequence[str] | None) -> Any:
    """Rows as a model takes them; a causal language model learns every token that follows.

    Raises:
        SettingError: Raw question answering, labels that the model does not have.
    """
    rows = read_dataset(dataset)
    if task == "question-answering" and not set(INPUT_COLUMNS) & set(rows.column_names):
        raise SettingError(
            "For question answering give encoded rows: input_ids, attention_mask, start_positions, end_positions."
        )
    encoded = encode(rows, model, processor, task, text_columns=text_columns)
    if task == "text-generation" and "labels" not in encoded.column_names:
        return encoded.add_column("labels", encoded.with_format(None)["input_ids"])
    if "labels" in encoded.column_names and task == "text-classification" and model.config.num_labels > 1:
        flat = [value for value in encoded["labels"] if isinstance(value, int)]
        check_class_labels(flat, model.config.num_labels)
    return encoded


def has_labels(rows: Any, task: str) -> bool:
    """Whether any row has a label; masked language models make theirs."""
    if task == "fill-mask" or "start_positions" in rows.column_names:
        return True
    return "labels" in rows.column_names and any(value != IGNORED for value in rows.with_format(None)["labels"])


def read_settings(
    settings: dict[str, Any], output_dir: str | Path | None, nowhere: str, rows: Any, evaluates: bool
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The TrainingArguments, and what is meant for the Trainer itself.

    Raises:
        SettingError: A name that neither knows; the message suggests the nearest.
    """
    parameters = inspect.signature(DistillationMixin.__init__).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "teacher"]
    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    for name in settings:
        if name not in own and name not in known:
            near = difflib.get_close_matches(name, [*own, *known], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"distill knows no setting {name!r}.{hint}")
    training = {
        **DEFAULTS,
        "save_strategy": "no" if output_dir is None else "epoch",
        "eval_strategy": "epoch" if evaluates else "no",
        "train_sampling_strategy": "group_by_length" if "input_ids" in rows.column_names else "random",
        "disable_tqdm": not sys.stderr.isatty(),
        **{name: value for name, value in settings.items() if name not in own},
    }
    return TrainingArguments(str(output_dir or nowhere), **training), {n: v for n, v in settings.items() if n in own}


def with_answers(rows: Any, teachers: Sequence[Any], processor: Any, task: str, how: dict[str, Any]) -> Any:
    """The rows with one teacher's answers in memory, where they are small and nothing needs the teacher itself."""
    losses = how["losses"] or []
    online = len(teachers) != 1 or any(hasattr(loss, "prepare") for loss in losses) or "teacher_cache" in how
    if task not in ONE_ROW_TASKS or online or has_answers(rows):
        return rows
    return cache_teacher(rows, teachers[0], processor)


def make_collator(model: Any, processor: Any, task: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Rows to padded batches; masked language models get their masks here, anew in each epoch."""
    if task == "fill-mask":
        return DataCollatorForLanguageModeling(processor)
    return lambda rows: collate({name: [row[name] for row in rows] for name in rows[0]}, model, processor)


def last_checkpoint(folder: str | Path | None) -> str | None:
    """The last checkpoint in a folder; None where there is none."""
    return get_last_checkpoint(str(folder)) if folder is not None and Path(folder).is_dir() else None
