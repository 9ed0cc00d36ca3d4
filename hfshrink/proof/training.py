"""One run of a proof: a fresh model, the Trainer, and its predictions on the held-out rows."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import inspect
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from hfshrink.distillation import DistillationMixin, DistillationTrainer
from hfshrink.distillation.training.rows import has_answers
from hfshrink.distillation.training.run import has_labels, make_collator
from hfshrink.errors import SettingError
from hfshrink.selection.caching import model_digest

if TYPE_CHECKING:
    from datasets import Dataset

QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 20,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "resume_from_checkpoint": None,
}
"""What no run needs: a proof keeps its own results, and looks at the loss itself."""
OWN: tuple[str, ...] = (
    "model",
    "args",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "model_init",
    "optimizers",
    "output_dir",
)
OWN += ("compute_metrics", "preprocess_logits_for_metrics", "seed")
NO_RESULT: tuple[str, ...] = (
    "output_dir",
    "run_name",
    "seed",
    "do_eval",
    "do_train",
    "do_predict",
    "project",
    "report_to",
)
NO_RESULT += ("use_cpu", "include_for_metrics", "debug", *QUIET)
NO_RESULT_STARTS: tuple[str, ...] = ("hub_", "push_", "save_", "eval_", "log", "trackio", "local_", "disable_")
NO_RESULT_STARTS += ("dataloader_num", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch")
CORE = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "optim", "lr_scheduler_type")


@dataclass(frozen=True, eq=False)
class Training:
    """How the arms are trained.

    Attributes:
        trainer: The Trainer's class; None takes the plain one, or `DistillationTrainer` for rows with a teacher's
            answers or with `teacher` among the options.
        arguments: The user's, made quiet.
        options: What the Trainer is given besides.
    """

    trainer: type[Trainer] | None
    arguments: TrainingArguments
    options: Mapping[str, Any]

    def trainer_for(self, rows: Any) -> type[Trainer]:
        """The class that trains on these rows."""
        if self.trainer is not None:
            return self.trainer
        return DistillationTrainer if has_answers(rows) or "teacher" in self.options else Trainer

    def options_for(self, rows: Dataset, task: str) -> dict[str, Any]:
        """The options that the rows' Trainer takes; without labels nothing is learnt from them."""
        trainer = self.trainer_for(rows)
        taken = {name: value for name, value in self.options.items() if name in keywords_of(trainer)}
        if issubclass(trainer, DistillationMixin) and not has_labels(rows, task):
            taken = {"label_weight": 0.0, **taken}
        if "callbacks" in taken:
            taken["callbacks"] = list(taken["callbacks"])
        return taken

    def settings(self) -> dict[str, Any]:
        """The settings that decide a result: those that differ from the defaults, a few always, and the options."""
        given, default = self.arguments.to_dict(), TrainingArguments(output_dir="unused").to_dict()
        named = {
            name: value
            for name, value in given.items()
            if (name in CORE or value != default.get(name))
            and name not in NO_RESULT
            and not name.startswith(NO_RESULT_STARTS)
        }
        return {**named, **{name: describe(value) for name, value in self.options.items()}}


