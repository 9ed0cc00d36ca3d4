"""One teacher or several, each put beside the student and aligned with it, asked as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.distillation.teachers.alignment import align, ask_teacher, load_teacher
from hfshrink.distillation.teachers.ensemble import (
    calibrate_temperature,
    check_teacher_weights,
    combine_logits,
    confidence_weights,
)
from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED
from hfshrink.modules import accepted_inputs

SPANS = ("start_logits", "end_logits")
CALIBRATED_HEADS = ("single_label", "multi_label", "tokens", "causal_tokens")
CALIBRATION_ITEMS = 4096  # examples or positions: a temperature is one number


class Teachers:
    """The teachers of one student: frozen, in eval mode, their answers in the student's label order.

    Several teachers answer with the weighted mean of their logits. With `weights="confidence"` every example has its
    own weights: a teacher whose calibrated distribution is sharper counts more (`confidence_weights`), once
    `calibrate` has seen held-out rows.

    Args:
        teachers: Models, folders or Hub ids.
        student: The student model.
        processor: The student's tokenizer or processor, where it is known.
        weights: "uniform", one number per teacher, or "confidence".
        device: Where to put them; quantized teachers and those with a device map stay where they are.
        same_tokens: Whether teacher and student must read the same token ids.

    Raises:
        SettingError: A teacher does not fit (labels, vocabulary, tokenizer, head), or the weights do not.
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        student: Any,
        processor: Any = None,
        *,
        weights: Any = "uniform",
        device: Any = None,
        same_tokens: bool = True,
    ) -> None:
        if not teachers:
            raise SettingError("teacher is an empty list. Give one model, folder or Hub id, or several.")
        self.weights = check_teacher_weights(weights, len(teachers))
        if len(teachers) == 1 and weights != "uniform":
            raise SettingError(f"teacher_weights={weights!r} weighs several teachers, one is given.")
        self.temperatures: list[float] | None = None
        self._multi_label = False
        self.models: list[nn.Module] = []
        self.processors: list[Any] = []
        self.orders: list[Tensor | None] = []
        for teacher in teachers:
            if teacher is student:
                raise SettingError(
                    "Teacher and student are the same object. Make a copy, or a smaller one: make_student(teacher, 3)."
                )
            model, found = load_teacher(teacher)
            self.orders.append(align(student, model, processor, found, same_tokens=same_tokens))
            model.requires_grad_(False).eval()
            movable = not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False)
            self.models.append(model.to(device) if movable and device is not None else model)
            self.processors.append(found)
        self.inputs = [accepted_inputs(model) for model in self.models]

    @property
    def all_inputs(self) -> set[str]:
        """Names of all inputs that any of them takes."""
        return set().union(*self.inputs)

    def ask(self, inputs: dict[str, Any], label_names: Iterable[str]) -> Any:
        """Their outputs on a batch: one teacher's own outputs, of several only the combined logits."""
        found = self._ask_each(inputs, label_names)
        if len(found) == 1:
            return found[0]
        fields = SPANS if hasattr(found[0], "start_logits") else ("logits",)
        combined = {name: self._combined([getattr(outputs, name) for outputs in found]) for name in fields}
        return SimpleNamespace(**combined)

    def calibrate(self, batches: Iterable[dict[str, Any]], label_names: Sequence[str], head: str) -> list[float]:
        """Fit each teacher's temperature on held-out batches with labels, for `weights="confidence"`.

        Args:
            batches: Held-out batches; as many as give `CALIBRATION_ITEMS` items are read.
            label_names: Names of the labels in them.
            head: Kind of head, one of `CALIBRATED_HEADS`.

        Raises:
            SettingError: Another head, or no labels.
        """
        if head not in CALIBRATED_HEADS:
            raise SettingError(
                f"teacher_weights='confidence' needs a head with classes ({', '.join(CALIBRATED_HEADS)}), this one is "
                f"{head!r}. Give numbers or 'uniform'."
            )
        logits: list[list[Tensor]] = [[] for _ in self.models]
        truth: list[Tensor] = []
        for batch in batches:
            labels = batch.get(label_names[0])
            if labels is None:
                raise SettingError("Confidence weights are calibrated on labels; the held-out rows have none.")
            labels = labels[:, 1:] if head == "causal_tokens" else labels
            known = (labels != IGNORED).cpu() if head != "multi_label" else torch.ones(len(labels), dtype=torch.bool)
            truth.append(labels.cpu()[known])
            for number, outputs in enumerate(self._ask_each(batch, label_names)):
                answer = outputs.logits[:, :-1] if head == "causal_tokens" else outputs.logits
                logits[number].append(answer.float().cpu()[known])
            if sum(map(len, truth)) >= CALIBRATION_ITEMS:
                break
        if not sum(map(len, truth)):
            raise SettingError("Confidence weights need held-out rows with labels: eval_dataset has none.")
        self._multi_label = head == "multi_label"
        self.temperatures = [calibrate_temperature(torch.cat(rows), torch.cat(truth)) for rows in logits]
        return self.temperatures

    def _ask_each(self, inputs: dict[str, Any], label_names: Iterable[str]) -> list[Any]:
        names = set(label_names)
        found = [ask_teacher(m, inputs, kept, names) for m, kept in zip(self.models, self.inputs, strict=True)]
        for outputs, order in zip(found, self.orders, strict=True):
            if order is not None:
                outputs.logits = in_student_order(outputs.logits, order)
        return found

    def _combined(self, logits: Sequence[Tensor]) -> Tensor:
        first = logits[0]
        aligned = [part.to(first.device, torch.float32) for part in logits]
        if self.weights != "confidence":
            return combine_logits(aligned, self.weights)
        if self.temperatures is None:
            raise SettingError("Confidence weights are not calibrated yet: call calibrate with held-out batches.")
        scaled = [part / t for part, t in zip(aligned, self.temperatures, strict=True)]
        weights = confidence_weights(aligned, self.temperatures, multi_label=self._multi_label)
        return combine_logits(scaled, weights)


def in_student_order(logits: Tensor, order: Tensor) -> Tensor:
    """The teacher's logits (…, classes) with the classes in the student's order."""
    return logits[..., order.to(logits.device)]
