"""How hard each row is, by the papers' formulas written out: the oracle of what the library sums as it goes.

Shapes: S runs or epochs, n rows, C classes.
"""

from itertools import pairwise

import numpy as np


def probabilities_of(logits):
    """softmax(z) over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def errors(probabilities, labels):
    """‖p − onehot(y)‖₂ of probabilities (S, n, C): (S, n)."""
    return np.linalg.norm(probabilities - np.eye(probabilities.shape[-1])[labels], axis=-1)


def el2n(probabilities, labels):
    """Mean over the runs of ‖p − onehot(y)‖₂ (arXiv:2107.07075)."""
    return errors(probabilities, labels).mean(axis=0)


def grand_last_layer(probabilities, labels, features):
    """Mean over the runs of ‖∂ℓ/∂(W, b)‖ = ‖p − onehot(y)‖₂ · √(‖h‖² + 1), features h (n, d) (arXiv:2107.07075)."""
    return (errors(probabilities, labels) * np.sqrt((features**2).sum(axis=-1) + 1)).mean(axis=0)


def forgetting(correct, never):
    """How often a row falls from right to wrong, correct (epochs, n); `never` where it never was right."""
    return np.array(
        [sum(one and not two for one, two in pairwise(row)) if any(row) else never for row in correct.T.tolist()]
    )


def aum(logits, labels):
    """Mean over the epochs of z_y − max_{i≠y} z_i (arXiv:2001.10528)."""
    margins = [[z[y] - np.delete(z, y).max() for z, y in zip(rows, labels, strict=True)] for rows in logits]
    return np.mean(margins, axis=0)


def cartography(gold, correct):
    """Confidence, variability and correctness of p_y and of being right, both (epochs, n) (arXiv:2009.10795)."""
    return gold.mean(axis=0), gold.std(axis=0), correct.mean(axis=0)


def h_score(correct):
    """Share of all passes, correct (…, n), in which a row is right (arXiv:2407.08887)."""
    return correct.reshape(-1, correct.shape[-1]).mean(axis=0)