def read_training(trainer: Any, args: Any, settings: Mapping[str, Any], rows: list[Any]) -> Training:
    """Sort keywords into TrainingArguments and the Trainer's own.

    Args:
        trainer: A Trainer class or None.
        args: TrainingArguments or None.
        settings: The keywords.
        rows: The data sets that will be trained on, for their Trainers.

    Raises:
        SettingError: No Trainer class, both `args` and settings of it, a name that neither knows, one that a proof
            decides itself, or several processes.
    """
    if trainer is not None and not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise SettingError(f"trainer must be a Trainer class, such as hfshrink.DistillationTrainer, got {trainer!r}.")
    if args is not None and not isinstance(args, TrainingArguments):
        raise SettingError(f"args must be TrainingArguments, got {type(args).__name__}. Or give its settings by name.")
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    _refuse_own(settings)
    training = {name: value for name, value in settings.items() if name in known}
    options = {name: value for name, value in settings.items() if name not in known}
    if args is not None and training:
        raise SettingError(f"Give {', '.join(training)} in args= or by name, not both.")
    if training.get("load_best_model_at_end") or getattr(args, "load_best_model_at_end", False):
        raise SettingError("load_best_model_at_end would choose by held-out rows. A proof takes the last weights.")
    base = args or TrainingArguments(output_dir="unused", **{**training, **QUIET})
    if base.world_size > 1:
        raise SettingError(f"evaluate_subset runs in one process, this is one of {base.world_size}.")
    found = Training(trainer, dataclasses.replace(base, **QUIET), options)
    allowed = {name for one in rows for name in keywords_of(found.trainer_for(one))}
    for name in options:
        if name not in allowed:
            near = difflib.get_close_matches(name, [*known - {*OWN}, *allowed], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"evaluate_subset knows no setting {name!r}.{hint}")
    return found


def _refuse_own(settings: Mapping[str, Any]) -> None:
    wrong = [name for name in settings if name in OWN]
    if wrong:
        raise SettingError(f"{', '.join(wrong)}: a proof decides this itself, for each run. Leave it out.")


def keywords_of(trainer: type) -> set[str]:
    """Names of the keywords that a Trainer class takes and a proof does not set itself."""
    found = {
        name
        for base in trainer.__mro__
        if "__init__" in vars(base) and base is not object
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    return found - {"self", *OWN}


def train(
    training: Training, model: Any, rows: Dataset, length: Mapping[str, Any], *, seed: int, task: str, processor: Any
) -> tuple[Any, Any, float]:
    """Train a fresh model.

    Args:
        training: How.
        model: Changed in place.
        rows: Encoded.
        length: `max_steps` and `num_train_epochs`.
        seed: Of the order of the rows and of dropout.
        task: Of the model.
        processor: Its tokenizer or image processor.

    Returns:
        The trained model, the Trainer's state, and the seconds of the training.

    Raises:
        SettingError: The loss is not finite.
    """
    with tempfile.TemporaryDirectory() as nowhere, quiet():
        options = {"data_collator": make_collator(model, processor, task), "processing_class": processor}
        trainer = training.trainer_for(rows)(
            model=model,
            args=dataclasses.replace(training.arguments, output_dir=nowhere, seed=seed, **length),
            train_dataset=rows,
            **{**options, **training.options_for(rows, task)},
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(FiniteLoss())
        start = time.perf_counter()
        output = trainer.train()
        seconds = time.perf_counter() - start
    _check_finite(output.training_loss, trainer.state.global_step)
    trained, state = trainer.model, trainer.state
    del trainer
    gc.collect()  # the Trainer and its callbacks hold each other, and the optimizer's state
    return trained, state, seconds


class FiniteLoss(TrainerCallback):
    """Stops a run whose loss is no number, instead of training to its end."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at each logged loss."""
        if logs is not None and "loss" in logs:
            _check_finite(float(logs["loss"]), state.global_step)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise SettingError(
            f"the loss is {loss} at step {step}. Lower learning_rate, clip gradients (max_grad_norm), train in "
            "float32, or look for broken rows."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers and of loading: they were shown when the first model was made."""
    from transformers.utils import logging as transformers_logging

    verbosity, own = transformers_logging.get_verbosity(), logging.getLogger("hfshrink.loading")
    level = own.level
    transformers_logging.set_verbosity_error()
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        own.setLevel(level)


def describe(value: Any) -> Any:
    """A setting as JSON can hold it; what has no such form by its type's name, so that it is the same in each run."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {model_digest(value)}"
    text = repr(value)
    plain = len(text) <= 200 and " at 0x" not in text
    return text if plain else str(getattr(value, "__qualname__", type(value).__name__))
