"""`DistillationMixin` teaches any transformers Trainer to distil; `DistillationTrainer` is the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from hfshrink.data import LANGUAGE_TASKS, row_lengths
from hfshrink.distillation.losses import LogitLoss, loss_mask
from hfshrink.distillation.teacher import (
    TEACHER_LOGITS,
    align,
    ask_teacher,
    check_finite,
    check_lengths,
    head_kind,
    prepare_teacher,
)
from hfshrink.errors import SettingError
from hfshrink.loading import infer_task
from hfshrink.measurement import Measurement
from hfshrink.modules import accepted_inputs, count_parameters
from hfshrink.record import StepRecord, append_step, config_of, model_name

NO_LABELS = (
    "{what} has no labels (it has {names}), but label_weight is {weight}. Add labels, or set label_weight=0 to learn "
    "from the teacher alone."
)
_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself


class DistillationMixin(_Trainer):
    """Adds a teacher to a Trainer: put it first, as in `class Mine(DistillationMixin, Seq2SeqTrainer): …`.

    The training loss is `label_weight · the student's own loss + Σ weight · part`, every part a mean over the items
    (examples, or positions for token heads) of the whole accumulated batch on all processes. Evaluation shows the
    student's own loss. The teacher is frozen, in eval mode, never saved with the student, and not run at all where the
    data set holds `teacher_logits`.

    Args:
        teacher: A model, folder or Hub id; None only with a data set that holds `teacher_logits` in the student's
            label order.
        losses: Callables with `name` and `weight`, called as `loss(student_outputs, teacher_outputs, head=…, mask=…)`;
            None means `[LogitLoss()]`.
        label_weight: Factor of the student's own loss on the labels; 0 trains without labels.
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        SettingError: Teacher and student do not fit (labels, vocabulary, tokenizer, kind of head, length), no signal
            at all, or an empty data set.
    """

    # Each part is divided by the items of the accumulated batch here, so the Trainer must not divide again.
    loss_is_scaled_for_ga: bool | None = True
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        losses: Sequence[Callable[..., Tensor]] | None = None,
        label_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Any] = [LogitLoss()] if losses is None else list(losses)
        self.label_weight = label_weight
        self._loss_sums: dict[str, Tensor] = {}  # of each part, since the last log
        self._loss_steps = 0  # optimizer steps since the last log
        self._check_signals()
        self._task = infer_task(self.model)
        self.teacher: Any = None
        self._label_order: Tensor | None = None
        self._teacher_inputs: set[str] = set()
        if teacher is not None:
            self._set_teacher(teacher)
        elif not _has_column(self.train_dataset, TEACHER_LOGITS):
            raise SettingError(
                f"Give teacher=, or a train_dataset with the column {TEACHER_LOGITS!r} (add_teacher_logits makes it)."
            )
        self._check_dataset()

    def _check_signals(self) -> None:
        if self.label_weight < 0:
            raise SettingError(f"label_weight must not be negative, got {self.label_weight}.")
        names = [getattr(loss, "name", type(loss).__name__) for loss in self.losses]
        if len(set(names)) != len(names):
            raise SettingError(f"Each loss must have a name of its own, got {names}.")
        if not self.label_weight and not any(loss.weight for loss in self.losses):
            raise SettingError("label_weight and all weights are 0: there is nothing to learn from.")

    def _set_teacher(self, teacher: Any) -> None:
        if teacher is self.model:
            raise SettingError(
                "Teacher and student are the same object. Make a copy, or a smaller one: make_student(teacher, 3)."
            )
        self.teacher, processor = prepare_teacher(teacher)
        self._label_order = align(self.model, self.teacher, self.processing_class, processor)
        self._teacher_inputs = accepted_inputs(self.teacher)
        if not getattr(self.teacher, "hf_device_map", None) and not getattr(self.teacher, "is_quantized", False):
            self.teacher.to(self.args.device)

    def _check_dataset(self) -> None:
        if not isinstance(self.train_dataset, Dataset):
            return  # others tell their columns and lengths only while they are read
        columns = set(self.train_dataset.column_names)
        if len(self.train_dataset) == 0:
            raise SettingError("train_dataset is empty: it has no rows.")
        if self.args.remove_unused_columns and not (accepted_inputs(self.model) - set(self.label_names)) & columns:
            raise SettingError(
                f"train_dataset has the columns {', '.join(sorted(columns))}, none of which "
                f"{type(self.model).__name__} takes. Tokenize it first, or set remove_unused_columns=False and let "
                "the collator do it."
            )
        labels = {*self.label_names, "label", "label_ids"}
        if (
            self.label_weight and self._task not in LANGUAGE_TASKS and not labels & columns
        ):  # LM collators make the labels
            raise SettingError(NO_LABELS.format(what="train_dataset", names=sorted(columns), weight=self.label_weight))
        if "input_ids" in columns:
            check_lengths(max(row_lengths(self.train_dataset)), self.model, self.teacher)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then add the step to the student's record."""
        start = time.perf_counter()
        before = self._size()
        self._loss_sums, self._loss_steps = {}, 0
        output = super().train(*args, **kwargs)
        self._record_step(before, time.perf_counter() - start)
        return output

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss in training, the student's own loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, self._student_inputs(inputs), return_outputs, num_items_in_batch)
        inputs = self._with_decoder_inputs(inputs)
        head = self._head(inputs)
        mask = loss_mask(inputs, head)
        label_loss, outputs = self._label_loss(model, self._student_inputs(inputs), mask)
        theirs = self._teacher_outputs(inputs, head)
        parts = {} if label_loss is None else {"labels": (self.label_weight, label_loss)}
        for loss in self.losses:
            if loss.weight:
                parts[loss.name] = (loss.weight, loss(outputs, theirs, head=head, mask=mask))
        share = self._share(_count_items(inputs, mask), num_items_in_batch)
        total = sum(weight * value for weight, value in parts.values()) * share
        if not torch.isfinite(total):
            self._explain_nonfinite(outputs, theirs)
        self._remember({name: value.detach() * share for name, (_, value) in parts.items()})
        return (total, outputs) if return_outputs else total

    def _head(self, inputs: dict[str, Any]) -> str:
        return head_kind(self._task, self.model.config, self.teacher, inputs.get("labels"))

    def _label_loss(self, model: Any, inputs: dict[str, Any], mask: Tensor | None) -> tuple[Tensor | None, Any]:
        """The mean of the student's own loss over this batch (label smoothing and `compute_loss_func` included)."""
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        if not self.label_weight:
            return None, model(**{name: value for name, value in inputs.items() if name not in self.label_names})
        if not has_labels:
            raise SettingError(NO_LABELS.format(what="The batch", names=list(inputs), weight=self.label_weight))
        # Without num_items_in_batch the loss is the mean of this batch, whether or not the model honours it.
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=None)
        if mask is not None and not mask.any():  # a mean of nothing: NaN, though this batch has no share in the step
            return outputs.logits.sum() * 0.0, outputs
        return loss.mean(), outputs

    def _teacher_outputs(self, inputs: dict[str, Any], head: str) -> Any:
        if TEACHER_LOGITS in inputs:
            outputs = SimpleNamespace(logits=inputs[TEACHER_LOGITS])
        elif self.teacher is None:
            raise SettingError(
                f"The batch has no {TEACHER_LOGITS!r} and there is no teacher. Does the data collator drop it?"
            )
        else:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                outputs = ask_teacher(self.teacher, inputs, self._teacher_inputs, set(self.label_names))
        if self._label_order is not None and head != "span":
            outputs.logits = outputs.logits[..., self._label_order.to(outputs.logits.device)]
        return outputs

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders make their decoder's inputs from the labels.

        The teacher, which sees no labels, needs them.
        """
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if make is None or inputs.get("labels") is None or "decoder_input_ids" in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": make(labels=inputs["labels"])}

    def _student_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        only_teacher = (self._teacher_inputs - accepted_inputs(self.model)) | {TEACHER_LOGITS}
        return {name: value for name, value in inputs.items() if name not in only_teacher}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads.

        A BERT teacher needs the token types that DistilBERT does without.
        """
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            self._signature_columns += sorted(self._teacher_inputs | {TEACHER_LOGITS})

    # -- scaling: every part is a sum over items, divided by the items of all accumulated batches on all processes

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step, and the number of their items on all processes together."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._loss_steps += bool(samples)
        counts = [_count_items(batch, loss_mask(batch, self._head(batch))) for batch in samples]
        return samples, self.accelerator.gather(torch.tensor(sum(counts), device=device)).sum()

    def _share(self, items: int, num_items_in_batch: Any) -> Any:
        """Weight of this batch's mean; the processes' gradients are averaged afterwards, hence their number."""
        if num_items_in_batch is None:
            return 1.0 / self.current_gradient_accumulation_steps
        return items * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    # -- logs and the record

    def _remember(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss part since the last log to training logs; evaluation logs stay as they are."""
        if "loss" in logs and self._loss_sums:
            for name, value in self._loss_sums.items():
                logs[f"loss_{name}"] = self.accelerator.gather(value).mean().item() / max(self._loss_steps, 1)
            self._loss_sums, self._loss_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _explain_nonfinite(self, student: Any, teacher: Any) -> None:
        for role, outputs in (("teacher", teacher), ("student", student)):
            for name in ("logits", "start_logits", "end_logits"):
                if getattr(outputs, name, None) is not None:
                    check_finite(getattr(outputs, name), f"At step {self.state.global_step} the {role}'s {name}")
        raise SettingError(
            f"At step {self.state.global_step} the loss is not finite, though all logits are. Check the labels."
        )

    def _size(self) -> Measurement:
        parameters, nonzero = count_parameters(self.model)
        return Measurement(parameters=parameters, nonzero_parameters=nonzero)

    def _record_step(self, before: Measurement, seconds: float) -> None:
        losses = {
            loss.name: {k: v for k, v in vars(loss).items() if isinstance(v, str | int | float | bool)}
            for loss in self.losses
        }
        names = (
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "seed",
        )
        step = StepRecord(
            technique="distill",
            method=" + ".join(losses),
            settings={
                "teacher": None if self.teacher is None else model_name(self.teacher),
                "losses": losses,
                "label_weight": self.label_weight,
                **{name: getattr(self.args, name) for name in names},
            },
            before=before,
            after=self._size(),
            results={"train_examples": _count_rows(self.train_dataset), "steps": self.state.global_step},
            seconds=seconds,
            source="Hinton et al. 2015, arXiv:1503.02531",
        )
        base = None if self.teacher is None else model_name(self.teacher)
        append_step(config_of(self.model), step, base_model=base, task=self._task)


class DistillationTrainer(DistillationMixin, Trainer):
    """A transformers Trainer with a teacher; see `DistillationMixin` for the extra arguments.

    Example:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hfshrink import make_student
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
        >>> teacher = BertForSequenceClassification(config)
        >>> student = make_student(teacher, num_layers=1)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> settings = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = TrainingArguments(tempfile.mkdtemp(), **settings)
        >>> trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> student.config.hfshrink["history"][-1]["technique"]
        'distill'
    """


def _count_items(inputs: dict[str, Any], mask: Tensor | None) -> int:
    """Examples of a batch, or positions that count where the head answers per token."""
    if mask is not None:
        return int(mask.sum())
    return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def _count_rows(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _has_column(dataset: Any, name: str) -> bool:
    return name in (getattr(dataset, "column_names", None) or ())
