"""How hard each row is, by the papers' formulas: pure functions of what models said of the rows in runs or epochs.

Shapes: S runs or epochs, n rows, C classes. `datamap_measures` holds the same sums for one epoch after the other,
where the answers of all of them together would be too large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError

Scores = NDArray[np.float64]


def probabilities_of(logits: ArrayLike) -> Scores:
    """softmax(z) over the last axis, in float64 and without overflow.

    Example:
        >>> probabilities_of([[0.0, 0.0]]).tolist()
        [[0.5, 0.5]]
    """
    array = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(array - array.max(axis=-1, keepdims=True))
    normalised: Scores = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return normalised


def el2n(probabilities: ArrayLike, labels: ArrayLike) -> Scores:
    """EL2N, mean over the runs of ‖p − onehot(y)‖₂ (Paul et al. 2021, arXiv:2107.07075).

    The paper takes one early epoch of about ten runs. The higher, the harder: from 0 to √2.

    Args:
        probabilities: (S, n, C), each row adding up to 1.
        labels: (n,) class numbers.

    Returns:
        (n,)

    Raises:
        SettingError: Other shapes, probabilities that are none, labels that are no classes.

    Example:
        >>> el2n([[[1.0, 0.0], [0.0, 1.0]]], [0, 0]).round(3).tolist()
        [0.0, 1.414]
    """
    stack, classes = _check(probabilities, labels, "probabilities")
    return _errors(stack, classes).mean(axis=0)


def grand_last_layer(probabilities: ArrayLike, labels: ArrayLike, features: ArrayLike, *, bias: bool = True) -> Scores:
    """GraNd of the last layer: mean over the runs of ‖∂ℓ/∂(W, b)‖ (Paul et al. 2021, arXiv:2107.07075).

    For a linear layer z = W h + b under cross-entropy the gradient is (p − onehot(y)) [h; 1]ᵀ, whose Frobenius norm
    is ‖p − onehot(y)‖₂ · √(‖h‖² + 1): exact, and no backward pass is needed.

    Args:
        probabilities: (S, n, C).
        labels: (n,) class numbers.
        features: The layer's inputs h, (n, d), or (S, n, d) where they differ by run.
        bias: Whether the layer has b.

    Returns:
        (n,) norms, the higher, the harder.

    Raises:
        SettingError: As for `el2n`, or features of another shape.

    Example:
        >>> grand_last_layer([[[0.5, 0.5]]], [0], [[1.0]]).round(3).tolist()
        [1.0]
    """
    stack, classes = _check(probabilities, labels, "probabilities")
    vectors = np.asarray(features, dtype=np.float64)
    if (
        vectors.ndim not in (2, 3)
        or vectors.shape[-2] != len(classes)
        or vectors.shape[:-2] not in ((), stack.shape[:1])
    ):
        raise SettingError(
            f"features must have shape ({len(classes)}, d) or ({len(stack)}, {len(classes)}, d), got {vectors.shape}."
        )
    return (_errors(stack, classes) * np.sqrt((vectors**2).sum(axis=-1) + bias)).mean(axis=0)


def forgetting(correct: ArrayLike, never: float = np.inf) -> Scores:
    """Forgetting events: how often a row that was right is wrong the next time (Toneva et al. 2019, arXiv:1812.05159).

    Args:
        correct: (epochs, n) truths in the order of training.
        never: The score of a row that never was right: infinite in the paper. Selection by strata needs a number,
            such as that of the epochs.

    Returns:
        (n,) counts, the higher, the harder.

    Raises:
        SettingError: Another shape, or values besides 0 and 1.

    Example:
        >>> forgetting([[0, 1, 0], [1, 0, 0], [0, 1, 0]]).tolist()
        [1.0, 1.0, inf]
    """
    right = _check_correct(correct, dimensions=(2,))
    events = (right[:-1] & ~right[1:]).sum(axis=0)
    return np.where(right.any(axis=0), events, float(never))


def aum(logits: ArrayLike, labels: ArrayLike) -> Scores:
    """Area under the margin, mean over the epochs of z_y − max_{i≠y} z_i (Pleiss et al. 2020, arXiv:2001.10528).

    Args:
        logits: (epochs, n, C).
        labels: (n,) class numbers.

    Returns:
        (n,) margins. The **lower**, the harder; below 0 the label is likely wrong.

    Raises:
        SettingError: Other shapes, NaN, labels that are no classes.

    Example:
        >>> aum([[[3.0, 1.0], [3.0, 1.0]]], [0, 1]).tolist()
        [2.0, -2.0]
    """
    stack, classes = _check(logits, labels, "logits")
    rows = np.arange(len(classes))
    others = stack.copy()
    others[:, rows, classes] = -np.inf
    return (stack[:, rows, classes] - others.max(axis=-1)).mean(axis=0)


def cartography(probabilities: ArrayLike, correct: ArrayLike | None = None) -> tuple[Scores, Scores, Scores]:
    """The coordinates of a data map (Swayamdipta et al. 2020, arXiv:2009.10795).

    Confidence is the mean of p_y over the epochs, variability its standard deviation (divided by E), correctness the
    share of epochs in which the row is right.

    Args:
        probabilities: Of each row's own label, (epochs, n).
        correct: (epochs, n) truths; None takes p_y > 1/2, which is exact for two classes and too strict for more.

    Returns:
        confidence, variability, correctness: (n,) each.

    Raises:
        SettingError: Other shapes, or values that are no probabilities.

    Example:
        >>> [values.tolist() for values in cartography([[0.25, 1.0], [0.75, 1.0]])]
        [[0.5, 1.0], [0.25, 0.0], [0.5, 1.0]]
    """
    gold = np.asarray(probabilities, dtype=np.float64)
    if gold.ndim != 2 or 0 in gold.shape or not ((gold >= 0) & (gold <= 1 + 1e-6)).all():
        raise SettingError(f"Expected probabilities of shape (epochs, rows), got {_seen(gold)}.")
    right = gold > 0.5 if correct is None else _check_correct(correct, dimensions=(2,))
    if right.shape != gold.shape:
        raise SettingError(f"correct must have the probabilities' shape {gold.shape}, got {right.shape}.")
    return gold.mean(axis=0), gold.std(axis=0), right.mean(axis=0)


def h_score(correct: ArrayLike) -> Scores:
    """H-score: how often a row is classified right over runs and epochs (Tayaranian et al. 2024, arXiv:2407.08887).

    The paper drops both ends, rows that are always right (nothing to learn) and never right (noise). Here it is the
    share of all passes, so that different numbers of runs can be compared.

    Args:
        correct: (S, n) or (runs, epochs, n) truths.

    Returns:
        (n,) in [0, 1]: 1 is always right.

    Raises:
        SettingError: Another shape, or values besides 0 and 1.

    Example:
        >>> h_score([[1, 0, 1], [1, 0, 0]]).tolist()
        [1.0, 0.0, 0.5]
    """
    right = _check_correct(correct, dimensions=(2, 3))
    shares: Scores = right.reshape(-1, right.shape[-1]).mean(axis=0)
    return shares


def _errors(probabilities: Scores, labels: NDArray[np.int64]) -> Scores:
    """‖p − onehot(y)‖₂ of (S, n, C): (S, n)."""
    error = probabilities.copy()
    error[:, np.arange(len(labels)), labels] -= 1
    return np.sqrt((error**2).sum(axis=-1))


def _check(values: ArrayLike, labels: ArrayLike, name: str) -> tuple[Scores, NDArray[np.int64]]:
    array, classes = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if array.ndim != 3 or 0 in array.shape or array.shape[2] < 2:
        raise SettingError(f"{name} must have the shape (runs or epochs, rows, classes), got {array.shape}.")
    if classes.dtype.kind not in "iu" or classes.shape != array.shape[1:2]:
        raise SettingError(
            f"labels must be one class number for each of {array.shape[1]} rows, got {classes.dtype} of shape "
            f"{classes.shape}."
        )
    if not 0 <= classes.min() <= classes.max() < array.shape[2]:
        raise SettingError(
            f"labels must lie in 0..{array.shape[2] - 1}, the classes of the {name}, got "
            f"{classes.min()}..{classes.max()}."
        )
    if not np.isfinite(array).all():
        run, row = np.argwhere(~np.isfinite(array).all(axis=2))[0]
        raise SettingError(f"The {name} of row {row} are NaN or infinite in run or epoch {run}. Score them again.")
    if name == "probabilities" and (array.min() < 0 or np.abs(array.sum(axis=2) - 1).max() > 1e-2):
        raise SettingError(f"probabilities must add up to 1 in each row, got {_seen(array)}. Are they logits?")
    return array, classes.astype(np.int64)


def _check_correct(correct: ArrayLike, dimensions: tuple[int, ...]) -> NDArray[np.bool_]:
    array = np.asarray(correct)
    if array.ndim not in dimensions or 0 in array.shape or not np.isin(array, (0, 1)).all():
        shapes = " or ".join({2: "(epochs or runs, rows)", 3: "(runs, epochs, rows)"}[number] for number in dimensions)
        raise SettingError(f"correct must hold only 0 and 1 in the shape {shapes}, got {_seen(array)}.")
    return array.astype(bool)


def _seen(array: NDArray[Any]) -> str:
    bounds = f" with values in {array.min():.4g}..{array.max():.4g}" if array.size else ""
    return f"an array of shape {array.shape}{bounds}"
