"""The rows of a run: checked before it, joined with cached answers, and divided between student and teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hfshrink.data import LANGUAGE_TASKS, row_lengths
from hfshrink.distillation.teachers.alignment import check_lengths
from hfshrink.distillation.teachers.cache import cache_teacher
from hfshrink.distillation.teachers.collator import TEACHER_COLUMNS
from hfshrink.distillation.teachers.panel import SPANS
from hfshrink.errors import SettingError
from hfshrink.labels import check_class_order, class_names, find_label_column
from hfshrink.record import config_of, model_name

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself
STUDENT_WROTE = "student_wrote"  # marks a batch whose tokens the student made up: it has no labels of anyone's
NO_LABELS = (
    "{what} has no labels (it has {names}), but label_weight is {weight}. Add labels, or set label_weight=0 to learn "
    "from the teacher alone."
)


class RowsMixin(_Trainer):
    """The parts of `DistillationMixin` that look at data sets and batches."""

    _signature_columns: Any
    train_dataset: Any
    eval_dataset: Any

    def _check_dataset(self) -> None:
        if not isinstance(self.train_dataset, Dataset):
            return  # others tell their columns and lengths only while they are read
        columns = set(self.train_dataset.column_names)
        if len(self.train_dataset) == 0:
            raise SettingError("train_dataset is empty: it has no rows.")
        if self.args.remove_unused_columns and not (self._student_accepts - set(self.label_names)) & columns:
            raise SettingError(
                f"train_dataset has the columns {', '.join(sorted(columns))}, none of which "
                f"{type(self.model).__name__} takes. Tokenize it first, or set remove_unused_columns=False and let "
                "the collator do it."
            )
        labels = {*self.label_names, "label", "label_ids"}
        if self._uses_labels() and self._task not in LANGUAGE_TASKS and not labels & columns:  # LM collators make them
            raise SettingError(NO_LABELS.format(what="train_dataset", names=sorted(columns), weight=self.label_weight))
        if (column := find_label_column(self.train_dataset)) is not None:
            names = class_names(self.train_dataset, column)
            check_class_order(names or [], config_of(self.model), f"The column {column!r} has the classes")
        if "input_ids" in columns:
            teacher = None if self._crosses_tokenizers() else self.teacher
            check_lengths(max(row_lengths(self.train_dataset)), self.model, teacher)

    def _read_cache(self, folder: str | Path) -> None:
        """Put the teacher's answers, computed once and kept in `folder`, beside the rows."""
        if self.teachers is None or len(self.teachers.models) > 1:
            raise SettingError("teacher_cache keeps the answers of one teacher: give exactly one teacher=.")
        how = {"cache_dir": folder, "data_collator": self.data_collator}
        if not isinstance(self.train_dataset, Dataset):
            raise SettingError(f"teacher_cache needs a datasets.Dataset, got {type(self.train_dataset).__name__}.")

        def cached(rows: Any) -> Any:
            if isinstance(rows, dict):
                return {name: cached(part) for name, part in rows.items()}
            if not isinstance(rows, Dataset) or has_answers(rows):
                return rows
            return cache_teacher(rows, self.teacher, self.processing_class, **how)

        self.train_dataset = cached(self.train_dataset)
        if self._task not in LANGUAGE_TASKS:  # a few tokens' probabilities do not tell how often both agree
            self.eval_dataset = cached(self.eval_dataset)

    def _check_answers(self) -> None:
        """Hold the cached logits of one row against those of the teacher that is given: they must be its own."""
        rows = self.train_dataset
        if self.teachers is None or not isinstance(rows, Dataset) or TEACHER_COLUMNS[0] not in rows.column_names:
            return
        row = self._remove_unused_columns(rows.select([0]), description="check")
        batch = self._with_decoder_inputs(self._prepare_inputs(self.data_collator([row[0]])))
        head = self._head(batch)
        kept, live = self._teacher_outputs(batch, head), self.teachers.ask(batch, self.label_names)
        for name in SPANS if head == "span" else ("logits",):
            ours, theirs = getattr(kept, name).float(), getattr(live, name).float()
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0.02, atol=0.02):
                raise SettingError(
                    f"The {TEACHER_COLUMNS[0]} of the first row are not this teacher's: {ours.flatten()[:4].tolist()} "
                    f"there, {theirs.flatten()[:4].tolist()} from {model_name(self.teacher) or 'the model'}. Cache "
                    "its own answers, or leave out teacher=."
                )

    def _held_out_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of `eval_dataset` (of several the first), the same on every process."""
        rows = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="calibration")
        for batch in DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator):
            yield self._with_decoder_inputs(self._prepare_inputs(batch))

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders make their decoder's inputs from the labels.

        The teacher, which sees no labels, needs them.
        """
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if make is None or inputs.get("labels") is None or "decoder_input_ids" in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": make(labels=inputs["labels"])}

    def _student_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        teacher_inputs = set() if self.teachers is None else self.teachers.all_inputs
        only_teacher = (teacher_inputs - self._student_accepts) | {*TEACHER_COLUMNS, STUDENT_WROTE}
        return {name: value for name, value in inputs.items() if name not in only_teacher}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads.

        A BERT teacher needs the token types that DistilBERT does without.
        """
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            self._signature_columns += sorted(
                {*TEACHER_COLUMNS, *(() if self.teachers is None else self.teachers.all_inputs)}
            )


def has_answers(dataset: Any) -> bool:
    """Whether a data set, or any of several, has columns with a teacher's cached answers."""
    if isinstance(dataset, dict):
        return any(has_answers(part) for part in dataset.values())
    return bool(set(TEACHER_COLUMNS) & set(getattr(dataset, "column_names", None) or ()))
