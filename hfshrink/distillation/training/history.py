"""The step that a finished distillation adds to the student's record."""

from __future__ import annotations

import dataclasses
from typing import Any

from hfshrink.measurement import Measurement
from hfshrink.modules import measure_parameters
from hfshrink.record import StepRecord, append_step, config_of, model_name

TRAINING_SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


def record_distillation(trainer: Any, before: Measurement, seconds: float) -> None:
    """Append the step of a `DistillationMixin` trainer that has just trained; without losses nothing was distilled."""
    if not trainer.losses:
        return
    losses = {loss.name: _settings_of(loss) for loss in trainer.losses}
    names = [model_name(model) for model in trainer.teachers.models] if trainer.teachers is not None else []
    own_average = trainer.ema_decay is not None
    settings: dict[str, Any] = {
        "teacher": None if own_average or not names else names[0] if len(names) == 1 else names,
        "losses": losses,
        "label_weight": trainer.label_weight,
        **{name: getattr(trainer.args, name) for name in TRAINING_SETTINGS},
    }
    optional = {
        "teacher_weights": trainer.teachers.weights if len(names) > 1 else None,
        "final_label_weight": trainer.final_label_weight,
        "ema_decay": trainer.ema_decay,
        "on_policy": None if trainer.on_policy is None else dataclasses.asdict(trainer.on_policy),
    }
    settings |= {name: value for name, value in optional.items() if value is not None}
    results = {"train_examples": _count_rows(trainer.train_dataset), "steps": trainer.state.global_step}
    if trainer.teachers is not None and trainer.teachers.temperatures is not None:
        results["teacher_temperatures"] = trainer.teachers.temperatures
    sources = dict.fromkeys(getattr(loss, "source", LOGIT_SOURCE) for loss in trainer.losses)
    step = StepRecord(
        technique="distill",
        method=" + ".join(losses),
        settings=settings,
        before=before,
        after=measure_parameters(trainer.model),
        results=results,
        seconds=seconds,
        source="; ".join(sources) or LOGIT_SOURCE,
    )
    base = None if own_average or not names else names[0]
    append_step(config_of(trainer.model), step, base_model=base, task=trainer._task)


LOGIT_SOURCE = "Hinton et al. 2015, arXiv:1503.02531"


def _settings_of(loss: Any) -> dict[str, Any]:
    """Temperature and weight, and whatever else differs from its default."""
    plain = {
        name: value for name, value in vars(loss).items() if isinstance(value, (str, int, float, dict, tuple, list))
    }
    defaults = {f.name: f.default for f in dataclasses.fields(loss)} if dataclasses.is_dataclass(loss) else {}
    return {n: v for n, v in plain.items() if n in ("temperature", "weight") or n not in defaults or defaults[n] != v}


def _count_rows(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
