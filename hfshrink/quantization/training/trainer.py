"""`QATMixin` teaches any transformers Trainer to train for quantization; `QATTrainer` is the plain one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
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
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.history import record_quantization
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.sites import make_sites
from hfshrink.quantization.training.state import FakeQuantization

STATE_FILE = "quantization_state.safetensors"  # float weights, ranges and scales of a run, beside its checkpoint

logger = logging.getLogger(__name__)


class QATMixin(PublishingMixin):
    """Adds quantization-aware training to a Trainer: put it first, as in `class Mine(QATMixin, Seq2SeqTrainer): …`.

    Forward passes, also those of evaluations, compute with weights and inputs on their integer grids; gradients go
    straight through to the float weights. Inputs stay float in the very first step, which shows their first range.
    Every checkpoint holds the weights on their grid under their plain names; the float weights behind them, ranges and
    learned scales lie beside it in `quantization_state.safetensors`, from which a run resumes exactly. The quantized
    share of the parameters is logged with the loss. No checkpoint is the best before fake quantization has begun.

    When training ends, the weights are folded onto their grid and the input ranges go into the model's record, where
    `learned_ranges` finds them for an export; `evaluate` and `predict` still compute as the quantized model does. In
    float32 files the model is as large as before: it shrinks when it is exported. Ranges are those of all batches of
    an optimizer step on all processes, and gradients of learned scales are averaged over the processes, so that two
    processes do what one does.

    Memory: activations as in float training, one more copy of a module's weight while it runs, and one of all
    quantized weights while a checkpoint is written.

    Args:
        quantization: The settings; None trains as the plain Trainer does.
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        SettingError: Nothing to quantize, NaN, tied or half-precision weights, a group size that does not divide,
            sharded training, several devices in one process, `torch_compile`, or learned scales with a learning rate
            scheduler of the user's own.
        UnsupportedModelError: A quantized model, or one with adapters.
    """

    quantization: Any
    optimizer: Any
    lr_scheduler: Any
    _fake: FakeQuantization | None = None
    _unquantized: Measurement  # the model before this run

    def __init__(self, *args: Any, quantization: QAT | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if quantization is not None and not isinstance(quantization, QAT):
            raise SettingError(
                f"quantization must be a QAT, such as QAT(weight_bits=4), got {type(quantization).__name__}."
            )
        self.quantization = quantization
        if quantization is not None:
            self._check_quantization()

    def _check_quantization(self) -> None:
        """What can't work is told before training."""
        if getattr(self.model, "quantization_method", None) is not None and getattr(self.model, "is_quantized", False):
            raise UnsupportedModelError("This model is quantized already. Train the float model with QAT.")
        if hasattr(self.model, "peft_config"):
            raise UnsupportedModelError("Adapters are merged after training, off the grid: merge them first.")
        self._check_arguments()
        make_sites(self.model, self.quantization)
        if not counts_tokens(self.model):
            # these losses are means of their batch, whatever number of items they are told: without this the Trainer
            # would not divide by the accumulation steps
            self.model_accepts_loss_kwargs = False

    def _check_arguments(self) -> None:
        if is_sharded(self):
            raise SettingError(
                "QAT needs whole weights on each process: train with one process or DDP, not FSDP or DeepSpeed."
            )
        if self.args.n_gpu > 1:
            raise SettingError("QAT needs one process per device: start with torchrun.")
        if self.args.torch_compile:
            raise SettingError(
                "QAT hides weights while modules run, which torch_compile=True can't trace. Leave it out."
            )
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise SettingError(
                "save_only_model leaves out the ranges, which load_best_model_at_end needs. Drop one of the two."
            )
        if self.quantization.is_learned and self.lr_scheduler is not None:
            raise SettingError(
                "'lsq' adds a group for its scales to the optimizer, which a scheduler that was made before does not "
                "know. Give optimizers=(optimizer, None) and set lr_scheduler_type."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then fold the weights and add the step to the model's record."""
        if self.quantization is None:
            return super().train(*args, **kwargs)
        start, self._unquantized = time.perf_counter(), measure_parameters(self.model)
        output = super().train(*args, **kwargs)
        fake, self._fake = self._fake, None
        if fake is not None and not fake.is_complete:
            logger.warning(
                "Training ended after step %d of %d, before fake quantization had begun: the model is a float one.",
                self.state.global_step,
                self.state.max_steps,
            )
        elif fake is not None:
            fake.fold()
            record_quantization(self, fake, self._unquantized, time.perf_counter() - start)
        return output

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """A new model for this run, which is what the run's record starts from."""
        model = super().call_model_init(*args, **kwargs)
        self._unquantized = measure_parameters(model)
        return model

    # -- in training

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with fake quantization in place."""
        if self.quantization is None:
            return super()._inner_training_loop(*args, **kwargs)
        with self._fakes_in_place():
            return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _fakes_in_place(self) -> Iterator[None]:
        self._fake = FakeQuantization(self.model, self.quantization)
        callback = _AroundStep(self)
        self.add_callback(callback)
        try:
            with self._fake.installed():
                yield
        except Exception:  # auto_find_batch_size begins again on this model, and so may the user
            forget_group(self.optimizer, self._learned_scales())
            self._fake = None
            raise
        finally:
            self.remove_callback(callback)
            forget_group(self.optimizer, self._learned_scales())

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer, with the learned scales as a group of their own."""
        optimizer = super().create_optimizer(model)
        rate = self.quantization.scale_learning_rate if self.quantization is not None else None
        add_group(optimizer, self._learned_scales(), **({} if rate is None else {"lr": rate}))
        return optimizer

    def _learned_scales(self) -> list[nn.Parameter]:
        return [] if self._fake is None else self._fake.learned()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of the model, and those of the scales by themselves."""
        self._share_scale_gradients()
        norm = super()._clip_grad_norm(model)
        if learned := self._learned_scales():
            nn.utils.clip_grad_norm_(learned, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing was clipped
            self._share_scale_gradients()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _share_scale_gradients(self) -> None:
        """The mean over all processes, which DDP takes of the model's own; none where scales stand still."""
        learned = self._learned_scales()
        if self._fake is not None and not self._fake.moving:
            for parameter in learned:
                parameter.grad = None
        learned = [parameter for parameter in learned if parameter.grad is not None]
        if learned and self.accelerator.num_processes > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in learned if parameter.grad is not None])
            flat = self.accelerator.reduce(flat, reduction="mean")
            pieces = flat.split([parameter.numel() for parameter in learned])
            for parameter, piece in zip(learned, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the quantized share of the parameters to training logs."""
        if self._fake is not None and "loss" in logs:
            logs["quantized"] = round(self._fake.share(), 6)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the quantized model: while training by its hooks, afterwards by its record."""
        folded = self.quantization is not None and self._fake is None and learned_ranges(self.model) is not None
        with fake_quantized(self.model) if folded else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint is the best before it is the quantized model that is measured."""
        if self._fake is not None and not self._fake.is_complete:
            return False
        return super()._determine_best_metric(metrics, trial)

    # -- checkpoints: weights on their grid; what is not in the model lies beside it

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the weights on their grid, also in mid-run."""
        with nullcontext() if self._fake is None else self._fake.folded():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._fake is not None and self.args.should_save:
            write_state(self._fake.state(), Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_quantization(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best weights, with the ranges and scales that they had."""
        super()._load_best_model()
        self._load_quantization(self.state.best_model_checkpoint)

    def _load_quantization(self, checkpoint: str) -> None:
        if self._fake is not None:
            self._fake.load_state(read_state(Path(checkpoint) / STATE_FILE, "quantization"))


class _AroundStep(TrainerCallback):
    """Moves ranges and scales on after each optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._fake.set_progress(state.global_step / max(state.max_steps, 1))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fake: FakeQuantization = self.trainer._fake
        for scale in fake.learned():
            scale.grad = None
        fake.after_step((state.global_step + 1) / state.max_steps)  # the Trainer counts the step after this call


class QATTrainer(QATMixin, Trainer):
    """A transformers Trainer that trains for quantization; see `QATMixin` and `QAT`.

    Example:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> settings = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = TrainingArguments(tempfile.mkdtemp(), **settings)
        >>> trainer = QATTrainer(model, args, quantization=QAT(weight_bits=4), train_dataset=rows)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> weight = model.bert.encoder.layer[0].output.dense.weight[0]
        >>> len(weight.unique()) <= 16
        True
    """
