"""Scaling: every part of the loss is a mean over the items of the whole accumulated batch, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.losses.logits import loss_mask
from hfshrink.labels import IGNORED

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself


class ItemsMixin(_Trainer):
    """Counts the items (examples, or positions that count) of each optimizer step; a batch weighs by its share."""

    _loss_steps: int  # optimizer steps since the last log

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step, and the number of their items on all processes together."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [self._student_written(batch, number) for number, batch in enumerate(samples)]
        self._loss_steps += bool(samples)
        counts = [count_items(batch, loss_mask(batch, self._head(batch))) for batch in samples]
        return samples, self.accelerator.gather(torch.tensor(sum(counts), device=device)).sum()

    def _share(self, items: int, num_items_in_batch: Any) -> Any:
        """Weight of this batch's mean; the processes' gradients are averaged afterwards, hence their number."""
        if num_items_in_batch is None:
            return 1.0 / self.current_gradient_accumulation_steps
        return items * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)


def count_items(inputs: dict[str, Any], mask: Tensor | None) -> int:
    """Examples of a batch, or positions that count where the head answers per token."""
    if mask is not None:
        return int(mask.sum())
    return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def share_of_labelled(labels: list[Any], mask: Tensor | None) -> float:
    """The share of a batch's items that have a label: those of −100 have none.

    Args:
        labels: The batch's labels (start and end for spans).
        mask: Positions that count, for token heads; they all have a label, or none has.
    """
    if mask is not None:
        return float(mask.any())
    numbers = labels[0]
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.ndim != 1:
        return 1.0
    return (numbers != IGNORED).float().mean().item()
