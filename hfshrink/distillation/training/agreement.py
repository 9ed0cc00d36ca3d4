"""Evaluation beside the teacher: agreement, both sides' accuracy, and the parts of the loss, at each evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import default_compute_objective, denumpify_detensorize

from hfshrink.data import LANGUAGE_TASKS
from hfshrink.distillation.losses.logits import loss_mask
from hfshrink.distillation.training.batches import without_padding
from hfshrink.labels import IGNORED

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself


class AgreementMixin(_Trainer):
    """Adds to every evaluation what the teacher says about the same rows.

    Logged beside `eval_loss`: `eval_agreement` (share of items on which both predict the same), `eval_accuracy` and
    `eval_teacher_accuracy` where there are labels (for regression `eval_distance` to the teacher, and each side's
    `squared_error`), `eval_loss_<part>` of the losses on logits, and with `compute_metrics` each of its values for the
    teacher, as `eval_teacher_<name>` (not where metrics are computed batch by batch, from inputs, or from a whole
    vocabulary's logits).
    """

    _added_metrics: set[str] = set()  # noqa: RUF012 replaced, never changed

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The student's evaluation step, then the teacher's on the same batch."""
        inputs = self._prepare_inputs(inputs)
        seen: list[Any] = []

        def see(_module: Any, _args: Any, outputs: Any) -> None:
            seen[:] = [outputs]  # the last one: a model that generates is called for every token

        hook = self.model.register_forward_hook(see)
        try:
            result = super().prediction_step(model, self._student_inputs(inputs), prediction_loss_only, ignore_keys)
        finally:
            hook.remove()
        inputs = self._with_decoder_inputs(inputs)
        blind = self.model.config.is_encoder_decoder and "decoder_input_ids" not in inputs
        if seen and not blind and self._can_compare(inputs):
            student = seen[0] if has_logits(seen[0]) else self._ask_again(inputs)
            self._compare(inputs, student, result[2] if not prediction_loss_only else None)
        return result

    def _ask_again(self, inputs: dict[str, Any]) -> Any:
        """The student's outputs without its loss: a fused loss, as in TRL's SFTTrainer, makes no logits."""
        given = self._student_inputs(inputs)
        with torch.no_grad():
            return self.model(**{name: value for name, value in given.items() if name not in self.label_names})

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the teacher's metrics added."""
        self._eval_sums: dict[str, Tensor] = {}  # (sum over items, number of items) by name
        self._teacher_predictions = EvalLoopContainer(self.args.eval_do_concat_batches, padding_index=IGNORED)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            found = {name: (total / count).item() for name, (total, count) in self._eval_sums.items() if count}
            for name, value in (found | self._teacher_metrics(output)).items():
                output.metrics.setdefault(f"{prefix}_{name}", value)
            self._added_metrics = {f"{prefix}_{name}" for name in found}
            return output
        finally:
            del self._eval_sums, self._teacher_predictions

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; what is added here to the metrics does not count in its default objective."""

        def own_metrics(metrics: dict[str, float]) -> float:
            return default_compute_objective({n: v for n, v in metrics.items() if n not in self._added_metrics})

        return super().hyperparameter_search(hp_space, compute_objective or own_metrics, *args, **kwargs)

    def _compare(self, inputs: dict[str, Any], student: Any, labels_kept: Any) -> None:
        head = self._head(inputs)
        mask = loss_mask(inputs, head)
        labels = [inputs.get(name) for name in self.label_names]
        teacher = self._teacher_outputs(inputs, head)
        if not has_logits(teacher):
            return  # a sparse cache does not say what the teacher would choose
        if head == "span":
            student, teacher = (without_padding(side, inputs.get("attention_mask")) for side in (student, teacher))
        for name, rows in compare_rows(student, teacher, labels, head, mask).items():
            self._add(name, rows)
        for loss in self._logit_losses():
            if loss.weight and (labels[0] is not None or not getattr(loss, "needs_labels", False)):
                with torch.no_grad():
                    value = loss(student, teacher, head=head, mask=mask, labels=labels[0])
                first = _first(student, head)
                items = first.new_ones(len(first)) if mask is None else mask.sum(1)
                self._add(f"loss_{loss.name}", torch.stack([value * items, items], dim=1))
        if labels_kept is not None and self._measures_teacher():
            self._keep_predictions(teacher, head, labels_kept)

    def _measures_teacher(self) -> bool:
        """Whether `compute_metrics` can be asked about the teacher as it is about the student."""
        if self.compute_metrics is None or self.args.batch_eval_metrics or self.args.include_for_metrics:
            return False
        vast = self._task in LANGUAGE_TASKS and self.preprocess_logits_for_metrics is None
        return not vast and not self.model.config.is_encoder_decoder

    def _keep_predictions(self, teacher: Any, head: str, labels: Any) -> None:
        answers = _predictions(teacher, head)
        answers = self.accelerator.pad_across_processes(answers, dim=1, pad_index=IGNORED)
        if self.preprocess_logits_for_metrics is not None:
            answers = self.preprocess_logits_for_metrics(answers, labels)
        self._teacher_predictions.add(self.gather_function(answers))
        self._teacher_predictions.to_cpu_and_numpy()

    def _add(self, name: str, rows: Tensor) -> None:
        """Add rows of (sum, number of items), without the rows that only fill the last batch of several processes."""
        total = self.accelerator.gather_for_metrics(rows.double()).sum(dim=0)
        self._eval_sums[name] = self._eval_sums.get(name, torch.zeros_like(total)) + total

    def _teacher_metrics(self, output: Any) -> dict[str, float]:
        """What `compute_metrics` says about the teacher's predictions."""
        predictions = self._teacher_predictions.get_arrays()
        if predictions is None or output.label_ids is None:
            return {}
        found = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=output.label_ids))
        return {f"teacher_{n.removeprefix('eval_')}": v for n, v in denumpify_detensorize(found).items()}


