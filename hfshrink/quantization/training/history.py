"""The step that quantization-aware training adds to the model's record."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hfshrink.measurement import Measurement
from hfshrink.modules import head_names, measure_parameters
from hfshrink.quantization.training.state import FakeQuantization
from hfshrink.record import StepRecord, append_step

TRAINING_SETTINGS = ("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")
STRAIGHT_THROUGH = "Jacob et al. 2018, arXiv:1712.05877"
LEARNED = "Esser et al. 2019, arXiv:1902.08153"
STILL_FLOAT = "Weights lie on their grid as float32: the file shrinks when it is exported."


def record_quantization(trainer: Any, fake: FakeQuantization, before: Measurement, seconds: float) -> None:
    """Append the step of a `QATMixin` trainer that has just folded its weights.

    A plain `nn.Module` has no config, and so no record.
    """
    model, quantization = trainer.model, trainer.quantization
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        return
    training = {name: getattr(trainer.args, name) for name in TRAINING_SETTINGS}
    step = StepRecord(
        technique="quantize",
        method=quantization.method,
        settings={**quantization.given(), "training": training},
        before=before,
        after=measure_parameters(model),
        modules=[site.name for site in fake.quantized()],
        skipped=dict.fromkeys(head_names(model), "task head") if quantization.exclude is None else {},
        results={"quantized": round(fake.share(), 6), "ranges": fake.ranges(), "note": STILL_FLOAT},
        seconds=seconds,
        source=LEARNED if quantization.is_learned else STRAIGHT_THROUGH,
    )
    append_step(model, step)
