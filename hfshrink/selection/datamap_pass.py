"""One eval-mode pass over a data set in its own order, which leaves no trace in the training around it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hfshrink.data import row_lengths
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.modules import accepted_inputs
from hfshrink.selection.datamap_measures import PARTS, row_measures
from hfshrink.terminal import progress

BLOCK = 1000  # rows whose content is in memory at once
GENERATORS: dict[type, Callable[[int], Any]] = {
    torch.Generator: lambda number: torch.Generator().manual_seed(number),
    np.random.Generator: np.random.default_rng,
    np.random.RandomState: np.random.RandomState,
    random.Random: random.Random,
}
"""Kind of a collator's own source of random numbers -> how to make one of a seed."""


@dataclass(frozen=True)
class RowPass:
    """How a model is asked for the labels of a data set.

    Attributes:
        dataset: Rows by number, each a dict as the collator takes it.
        collator: Makes a batch of a list of rows.
        batch_size: Rows per batch; the batches are the same whatever the number of processes.
        label_names: Names under which a batch may hold its labels, the first found counts.
        is_causal: Whether the logits at t speak of the token at t + 1.
        device: Where the model is.
        process: Number of this process, which takes every `processes`-th batch.
        processes: Their number.
    """

    dataset: Any
    collator: Callable[[list[Any]], Any]
    batch_size: int
    label_names: tuple[str, ...]
    is_causal: bool
    device: torch.device
    process: int = 0
    processes: int = 1

    def check(self, model: nn.Module) -> None:
        """Try the first two rows, before an epoch of training is spent.

        Raises:
            SettingError: The rows have no labels, or none that are classes.
            UnsupportedModelError: The model makes no logits of classes for them.
        """
        with _untouched(model, self.device):
            self._measure(model, list(range(min(2, len(self.dataset)))))

    def measure(self, model: nn.Module) -> dict[str, NDArray[Any]]:
        """The measures of all rows, (rows,) each and in their order, the same on each process.

        Raises:
            SettingError: The model's answer for a row is NaN or infinite.
        """
        found = {name: np.zeros(len(self.dataset), dtype) for name, dtype in PARTS.items()}
        portions = self._portions()
        own = portions[self.process :: self.processes]
        shown = progress(own, "data map", total=len(own)) if self.process == 0 else own
        with _untouched(model, self.device):
            for rows in shown:
                measured = self._measure(model, rows)
                for name, values in found.items():
                    values[rows] = measured[name].numpy()
            if len(own) < -(-len(portions) // self.processes):  # sharded models are called by all processes or none
                self._measure(model, portions[0])
        return found if self.processes == 1 else {n: _summed(values, self.device) for n, values in found.items()}

    def _portions(self) -> list[list[int]]:
        """Row numbers in batches, those of like length together and the longest first."""
        order = list(range(len(self.dataset)))
        if "input_ids" in getattr(self.dataset, "column_names", ()):
            lengths = row_lengths(self.dataset)
            order.sort(key=lambda row: -lengths[row])
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _measure(self, model: Any, rows: list[int]) -> dict[str, Tensor]:
        _seed(rows[0])  # random masks and crops are the same in each epoch and on any number of processes
        collator = _seeded(self.collator, rows[0])
        fetch = getattr(self.dataset, "__getitems__", None)
        features = [self.dataset[row] for row in rows] if fetch is None else fetch(rows)
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in dict(collator(features)).items()
        }
        name = next((name for name in self.label_names if isinstance(batch.get(name), Tensor)), None)
        if name is None:
            raise SettingError(
                f"A data map needs labels: expected one of {', '.join(self.label_names)} in a batch, got "
                f"{', '.join(map(str, batch))}. Regression, spans of answers and unlabelled rows have no data map."
            )
        labels = batch[name]
        logits = getattr(model(**_fed(model, batch, name)), "logits", None)
        labels, logits = _aligned(labels, logits, self.is_causal)
        measured = row_measures(logits, labels)
        self._check_finite(measured, rows)
        return measured

    def _check_finite(self, measured: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        labelled = ~torch.isnan(measured["correct"])
        broken = labelled & ~torch.isfinite(measured["error"])
        if bool(broken.any()):
            raise SettingError(
                f"The model's logits for row {rows[int(broken.nonzero()[0])]} are NaN or infinite. Training has "
                "diverged: lower the learning rate, or check the rows."
            )


def _fed(model: Any, batch: Mapping[str, Any], label_name: str) -> dict[str, Any]:
    """What the model reads, without labels (no loss is needed) but where they are a decoder's inputs."""
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    taken = accepted_inputs(inner)
    fed = {name: value for name, value in batch.items() if not taken or name in taken}
    is_decoder_input = "decoder_input_ids" in taken and "decoder_input_ids" not in fed and batch[label_name].ndim > 1
    return fed if is_decoder_input else {name: value for name, value in fed.items() if name != label_name}


def _aligned(labels: Tensor, logits: Any, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Labels and the logits that speak of them.

    Raises:
        SettingError: The labels are no classes.
        UnsupportedModelError: The logits have not their shape.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise SettingError(
            f"A data map needs one class per row or token, got labels of shape {tuple(labels.shape)} and type "
            f"{labels.dtype}. Regression and several labels per row have no data map."
        )
    if labels.ndim == 2 and labels.shape[1] == 1 and isinstance(logits, Tensor) and logits.ndim == 2:
        labels = labels[:, 0]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        raise UnsupportedModelError(
            f"Expected logits of shape {(*labels.shape, 'classes')} for labels of shape {tuple(labels.shape)}, got "
            f"{shape}. A data map needs a model that gives each row, or each token, a class."
        )
    return (labels[:, 1:], logits[:, :-1]) if is_causal and labels.ndim == 2 else (labels, logits)


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradients, eval mode, and afterwards the random state of Python, numpy and torch as before."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 # others draw from the global state
    devices = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind), torch.no_grad(), eval_mode(model):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def _seeded(collator: Callable[[list[Any]], Any], number: int) -> Callable[[list[Any]], Any]:
    """The collator; of one that draws from a generator of its own a copy, so that training's generator stays."""
    own = getattr(collator, "__dict__", {})
    changed: dict[str, Any] = {}
    for name, value in own.items():
        make = next((make for kind, make in GENERATORS.items() if isinstance(value, kind)), None)
        if make is not None:
            changed[name] = make(number)
    if "generator" in own and own.get("seed") is not None:  # transformers': made of the seed when it is first needed
        changed |= {"generator": None, "seed": number}
    if not changed:
        return collator
    made = copy.copy(collator)
    made.__dict__.update(changed)
    return made


def _summed(values: NDArray[Any], device: torch.device) -> NDArray[Any]:
    """The sum over processes, of which each filled other rows and left zeros."""
    tensor = torch.from_numpy(values).to(device)
    torch.distributed.all_reduce(tensor)
    summed: NDArray[Any] = tensor.cpu().numpy()
    return summed