def has_logits(outputs: Any) -> bool:
    """Whether a model's outputs hold logits, or start and end logits."""
    return any(getattr(outputs, name, None) is not None for name in ("logits", "start_logits"))


def compare_rows(
    student: Any, teacher: Any, labels: list[Tensor | None], head: str, mask: Tensor | None
) -> dict[str, Tensor]:
    """For each row of a batch the sum over its items, and their number, of what can be compared.

    Args:
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        labels: The batch's labels (start and end for spans); None where there are none.
        head: Kind of head.
        mask: Positions that count, for token heads.

    Returns:
        Name -> (batch, 2): "agreement", "accuracy" and "teacher_accuracy", in regression "distance" and
        "squared_error" of each.
    """
    if head == "regression":
        return _compare_numbers(student.logits, teacher.logits, labels[0])
    ours, theirs = (_decisions(outputs, head) for outputs in (student, teacher))
    counted = torch.ones_like(ours, dtype=torch.bool) if mask is None else mask
    found = {"agreement": _rows(ours == theirs, counted)}
    if all(label is not None for label in labels):
        truth = _truth(labels, head)
        known = counted & (truth != IGNORED)
        found["accuracy"], found["teacher_accuracy"] = _rows(ours == truth, known), _rows(theirs == truth, known)
    return found


def _compare_numbers(ours: Tensor, theirs: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    every = torch.ones_like(ours, dtype=torch.bool)
    found = {"distance": _rows((ours - theirs) ** 2, every)}
    if labels is not None:
        truth = labels.reshape(ours.shape)
        found["squared_error"] = _rows((ours - truth) ** 2, every)
        found["teacher_squared_error"] = _rows((theirs - truth) ** 2, every)
    return found


def _decisions(outputs: Any, head: str) -> Tensor:
    """What a model decides, as integers: (batch, 1), (batch, labels), (batch, positions) or (batch, 2) for spans."""
    if head == "span":
        return torch.stack([outputs.start_logits.argmax(-1), outputs.end_logits.argmax(-1)], dim=1)
    if head == "multi_label":
        return (outputs.logits > 0).long()
    chosen = outputs.logits.argmax(-1)
    if head == "causal_tokens":
        return chosen[:, :-1]
    return chosen if chosen.ndim > 1 else chosen[:, None]


def _truth(labels: list[Any], head: str) -> Tensor:
    if head == "span":
        return torch.stack([label.reshape(-1) for label in labels], dim=1)
    truth = labels[0].long()
    if head == "causal_tokens":
        return truth[:, 1:]
    return truth if truth.ndim > 1 else truth[:, None]


def _rows(values: Tensor, counted: Tensor) -> Tensor:
    counted = counted.to(values.device)
    return torch.stack([(values * counted).double().sum(1), counted.double().sum(1)], dim=1)


def _first(outputs: Any, head: str) -> Tensor:
    return outputs.start_logits if head == "span" else outputs.logits


def _predictions(outputs: Any, head: str) -> Any:
    return (outputs.start_logits, outputs.end_logits) if head == "span" else outputs.logits
