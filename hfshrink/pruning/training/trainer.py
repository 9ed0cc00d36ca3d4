"""`PruningMixin` teaches any transformers Trainer to prune while it trains; `PruningTrainer` is the plain one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.measurement import Measurement
from hfshrink.mixins import (
    PublishingMixin,
    add_group,
    counts_tokens,
    forget_group,
    is_sharded,
    read_state,
    write_state,
)
from hfshrink.modules import measure_parameters
from hfshrink.pruning.training.history import record_training
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.state import TrainingMasks
from hfshrink.pruning.training.targets import make_targets
from hfshrink.pruning.units.cutting import check_cut, check_optimizer, cut_units
from hfshrink.pruning.units.groups import used_units

STATE_FILE = "pruning_state.safetensors"  # hidden values, masks, scores and schedule of a run, beside its checkpoint

logger = logging.getLogger(__name__)


class PruningMixin(PublishingMixin):
    """Adds gradual pruning to a Trainer: put it first, as in `class Mine(PruningMixin, Seq2SeqTrainer): …`.

    The masks follow the schedule of `pruning` and are applied after every optimizer step. Hidden weights are zeros in
    the model, so that every checkpoint, also in mid-run, holds the pruned weights under their plain names; the values
    behind the zeros, the masks and the scores lie beside it in `pruning_state.safetensors`, from which a run resumes
    exactly. Learned scores take their gradient from that of the weights, which is already reduced over all processes.
    The sparsity is logged with the loss. When training ends, units are cut out for real.

    The schedule is in shares of the run: resumed with another `max_steps` it goes on at its place in the new run. No
    checkpoint is the best, and early stopping does not count, before `sparsity` is reached. Each call of `train`
    starts the schedule anew on the model as it is, so `sparsity` is then the share of what is left of cut units. Zeros
    of an earlier run are weights like others to it; with `pruning=None`, or in another Trainer, they grow again. A run
    that fails leaves dense weights.

    Memory: the values behind the zeros take as much as the weights that can be pruned, and masks a quarter of it in
    float32. Learned scores take as much again, with their gradient and the optimizer's two moments four times as much.

    Args:
        pruning: The settings; None trains as the plain Trainer does.
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        SettingError: Nothing to prune, NaN or frozen weights, N:M that does not divide, a sparsity that leaves a group
            of units empty, sharded training, or learned scores with a learning rate scheduler of the user's own.
        UnsupportedModelError: A quantized model, or a family without such units.
    """

    pruning: Any
    optimizer: Any
    lr_scheduler: Any
    _masks: TrainingMasks | None = None
    _dense: Measurement  # the model before this run

    def __init__(self, *args: Any, pruning: Pruning | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pruning is not None and not isinstance(pruning, Pruning):
            raise SettingError(f"pruning must be a Pruning, such as Pruning(0.5), got {type(pruning).__name__}.")
        self.pruning = pruning
        if pruning is not None:
            self._check_pruning()

    def _check_pruning(self) -> None:
        """What can't work is told before training."""
        if getattr(self.model, "quantization_method", None) is not None and getattr(self.model, "is_quantized", False):
            raise UnsupportedModelError("Quantized weights can't be pruned. Prune the float model, then quantize it.")
        if is_sharded(self):
            raise SettingError(
                "Masks need whole weights on each process: prune with one process or DDP, not FSDP or DeepSpeed."
            )
        if self.pruning.is_learned and self.lr_scheduler is not None:
            raise SettingError(
                f"method={self.pruning.method!r} adds a group for its scores to the optimizer, which a scheduler that "
                "was made before does not know. Give optimizers=(optimizer, None) and set lr_scheduler_type."
            )
        targets = make_targets(self.model, self.pruning)
        if self.pruning.cut:
            check_cut(self.model, [target.group for target in targets if target.group is not None])
        if not counts_tokens(self.model):
            # these losses are means of their batch, whatever number of items they are told: without this the Trainer
            # would not divide by the accumulation steps
            self.model_accepts_loss_kwargs = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then cut what is masked and add the step to the model's record."""
        if self.optimizer is not None:
            check_optimizer(self.optimizer, self.model)
        if self.pruning is None:
            return super().train(*args, **kwargs)
        start, self._dense = time.perf_counter(), measure_parameters(self.model)
        output = super().train(*args, **kwargs)
        masks, self._masks = self._masks, None
        if masks is not None:
            self._finish(masks, time.perf_counter() - start)
        return output

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """A new model for this run, which is what the run's record starts from."""
        model = super().call_model_init(*args, **kwargs)
        self._dense = measure_parameters(model)
        return model

    def _finish(self, masks: TrainingMasks, seconds: float) -> None:
        changed = [target.name for target in masks.targets]
        results: dict[str, Any] = {"sparsity": round(masks.measured(), 6)}
        if not self._is_reached(masks):
            logger.warning(
                "Training ended after step %d of %d, at a sparsity of %.3g instead of %.3g.",
                self.state.global_step,
                self.state.max_steps,
                results["sparsity"],
                self.pruning.final,
            )
        if self.pruning.is_structured and self.pruning.cut:
            groups = [target.group for target in masks.targets if target.group is not None]
            kept = {group.name: used_units(self.model, group) for group in groups}  # of the best checkpoint, if loaded
            changed = cut_units(self.model, groups, kept)
            results["kept"] = {name: int(units.sum()) for name, units in kept.items()}
            self._forget_cut_parameters()
        record_training(self, results, self._dense, changed, seconds)

    def _is_reached(self, masks: TrainingMasks) -> bool:
        return masks.sparsity >= self.pruning.final - 1e-9

    def _forget_cut_parameters(self) -> None:
        """The optimizer of this run holds what the model has no more; another run makes a new one."""
        self.model_wrapped = self.model
        self.optimizer = self.lr_scheduler = None

    # -- in training

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with the masks in place."""
        if self.pruning is None:
            return super()._inner_training_loop(*args, **kwargs)
        with self._masked():
            return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _masked(self) -> Iterator[None]:
        self._masks = TrainingMasks(self.model, self.pruning)
        callback = _AfterStep(self)
        self.add_callback(callback)
        try:
            yield
        except BaseException:  # auto_find_batch_size begins again on this model, and so may the user after Ctrl-C
            self._masks.reveal()
            self._forget_scores()
            self._masks = None
            raise
        finally:
            self.remove_callback(callback)
            self._forget_scores()

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer, with the learned scores as a group of their own."""
        optimizer = super().create_optimizer(model)
        if self._masks is not None:
            add_group(optimizer, self._masks.learned(), lr=self.pruning.scores_rate)
        return optimizer

    def _forget_scores(self) -> None:
        """Take the scores out of the optimizer."""
        forget_group(self.optimizer, [] if self._masks is None else self._masks.learned())

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of what is not hidden, and those of the scores by themselves."""
        self._take_gradients()
        norm = super()._clip_grad_norm(model)
        if self._masks is not None and (learned := self._masks.learned()):
            nn.utils.clip_grad_norm_(learned, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing was clipped
            self._take_gradients()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _take_gradients(self) -> None:
        if self._masks is not None:
            scaler = self.accelerator.scaler
            self._masks.before_step(1.0 if scaler is None else scaler.get_scale())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the sparsity to training logs."""
        if self._masks is not None and "loss" in logs:
            logs["sparsity"] = round(self._masks.measured(), 6)
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint is the best before the sparsity is reached: it would be less pruned than asked for."""
        if self._masks is not None and not self._is_reached(self._masks):
            return False
        return super()._determine_best_metric(metrics, trial)

    # -- interrupted runs: what is not in the model lies beside its checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._masks is not None and self.args.should_save:
            write_state(self._masks.state(), Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._masks is not None:
            self._masks.load_state(read_state(Path(checkpoint) / STATE_FILE, "pruning"))
        super()._load_optimizer_and_scheduler(checkpoint)


class _AfterStep(TrainerCallback):
    """After each optimizer step: zeros again, and new masks where they are due."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        masks: TrainingMasks = self.trainer._masks
        for scores in masks.learned():
            scores.grad = None
        masks.after_step()
        step = state.global_step + 1  # the Trainer counts it after this call
        if masks.is_due(step, state.max_steps):
            masks.update(masks.pruning.at(step / state.max_steps))


class PruningTrainer(PruningMixin, Trainer):
    """A transformers Trainer that prunes as it trains; see `PruningMixin` and `Pruning`.

    Example:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> settings = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = TrainingArguments(tempfile.mkdtemp(), **settings)
        >>> trainer = PruningTrainer(model, args, pruning=Pruning(0.5, "neurons"), train_dataset=rows)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> model.bert.encoder.layer[0].intermediate.dense.out_features
        3
    """
