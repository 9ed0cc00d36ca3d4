"""The data map of any Trainer's run: a pass over the training rows at the end of each epoch."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.loading import infer_task
from hfshrink.modules import accepted_inputs
from hfshrink.record import model_name
from hfshrink.selection.caching import column_digests
from hfshrink.selection.datamap import DataMap, read_arrays, write_arrays
from hfshrink.selection.datamap_measures import PARTS, RunningMeasures
from hfshrink.selection.datamap_pass import RowPass

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

LABEL_NAMES = ("labels", "label", "label_ids")
EPOCHS = "epochs"  # folder of what each epoch told, from which a resumed run makes the sums of its epochs anew


class DataMapCallback(TrainerCallback):
    """Makes a `DataMap` inside any Trainer (cartography, Swayamdipta et al. 2020, arXiv:2009.10795).

    At the end of each whole epoch the model reads the training rows once, in their own order, in eval mode and without
    gradients. Rows are known by their position: shuffling, gradient accumulation, several processes (each takes its
    share) and resumed runs give the same map. **It costs one forward pass over the data set an epoch**, about a third
    of the epoch's time. Training goes on bit for bit as without it, but for a data set or collator with hidden random
    state of its own. Random crops and masks are the same in each pass.

    An epoch that was left in the middle (`max_steps`, early stopping on steps) is no epoch of the map.

    Args:
        dataset: Rows to map; None takes the Trainer's training data set. It needs a length, and rows as the Trainer's
            collator takes them.
        output_dir: Folder of the map, written after each epoch (`DataMap.load` reads it), and of a file per epoch (24
            bytes a row). None takes `data_map` in the Trainer's folder. A run from the start replaces an older map, a
            resumed one goes on with the epochs before its checkpoint.
        batch_size: Rows per forward pass and process; None takes that of the Trainer's evaluation.
        every: Map every so many epochs.

    Attributes:
        data_map: The map so far, on the main process; None before the first epoch.

    Raises:
        SettingError: `batch_size` or `every` is below 1; at the start of training: a streaming data set, rows without
            labels or with others than classes.
        UnsupportedModelError: The model gives no logits of classes; raised at the start of training.

    Example:
        >>> callback = DataMapCallback(every=2)
        >>> # Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
        >>> # callback.data_map.label_errors(top=20)
        >>> callback.data_map is None
        True
    """

    def __init__(
        self,
        dataset: Any = None,
        output_dir: str | Path | None = None,
        batch_size: int | None = None,
        every: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("every", every)):
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if wrong and not (name == "batch_size" and value is None):
                raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}.")
        self.dataset, self.output_dir, self.batch_size, self.every = dataset, output_dir, batch_size, every
        self.data_map: DataMap | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Check rows and model on two rows, and take up the epochs before the checkpoint of a resumed run."""
        self._folder = Path(self.output_dir or Path(args.output_dir) / "data_map").expanduser()
        if self._folder.exists() and not self._folder.is_dir():
            raise CheckpointError(f"{self._folder} is a file; output_dir must be a folder.")
        self._pass = self._plan(args, model, train_dataloader)
        self._pass.check(model)
        self._is_main = args.process_index == 0
        self.data_map, self._seconds = None, 0.0
        just_ended = False
        if self._is_main:  # it alone keeps and writes the map
            self._running, self._about = RunningMeasures(len(self._pass.dataset)), self._describe(model)
            just_ended = self._take_up(state)
        if _main_says(just_ended, args):
            self._record(round(state.epoch), model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the epoch to the map and write it."""
        epoch = round(state.epoch or 0)
        if state.epoch != epoch or epoch < 1:
            logger.info("Epoch %s was left before its end and is not in the data map.", state.epoch)
        elif epoch % self.every == 0:
            self._record(epoch, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where the map is, or that there is none."""
        if not self._is_main:
            return
        if self.data_map is None:
            logger.warning(
                "There is no data map: training ended at epoch %s, and every=%s asks for whole epochs.",
                *(state.epoch, self.every),
            )
        else:
            logger.info("Data map of %s epochs in %s.", len(self.data_map.epochs), self._folder)

    def _plan(self, args: Any, model: Any, dataloader: Any) -> RowPass:
        dataset = dataloader.dataset if self.dataset is None else self.dataset
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise SettingError(
                f"A data map needs rows with numbers, got a streaming data set ({type(dataset).__name__}). Take some "
                "rows first: Dataset.from_list(list(it.take(n))), and pass them as dataset=."
            )
        if len(dataset) == 0:
            raise SettingError("The data set of the data map is empty: it has no rows.")
        names = (*(args.label_names or ()), *LABEL_NAMES)
        if self.dataset is not None and args.remove_unused_columns and hasattr(dataset, "select_columns"):
            fed = {*accepted_inputs(_inner(model)), *names}
            dataset = dataset.select_columns([name for name in dataset.column_names if name in fed])
        return RowPass(
            dataset=dataset,
            collator=dataloader.collate_fn,
            batch_size=self.batch_size or args.eval_batch_size,
            label_names=tuple(dict.fromkeys(names)),
            is_causal=_is_causal(model),
            device=torch.device(args.device),
            process=args.process_index,
            processes=args.world_size,
        )

    def _describe(self, model: nn.Module) -> dict[str, Any]:
        config: Any = getattr(model, "config", None)
        names = getattr(config, "id2label", None) or {}
        return {
            "columns": column_digests(self._pass.dataset),
            "label_names": tuple(str(names[number]) for number in sorted(names)),
            "model": None if config is None else model_name(config),
        }

    def _take_up(self, state: Any) -> bool:
        """Add the files of the epochs before the checkpoint; returns whether the epoch that just ended has none.

        A run that is killed between the checkpoint of an epoch's last step and the epoch's end leaves such a one.
        """
        done = int(state.epoch or 0)
        asked = range(self.every, done + 1, self.every)
        there = [epoch for epoch in asked if self._path(epoch).is_file()]
        for epoch in there:
            self._add(epoch, self._read(epoch))
        just_ended = done in asked and done not in there and state.epoch == done
        lost = sorted({*asked} - {*there} - ({done} if just_ended else set()))
        if lost:
            logger.warning(
                "The run resumes after epoch %s, but %s has no file of the epochs %s: the data map goes without them.",
                *(state.epoch, self._folder / EPOCHS, lost),
            )
        return just_ended

    def _record(self, epoch: int, model: nn.Module) -> None:
        started = time.perf_counter()
        parts = self._pass.measure(model)
        if not self._is_main:
            return
        self._seconds += time.perf_counter() - started
        settings = {"columns": self._about["columns"], "epoch": epoch, "seconds": self._seconds}
        write_arrays(self._path(epoch), parts, settings)
        self._add(epoch, parts)
        for path in self._path(0).parent.glob("epoch-*.safetensors"):
            if path not in map(self._path, self._running.epochs):  # of an older run
                path.unlink()
        if self.data_map is not None:
            self.data_map.save(self._folder)

    def _add(self, epoch: int, parts: Any) -> None:
        self._running.add(epoch, parts)
        epochs = tuple(self._running.epochs)
        self.data_map = DataMap(**self._running.arrays(), epochs=epochs, seconds=self._seconds, **self._about)

    def _read(self, epoch: int) -> Any:
        path = self._path(epoch)
        parts, settings = read_arrays(path)
        rows = len(self._pass.dataset)
        if settings.get("columns") != self._about["columns"] or any(len(part) != rows for part in parts.values()):
            raise CheckpointError(
                f"{path} was made of other rows than this run's {rows:,}. Resume with the same data set, or give the "
                "data map another output_dir."
            )
        if set(parts) != set(PARTS):
            raise CheckpointError(f"{path} is corrupt: expected {', '.join(PARTS)}, got {', '.join(parts)}.")
        self._seconds = float(settings.get("seconds") or 0.0)
        return parts

    def _path(self, epoch: int) -> Path:
        return self._folder / EPOCHS / f"epoch-{epoch:05d}.safetensors"


def _inner(model: Any) -> Any:
    """The model inside an adapter's or a sharding wrapper."""
    model = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return model.module if type(model).__name__ == "FullyShardedDataParallel" else model


def _is_causal(model: Any) -> bool:
    """Whether the logits at t are of the token at t + 1."""
    model = _inner(model)
    try:
        return infer_task(model) == "text-generation"
    except (UnsupportedModelError, SettingError):  # a class of its own: as transformers' loss sees it
        is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return is_decoder and getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")


def _main_says(value: bool, args: Any) -> bool:
    """A fact that the main process knows, on all processes."""
    if args.world_size == 1:
        return value
    said = torch.tensor(int(value), device=args.device)
    torch.distributed.broadcast(said, src=0)
    return bool(said)
