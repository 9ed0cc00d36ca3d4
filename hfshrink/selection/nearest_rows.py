"""From learned embeddings to real rows: near each of them, and together like their class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hfshrink.selection.blockwise import Floats, Rows, squared_lengths
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.matching import exchange, nearest_distinct

NEIGHBOURS = 64  # of each learned embedding: the rows that may stand for it
HEAD_ROWS = 20_000  # that a linear head is fitted on at most
NO_CHANCE = -1e4  # logit of a class without rows: finite, and its probability is 0


def matched_rows(rows: Rows, points: Floats, features: Callable[[Floats], Tensor]) -> NDArray[np.int64]:
    """A real row for each learned point: first the nearest ones, then, among their neighbours, those that match best.

    The nearest rows alone are near the middle of the class, all alike; `exchange` spreads them.

    Args:
        rows: The rows of one class, at least as many as points.
        points: (k, d) learned embeddings in the same coordinates.
        features: (m, d) rows -> (m, f), in whose mean the rows chosen shall be like the class.

    Returns:
        (k,) different positions in `rows`, point by point.
    """
    size = min(max(NEIGHBOURS, len(points)), len(rows))
    near: NDArray[np.int64] = np.zeros((len(points), 0), dtype=np.int64)
    distances: Floats = np.zeros((len(points), 0), dtype=np.float32)
    target, lengths = torch.zeros(()), squared_lengths(points)[:, None]
    for where, block in rows.blocks(len(points)):
        found = squared_lengths(block)[None] - 2 * points @ block.T + lengths
        near = np.hstack([near, np.broadcast_to(np.arange(where.start, where.stop), found.shape)])
        distances = np.hstack([distances, found])
        best = np.argsort(distances, axis=1, kind="stable")[:, :size]
        near, distances = np.take_along_axis(near, best, 1), np.take_along_axis(distances, best, 1)
        target = target + features(block).double().sum(dim=0)
    candidates = np.unique(near)
    vectors = rows.take(candidates)
    start = nearest_distinct(torch.cdist(torch.from_numpy(points), torch.from_numpy(vectors)))
    chosen = exchange(features(vectors), (target / len(rows)).float(), start)
    return candidates[chosen.numpy()]


@torch.inference_mode(mode=False)
@torch.enable_grad()
def head_logits(rows: Rows, labels: NDArray[np.int64], wanted: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """What a linear classifier, fitted on all rows (of many on a sample), says about some: their soft labels.

    Minimizes mean cross-entropy + λ/2 ‖W‖² with λ = d / (10 n) on rows scaled to unit variance over all features, by
    L-BFGS.

    Args:
        rows: n rows around 0.
        labels: (n,) class numbers from 0 on, each with rows.
        wanted: Row numbers.
        seed: Of the sample.

    Returns:
        (len(wanted), classes) logits.
    """
    sample = random_subset(len(labels), min(HEAD_ROWS, len(labels)), seed, labels)  # of each class at least a row
    vectors, targets = torch.from_numpy(rows.take(sample)).double(), torch.from_numpy(labels[sample])
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, vectors.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    scale = vectors.std().item() or 1.0
    vectors /= scale
    decay = vectors.shape[1] / (10 * len(sample))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vectors @ weight.T + bias, targets) + decay / 2 * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        logits = torch.from_numpy(rows.take(wanted)).double() / scale @ weight.T + bias
    return logits.float().numpy()
