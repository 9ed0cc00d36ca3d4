"""`DistillationMixin` teaches any transformers Trainer to distil; `DistillationTrainer` is the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hfshrink.data import LANGUAGE_TASKS
from hfshrink.distillation.checks import check_number
from hfshrink.distillation.losses.logits import CrossTokenizerLoss, LogitLoss, loss_mask
from hfshrink.distillation.teachers.alignment import check_finite, head_kind
from hfshrink.distillation.teachers.collator import TEACHER_COLUMNS, TeacherCollator, teacher_outputs
from hfshrink.distillation.teachers.panel import Teachers, in_student_order
from hfshrink.distillation.texts.on_policy import OnPolicy
from hfshrink.distillation.training.agreement import AgreementMixin
from hfshrink.distillation.training.batches import (
    nothing,
    on_device,
    with_labels_that_count,
    with_spans_nowhere,
    without_padding,
)
from hfshrink.distillation.training.history import record_distillation
from hfshrink.distillation.training.items import ItemsMixin, count_items, share_of_labelled
from hfshrink.distillation.training.language import LanguageMixin
from hfshrink.distillation.training.rows import NO_LABELS, STUDENT_WROTE, RowsMixin, has_answers
from hfshrink.distillation.training.signals import SignalsMixin
from hfshrink.errors import SettingError
from hfshrink.loading import infer_task
from hfshrink.mixins import PublishingMixin
from hfshrink.modules import accepted_inputs


class DistillationMixin(LanguageMixin, SignalsMixin, AgreementMixin, ItemsMixin, RowsMixin, PublishingMixin):
    """Adds a teacher to a Trainer: put it first, as in `class Mine(DistillationMixin, Seq2SeqTrainer): …`.

    The training loss is `label_weight · the student's own loss + Σ weight · part`, every part a mean over the items
    (examples, or positions for token heads) of the whole accumulated batch on all processes; parts that look inside
    the models are means over each batch's positions, weighed by its items. Examples whose label is −100 have none:
    they take part in all but the student's own loss. The teacher is frozen, in eval mode and never
    saved with the student; where the data set holds its cached answers (`cache_teacher`) it is not run at all. Each
    part is logged, and every evaluation adds agreement with the teacher and the teacher's own metrics.

    Args:
        teacher: A model, folder or Hub id, or a list of them; None with cached answers in the student's label order,
            with `ema_decay`, or with losses that need none (`DeepToShallowLoss`).
        losses: Callables with `name` and `weight`, called as `loss(student_outputs, teacher_outputs, head=…, mask=…,
            labels=…)`; None means `[LogitLoss()]`, for language models at temperature 1.
        label_weight: Factor of the student's own loss on the labels; 0 trains without labels.
        final_label_weight: The factor at the end of training, linear in between; None keeps it constant. Teacher
            annealing (Clark et al. 2019, arXiv:1907.04829) is `label_weight=0, final_label_weight=1` with
            `LogitLoss(weight=1, final_weight=0)`.
        teacher_weights: Of several teachers: "uniform", a number for each, or "confidence" (by each example's entropy,
            temperatures calibrated on `eval_dataset`).
        teacher_cache: Folder in which the teacher's answers are kept: it runs once over the data, not in each epoch.
        ema_decay: The teacher is a moving average of the student's own weights with this decay, such as 0.999.
        on_policy: Share of batches that a causal language model continues itself before it is taught (GKD).
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        SettingError: Teacher and student do not fit (labels, vocabulary, tokenizer, kind of head, length), no signal
            at all, or an empty data set.
        CheckpointError: `teacher_cache` holds the answers of another teacher, or is damaged.
    """

    # Each part is divided by the items of the accumulated batch here, so the Trainer must not divide again.
    loss_is_scaled_for_ga: bool | None = True

    data_collator: Any
    teachers: Teachers | None

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        losses: Sequence[Callable[..., Tensor]] | None = None,
        label_weight: float = 0.5,
        final_label_weight: float | None = None,
        teacher_weights: Any = "uniform",
        teacher_cache: str | Path | None = None,
        ema_decay: float | None = None,
        on_policy: OnPolicy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._task = infer_task(self.model)
        if losses is not None and not isinstance(losses, list | tuple):
            raise SettingError(f"losses must be a list, such as [LogitLoss()], got {type(losses).__name__}.")
        self.losses: list[Any] = [default_loss(self._task)] if losses is None else list(losses)
        self.label_weight, self.final_label_weight = label_weight, final_label_weight
        self.ema_decay, self.on_policy = ema_decay, on_policy
        self._loss_sums: dict[str, Tensor] = {}  # of each part, since the last log
        self._loss_steps = 0  # optimizer steps since the last log
        self._parts, self._recorders = nn.ModuleDict(), {}
        self._student_accepts = accepted_inputs(self.model)  # a sharded model tells it no more
        self._check_signals()
        self.teachers = self._make_teachers(teacher, teacher_weights)
        self._check_teaching()
        self._check_language()
        self._check_dataset()
        if teacher_cache is not None:
            self._read_cache(teacher_cache)
        if self.ema_decay is None:
            self._prepare_losses()  # what does not fit is told before training
        if has_answers(self.train_dataset) or has_answers(self.eval_dataset):
            encoder_decoder = bool(self.model.config.is_encoder_decoder)
            self.data_collator = TeacherCollator(self.data_collator, encoder_decoder)
            self._check_answers()

    @property
    def teacher(self) -> Any:
        """The (first) teacher; None without one."""
        return None if self.teachers is None else self.teachers.models[0]

    def _make_teachers(self, teacher: Any, weights: Any) -> Teachers | None:
        if teacher is None:
            return None
        if self.ema_decay is not None:
            raise SettingError("Give teacher= or ema_decay=, not both: with ema_decay the student's average teaches.")
        given = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        return Teachers(
            given,
            self.model,
            self.processing_class,
            weights=weights,
            device=self.args.device,
            same_tokens=not self._crosses_tokenizers(),
        )

    def _check_teaching(self) -> None:
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, "between 0 and 1, such as 0.999,", lambda value: 0 < value < 1)
            if self.is_fsdp_enabled or self.is_distributed_loading_by_transformers:
                raise SettingError("ema_decay keeps a copy of the student, which a sharded student does not allow.")
        cached = has_answers(self.train_dataset)
        needed = [type(loss).__name__ for loss in self.losses if getattr(loss, "needs_teacher", True)]
        without = self.teachers is None and self.ema_decay is None and not cached
        if needed and without:
            raise SettingError(
                f"The losses {', '.join(needed)} need a teacher: give teacher=, ema_decay=, or a train_dataset with "
                f"cached answers (cache_teacher adds the column {TEACHER_COLUMNS[0]!r})."
            )
        if cached and self.teachers is not None and len(self.teachers.models) > 1:
            raise SettingError("train_dataset holds one teacher's cached answers, but several teachers are given.")
        if self.teachers is not None and self.teachers.weights == "confidence" and self.eval_dataset is None:
            raise SettingError("teacher_weights='confidence' is calibrated on held-out rows: give eval_dataset=.")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then add the step to the student's record."""
        start = time.perf_counter()
        output = super().train(*args, **kwargs)
        record_distillation(self, self._before, time.perf_counter() - start)
        return output

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss in training, the student's own loss in evaluation."""
        inputs = self._with_decoder_inputs(inputs)
        if not model.training:
            given = with_spans_nowhere(self._student_inputs(inputs))
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        head = self._head(inputs)
        mask = loss_mask(inputs, head)
        inputs = with_labels_that_count(inputs, head, mask)
        in_chunks = not return_outputs and self._in_chunks(head, inputs)
        compute = self._chunked_parts if in_chunks else self._all_parts
        parts, outputs, theirs = compute(model, inputs, head, mask)
        share = self._share(count_items(inputs, mask), num_items_in_batch)
        total = sum(weight * value for weight, value in parts.values()) * share
        if not parts or (self.accelerator.num_processes > 1 and not in_chunks):
            total = total + nothing(outputs)  # every process must send a gradient of every weight
        if not torch.isfinite(total):
            self._explain_nonfinite(outputs, theirs)
        self._remember({name: value.detach() * share for name, (_, value) in parts.items()})
        return (total, outputs) if return_outputs else total

    def _all_parts(
        self, model: Any, inputs: dict[str, Any], head: str, mask: Tensor | None
    ) -> tuple[dict[str, tuple[float, Tensor]], Any, Any]:
        """Each part's weight and value, the student's outputs and the teacher's."""
        label_loss, outputs = self._label_loss(model, inputs, mask)
        theirs = self._teacher_outputs(inputs, head) if self._asks_teacher() else None
        self._add_features(outputs, theirs, inputs)
        parts = {} if label_loss is None else {"labels": (self._label_weight_now(), label_loss)}
        labels = inputs.get(self.label_names[0]) if self.label_names else None
        padding = inputs.get("attention_mask") if head == "span" else None
        ours, theirs = without_padding(outputs, padding), without_padding(theirs, padding)
        for loss in self.losses:
            weight = self._weight_now(loss)
            if weight:
                call: Any = self._parts[loss.name] if loss.name in self._parts else loss  # noqa: SIM401 no dict
                crossed = isinstance(loss, CrossTokenizerLoss)
                sides = self._paired(outputs, inputs) if crossed else (ours, theirs)
                kept = None if crossed else mask
                parts[loss.name] = (weight, call(*sides, head=head, mask=kept, labels=labels))
        return parts, outputs, theirs

    def _head(self, inputs: dict[str, Any]) -> str:
        return head_kind(self._task, self.model.config, self.teacher, inputs.get("labels"))

    def _label_loss(self, model: Any, inputs: dict[str, Any], mask: Tensor | None) -> tuple[Tensor | None, Any]:
        """The student's own loss over this batch's items (label smoothing and `compute_loss_func` included)."""
        given = self._student_inputs(inputs)
        has_labels = any(given.get(name) is not None for name in self.label_names)
        if not self._label_weight_now() or inputs.get(STUDENT_WROTE):
            return None, model(**{name: value for name, value in given.items() if name not in self.label_names})
        if not has_labels:
            raise SettingError(NO_LABELS.format(what="The batch", names=list(inputs), weight=self.label_weight))
        known = share_of_labelled([given.get(name) for name in self.label_names], mask)
        given = with_spans_nowhere(given)
        # Without num_items_in_batch the loss is the mean of this batch, whether or not the model honours it.
        loss, outputs = super().compute_loss(model, dict(given), return_outputs=True, num_items_in_batch=None)
        logits = getattr(outputs, "logits", None)
        if logits is not None and torch.is_grad_enabled() and not logits.requires_grad:
            # a fused loss (TRL's SFTTrainer) gives logits without gradient: the teacher's part needs one
            outputs = model(**{name: value for name, value in given.items() if name not in self.label_names})
        if not known:  # a mean of nothing: NaN, though this batch has no share in the step
            return nothing(outputs), outputs
        return loss.mean() * known, outputs

    def _asks_teacher(self) -> bool:
        return any(getattr(loss, "needs_teacher", True) and self._weight_now(loss) for loss in self.losses)

    def _can_compare(self, inputs: dict[str, Any]) -> bool:
        return not self._crosses_tokenizers() and (
            self.teachers is not None or bool(set(TEACHER_COLUMNS) & set(inputs))
        )

    def _teacher_outputs(self, inputs: dict[str, Any], head: str) -> Any:
        if self._crosses_tokenizers():
            return None  # it reads other tokens: see _paired
        outputs = None if "teacher" in self._recorders else teacher_outputs(inputs, head)
        if outputs is not None:
            order = self.teachers.orders[0] if self.teachers is not None else None
            if order is not None and hasattr(outputs, "logits"):
                outputs.logits = in_student_order(outputs.logits, order)
            return outputs
        if self.teachers is None:
            raise SettingError(
                f"The batch has no {TEACHER_COLUMNS[0]!r} and there is no teacher. Does the data collator drop it?"
            )
        if self.teachers.weights == "confidence" and self.teachers.temperatures is None:
            self.teachers.calibrate(self._held_out_batches(), self.label_names, head)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return on_device(self.teachers.ask(inputs, self.label_names), self.args.device)

    def _add_features(self, student: Any, teacher: Any, inputs: dict[str, Any]) -> None:
        """Put what the recorders saw beside the outputs, for the losses that look inside the models."""
        padding = inputs.get("attention_mask")
        padding = padding.bool() if isinstance(padding, Tensor) and padding.ndim == 2 else None
        for role, outputs in (("student", student), ("teacher", teacher)):
            if role in self._recorders:
                outputs.features = self._recorders[role].take(padding)

    # -- logs

    def _remember(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add each loss part to training logs: its mean over the steps since the last log, 0 where it was absent."""
        if "loss" in logs and self._loss_sums:
            for name, value in self._loss_sums.items():
                logs[f"loss_{name}"] = self.accelerator.gather(value).mean().item() / max(self._loss_steps, 1)
            self._loss_sums, self._loss_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _explain_nonfinite(self, student: Any, teacher: Any) -> None:
        for role, outputs in (("teacher", teacher), ("student", student)):
            for name in ("logits", "start_logits", "end_logits", "hidden"):
                if isinstance(getattr(outputs, name, None), Tensor):
                    check_finite(getattr(outputs, name), f"At step {self.state.global_step} the {role}'s {name}")
        raise SettingError(
            f"At step {self.state.global_step} the loss is not finite, though all logits are. Check the labels."
        )


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


def default_loss(task: str) -> LogitLoss:
    """The loss where none is named: soft targets for few classes, the plain distribution for a vocabulary."""
    return LogitLoss(temperature=1.0) if task in LANGUAGE_TASKS else LogitLoss()
