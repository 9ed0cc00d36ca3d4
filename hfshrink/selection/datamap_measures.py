"""Training dynamics of each row, in streaming sums: memory is a few numbers per row, however many epochs there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED

CHUNK = 2**24  # logits whose probabilities are in memory at once
PARTS: dict[str, Any] = {
    "probability": np.float32,
    "correct": np.float32,
    "margin": np.float32,
    "error": np.float32,
    "label": np.int32,
    "rival": np.int32,
}
"""What one pass tells of each row, and its dtype; see `row_measures`."""


def row_measures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a model says of the labels y of each row, by its logits z and probabilities p = softmax(z).

    `probability` p_y (cartography, arXiv:2009.10795), `correct` [argmax z = y], `margin` z_y − max_{i≠y} z_i (AUM,
    arXiv:2001.10528), `error` ‖p − onehot(y)‖₂ (EL2N, arXiv:2107.07075). A row with several labelled positions, as
    in token tasks and language models, has the mean over them; one without any has NaN.

    Args:
        logits: (rows, classes), or (rows, positions, classes).
        labels: (rows,), or (rows, positions) with -100 where there is no label.

    Returns:
        The four in float64, (rows,); also `label` and `rival`, the best class besides y, both −1 where a row has
        several positions or no label.

    Raises:
        SettingError: A label that is no class of the model.

    Example:
        >>> found = row_measures(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
        >>> found["margin"].item(), found["rival"].item(), round(found["probability"].item(), 3)
        (1.0, 2, 0.665)
    """
    rows, classes = len(labels), logits.shape[-1]
    numbers = torch.arange(rows, device=labels.device).reshape(-1, *[1] * (labels.ndim - 1)).expand_as(labels)
    keep = labels != IGNORED
    gold, owner = labels[keep], numbers[keep].cpu()
    if gold.numel() and not 0 <= int(gold.min()) <= int(gold.max()) < classes:
        raise SettingError(
            f"Labels must lie in 0..{classes - 1}, the model's classes, got {int(gold.min())}..{int(gold.max())}."
        )
    flat = logits[keep]
    step = max(1, CHUNK // classes)
    chunks = [_position_measures(flat[i : i + step], gold[i : i + step]) for i in range(0, len(gold), step)]
    counts = torch.zeros(rows, dtype=torch.float64).index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
    found = {}
    for name in ("probability", "correct", "margin", "error"):
        values = torch.cat([chunk[name].double() for chunk in chunks]) if chunks else torch.zeros(0).double()
        found[name] = torch.zeros(rows, dtype=torch.float64).index_add_(0, owner, values) / counts
    for name in ("label", "rival"):
        found[name] = torch.full((rows,), -1)
        if labels.ndim == 1 and chunks:
            found[name][owner] = torch.cat([chunk[name] for chunk in chunks])
    return found


def _position_measures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same for logits (positions, classes) and labels (positions,), on the CPU."""
    logits, gold = logits.float(), labels[:, None]
    error = logits.softmax(dim=-1)
    probability = error.gather(1, gold)[:, 0]
    error.scatter_add_(1, gold, torch.full_like(gold, -1, dtype=error.dtype))
    best, rival = logits.scatter(1, gold, -torch.inf).max(dim=-1)
    found = {
        "probability": probability,
        "correct": logits.argmax(dim=-1) == labels,
        "margin": logits.gather(1, gold)[:, 0] - best,
        "error": error.norm(dim=-1),
        "label": labels,
        "rival": rival,
    }
    return {name: value.cpu() for name, value in found.items()}


class RunningMeasures:
    """The measures of a data map after each epoch, updated in place; the epochs must come in order.

    Confidence, AUM, correctness and EL2N are means over the epochs; variability is the standard deviation of p_y (of
    the epochs themselves, not an estimate: divided by E), by Welford's recurrence. Forgetting needs the epoch before.

    Args:
        rows: Number of rows.
    """

    def __init__(self, rows: int) -> None:
        self.epochs: list[int] = []
        self._mean, self._squares = np.zeros(rows), np.zeros(rows)
        self._correct, self._margin, self._error = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self._forgotten, self._before, self._best = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self._lowest, self._predicted = np.full(rows, np.inf), np.full(rows, -1, dtype=np.int64)
        self._labels = np.full(rows, -1, dtype=np.int64)

    def add(self, epoch: int, parts: Mapping[str, NDArray[Any]]) -> None:
        """Take in one epoch.

        Args:
            epoch: Its number, counted from 1.
            parts: Arrays (rows,) by the names of `PARTS`.
        """
        self.epochs.append(epoch)
        probability, correct, margin = (
            np.asarray(parts[name], dtype=np.float64) for name in ("probability", "correct", "margin")
        )
        step = probability - self._mean
        self._mean += step / len(self.epochs)
        self._squares += step * (probability - self._mean)
        self._correct += correct
        self._margin += margin
        self._error += parts["error"]
        self._forgotten += np.maximum(self._before - correct, 0.0)
        self._before = correct
        self._best = np.maximum(self._best, correct)
        lower = margin < self._lowest
        self._lowest[lower] = margin[lower]
        self._labels = np.asarray(parts["label"], dtype=np.int64)
        chosen = np.where(margin < 0, parts["rival"], parts["label"])
        self._predicted[lower] = chosen[lower]

    def arrays(self) -> dict[str, Any]:
        """The fields of a `DataMap` by name, (rows,) each.

        Raises:
            SettingError: No epoch was added.
        """
        count = len(self.epochs)
        if not count:
            raise SettingError("The data map has no epoch yet: it is made at the end of each whole epoch.")
        learned = ~(self._best == 0)  # NaN, a row without label, is not told apart here
        found: dict[str, Any] = {
            "confidence": self._mean.copy(),
            "variability": np.sqrt(np.maximum(self._squares / count, 0.0)),
            "correctness": self._correct / count,
            "aum": self._margin / count,
            "el2n": self._error / count,
            "forgetting": np.where(learned, self._forgotten, np.inf),
        }
        if (self._labels >= 0).any():
            found |= {"labels": self._labels.copy(), "predicted": self._predicted.copy()}
        return found
