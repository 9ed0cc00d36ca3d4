"""What only causal language models need: losses in chunks, batches that the student wrote, other tokenizers."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hfshrink.distillation.losses.chunks import chunked_losses, run_without_logits, supports_chunks
from hfshrink.distillation.losses.logits import CrossTokenizerLoss, LogitLoss
from hfshrink.distillation.teachers.alignment import ask_teacher
from hfshrink.distillation.texts.on_policy import OnPolicy, generate_batch, is_on_policy_step
from hfshrink.distillation.texts.retokenization import retokenize
from hfshrink.distillation.training.rows import STUDENT_WROTE, has_answers
from hfshrink.distillation.training.signals import is_used
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import max_positions

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself
logger = logging.getLogger(__name__)

HEAD = "causal_tokens"


class LanguageMixin(_Trainer):
    """The parts of `DistillationMixin` for causal language models."""

    losses: list[Any]
    on_policy: OnPolicy | None
    _chunks_fit = True  # until a model turns out to change its logits after the head

    def _crosses_tokenizers(self) -> bool:
        return any(isinstance(loss, CrossTokenizerLoss) and is_used(loss) for loss in self.losses)

    def _check_language(self) -> None:
        causal = self._task == "text-generation"
        if self.on_policy is not None and not isinstance(self.on_policy, OnPolicy):
            raise SettingError(f"on_policy must be an OnPolicy, such as OnPolicy(share=0.5), got {self.on_policy!r}.")
        if self.on_policy is not None and not causal:
            raise SettingError(f"on_policy needs a student that generates text, this one does {self._task}.")
        if self.on_policy is not None and (self.teachers is None or has_answers(self.train_dataset)):
            raise SettingError("on_policy needs a teacher that runs: what the student writes is in no cache.")
        if not self._crosses_tokenizers():
            return
        others = [type(loss).__name__ for loss in self.losses if not isinstance(loss, CrossTokenizerLoss)]
        count = 0 if self.teachers is None else len(self.teachers.models)
        if not causal or others or self.teachers is None or count != 1:
            raise SettingError(
                "CrossTokenizerLoss compares one causal language model with one teacher of another tokenizer, alone; "
                f"got a student for {self._task}, {count} teachers and {', '.join(others) or 'no'} other losses."
            )
        for role, found in (("student", self.processing_class), ("teacher", self.teachers.processors[0])):
            if not hasattr(found, "decode"):
                raise SettingError(
                    f"CrossTokenizerLoss needs the {role}'s tokenizer: pass processing_class= for the student, and "
                    "the teacher as a folder or Hub id with its tokenizer."
                )

    # -- chunks

    def _in_chunks(self, head: str, inputs: dict[str, Any]) -> bool:
        """Whether this batch's losses can be computed without the logits of all positions at once."""
        if head != HEAD or not self._chunks_fit or self._recorders or self._crosses_tokenizers():
            return False
        cached = "teacher_ids" in inputs
        one_teacher = self.teachers is not None and len(self.teachers.models) == 1
        if self._shards_or_has_own_loss() or "teacher_logits" in inputs or not (one_teacher or cached):
            return False
        if self._label_weight_now() and not inputs.get(STUDENT_WROTE) and inputs.get(self.label_names[0]) is None:
            return False  # the plain way says what is missing
        if not all(isinstance(loss, LogitLoss) and loss.chunk_size is not None for loss in self._used_losses()):
            return False
        sides = [self.model] + ([] if cached else [self.teachers.models[0]])
        self._chunks_fit = all(supports_chunks(side) and side.device == self.model.device for side in sides)
        return self._chunks_fit

    def _used_losses(self) -> list[Any]:
        return [loss for loss in self.losses if is_used(loss)]

    def _shards_or_has_own_loss(self) -> bool:
        """Whether the head is whole only inside the model's forward pass, or chunks would replace someone's loss."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers:
            return True
        if self.args.n_gpu > 1 or self.compute_loss_func is not None or self.label_smoother is not None:
            return True
        owner = next(c for c in type(self).__mro__ if "compute_loss" in vars(c) and not issubclass(c, LanguageMixin))
        return owner is not Trainer and bool(self._label_weight_now())  # such as TRL's

    def _chunked_parts(
        self, model: Any, inputs: dict[str, Any], head: str, mask: Tensor | None
    ) -> tuple[dict[str, tuple[float, Tensor]], Any, Any]:
        """As `_all_parts`, with the heads applied to some positions at a time."""
        given = {n: v for n, v in self._student_inputs(inputs).items() if n not in self.label_names}
        try:
            student = run_without_logits(model, self.model, given)
            teacher = self._teacher_in_chunks(inputs)
        except UnsupportedModelError as error:
            logger.info("Losses are computed on all positions at once: %s", error)
            self._chunks_fit = False
            return self._all_parts(model, inputs, head, mask)
        label_weight = 0.0 if inputs.get(STUDENT_WROTE) else self._label_weight_now()
        losses = [loss for loss in self.losses if self._weight_now(loss)]
        sizes = [loss.chunk_size for loss in self._used_losses()] or [LogitLoss().chunk_size]
        values = chunked_losses(
            student,
            teacher,
            labels=inputs[self.label_names[0]] if label_weight else None,
            mask=mask,
            losses=losses,
            chunk_size=min(sizes),
        )
        weights = {"labels": label_weight, **{loss.name: self._weight_now(loss) for loss in losses}}
        return {name: (weights[name], value) for name, value in values.items()}, student, teacher

    def _teacher_in_chunks(self, inputs: dict[str, Any]) -> Any:
        if not self._asks_teacher():
            return None
        if "teacher_ids" in inputs:
            return self._teacher_outputs(inputs, HEAD).sparse
        teacher = self.teachers.models[0]
        kept = {n: v for n, v in inputs.items() if n in self.teachers.inputs[0] and n not in self.label_names}
        with torch.no_grad(), self.accelerator.autocast():
            return run_without_logits(teacher, teacher, {n: v.to(teacher.device) for n, v in kept.items()})

    # -- on-policy

    def _student_written(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """The batch, or in its place the student's own continuations of its prompts (GKD)."""
        step = self.state.global_step * self.args.gradient_accumulation_steps + number
        if self.on_policy is None or not is_on_policy_step(step, self.on_policy.share, self.args.seed):
            return batch
        model = self.accelerator.unwrap_model(self.model_wrapped)
        seed = self.args.seed + 1_000_003 * step + self.args.process_index  # each process writes its own
        written = generate_batch(model, self._prepare_inputs(batch), self.on_policy, self.processing_class, seed)
        return {**written, STUDENT_WROTE: True}

    # -- other tokenizers

    def _paired(self, outputs: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """Both sides' logits (pairs, classes) at the positions where they have read the same text."""
        view = retokenize(
            inputs, self.processing_class, self.teachers.processors[0], max_positions(self.teachers.models[0])
        )
        teacher = self.teachers.models[0]
        with self.accelerator.autocast():
            theirs = ask_teacher(teacher, view.inputs, self.teachers.inputs[0], set(self.label_names)).logits
        return tuple(SimpleNamespace(logits=logits) for logits in view.pick(outputs.logits, theirs))
