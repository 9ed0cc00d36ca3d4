"""The signals of one training run: losses made ready, weights over time, projections, recorders, own averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hfshrink.distillation.checks import check_number
from hfshrink.distillation.losses.capture import Recorder
from hfshrink.distillation.teachers.panel import Teachers
from hfshrink.distillation.teachers.self_teaching import MovingAverage
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.modules import measure_parameters

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself
STATE_FILE = "distillation.safetensors"  # projections and moving average of a run, beside its checkpoint


class SignalsMixin(_Trainer):
    """Holds what exists only while training: nothing of it is saved with the student."""

    losses: list[Any]
    label_weight: float
    final_label_weight: float | None
    teachers: Teachers | None
    _average: MovingAverage | None = None
    _loss_sums: dict[str, Tensor]

    def _check_signals(self) -> None:
        for name, weight in (("label_weight", self.label_weight), ("final_label_weight", self.final_label_weight)):
            if weight is not None:
                check_number(name, weight, "of at least 0", lambda value: value >= 0)
        for loss in self.losses:
            usable = callable(loss) or hasattr(loss, "prepare")
            if isinstance(loss, type) or not usable or not hasattr(loss, "weight"):
                raise SettingError(f"losses must be a list of loss objects, such as [LogitLoss()]; it holds {loss!r}.")
        names = [getattr(loss, "name", type(loss).__name__) for loss in self.losses]
        if len(set(names)) != len(names):
            raise SettingError(f"Each loss must have a name of its own, got {names}.")
        for when, progress in (("first", 0.0), ("last", 1.0)):
            weights = [between(loss.weight, getattr(loss, "final_weight", None), progress) for loss in self.losses]
            if not any([between(self.label_weight, self.final_label_weight, progress), *weights]):
                raise SettingError(
                    f"At the {when} step label_weight and all weights are 0: there is nothing to learn from. Set "
                    "label_weight, final_label_weight, or the weight and final_weight of a loss."
                )

    def _uses_labels(self) -> bool:
        return bool(self.label_weight or self.final_label_weight)

    def _label_weight_now(self) -> float:
        return between(self.label_weight, self.final_label_weight, self._progress())

    def _weight_now(self, loss: Any) -> float:
        return between(loss.weight, getattr(loss, "final_weight", None), self._progress())

    def _progress(self) -> float:
        """0 at the first optimizer step, 1 at the last."""
        return min(1.0, self.state.global_step / max(self.state.max_steps - 1, 1))

    def _logit_losses(self) -> list[Any]:
        """The losses that need nothing but outputs."""
        return [loss for loss in self.losses if is_used(loss) and not hasattr(loss, "prepare")]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with everything in place that this run needs, and gone afterwards."""
        with self._installed():
            return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        self._before = measure_parameters(self.model)
        self._loss_sums.clear()
        self._loss_steps = 0
        if self.ema_decay is not None:
            self._average = MovingAverage(self.model, self.ema_decay)
            self.teachers = Teachers([self._average.model], self.model, device=self.args.device)
        self._prepare_losses()
        callback = _AfterStep(self)
        self.add_callback(callback)
        try:
            with ExitStack() as stack:
                self._recorders = {role: stack.enter_context(r) for role, r in self._make_recorders().items()}
                yield
        finally:
            self.remove_callback(callback)
            self._forget_projections()
            self._parts, self._recorders = nn.ModuleDict(), {}

    def _prepare_losses(self) -> None:
        """Let the losses that look inside the models check them and make their projections."""
        teachers = [] if self.teachers is None else self.teachers.models
        teacher = teachers[0] if teachers else None
        prepared = {}
        for loss in self.losses:
            if is_used(loss) and hasattr(loss, "prepare"):
                if getattr(loss, "needs_teacher", True) and len(teachers) != 1:
                    raise SettingError(
                        f"{type(loss).__name__} looks inside one teacher, but {len(teachers)} are given. Pass one "
                        "teacher=, not only cached logits."
                    )
                prepared[loss.name] = loss.prepare(self.model, teacher)
        self._parts = nn.ModuleDict(prepared).to(self.args.device)
        if self.accelerator.num_processes > 1:  # these parameters stand outside the wrapped model
            for parameter in self._parts.parameters():
                parameter.register_hook(self._average_gradient)

    def _average_gradient(self, gradient: Tensor) -> Tensor:
        return self.accelerator.reduce(gradient, reduction="mean")

    def _make_recorders(self) -> dict[str, Recorder]:
        wants: dict[str, list[Any]] = {"student": [], "teacher": []}
        for part in self._parts.values():
            wants["student"].append(part.student_wants)
            wants["teacher"].append(part.teacher_wants)
        if wants["student"] and self.args.n_gpu > 1:
            raise SettingError("Losses on hidden states need one process per device: start with torchrun.")
        models = {"student": self.model, "teacher": self.teachers.models[0] if self.teachers else None}
        return {
            role: Recorder(models[role], wanted)
            for role, wanted in wants.items()
            if models[role] is not None and any(w.outputs or w.inputs or w.attention for w in wanted)
        }

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer, with the projections as a group of their own."""
        optimizer = super().create_optimizer(model)
        projections = list(self._parts.parameters())
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if projections and not any(id(parameter) in known for parameter in projections):
            optimizer.add_param_group({"params": projections, "weight_decay": self.args.weight_decay})
        return optimizer

    def _forget_projections(self) -> None:
        """Take them out of the optimizer, which another run would go on using."""
        own = {id(parameter) for parameter in self._parts.parameters()}
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if own and optimizer is not None:
            groups = optimizer.param_groups
            groups[:] = [group for group in groups if not own & {id(parameter) for parameter in group["params"]}]
            for parameter in self._parts.parameters():
                optimizer.state.pop(parameter, None)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the student's gradients, and the projections' by themselves."""
        if projections := list(self._parts.parameters()):
            nn.utils.clip_grad_norm_(projections, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    # -- interrupted runs: what is not in the student lies beside its checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._own_state()
        if state and self.args.should_save:
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, _path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_own_state(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_own_state(self, checkpoint: str) -> None:
        state = self._own_state()
        if not state:
            return
        try:
            saved = load_file(_path(checkpoint))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{checkpoint} has no readable {STATE_FILE} ({error}), which holds this run's projections and "
                "averages. Resume with the same losses, without save_only_model, or start anew."
            ) from error
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (saved, state)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{STATE_FILE} in {checkpoint} holds {shapes[0]}, this run needs {shapes[1]}. Resume with the same "
                "losses and teacher."
            )
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(saved[name])

    def _own_state(self) -> dict[str, Tensor]:
        state = {f"projections.{name}": value for name, value in self._parts.state_dict(keep_vars=True).items()}
        if self._average is not None:
            state |= {f"average.{name}": value for name, value in self._average.state().items()}
        return state


class _AfterStep(TrainerCallback):
    """After each optimizer step: clear the projections' gradients, move the moving average."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self.trainer._parts.parameters():
            parameter.grad = None
        if self.trainer._average is not None:
            self.trainer._average.update(self.trainer.model)


def is_used(loss: Any) -> bool:
    """Whether a loss has a weight at any time."""
    return bool(loss.weight or getattr(loss, "final_weight", None))


def between(start: float, end: float | None, progress: float) -> float:
    """The value at a point of training, linear from `start` to `end`; None keeps it constant.

    Example:
        >>> between(1.0, 0.0, 0.25)
        0.75
    """
    return start if end is None else start + (end - start) * progress


def _path(folder: str) -> str:
    return str(Path(folder) / STATE_FILE)
