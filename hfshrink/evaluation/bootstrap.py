"""Intervals and tests on the same examples: the bootstrap, McNemar's exact test, calibration error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hfshrink.evaluation.measures import Measure

MAX_WEIGHTS = 2**22
"""Weights that are held at a time (32 MB)."""


def resample_values(
    measure: Measure, predictions: Any, references: Any, *, key: str, resamples: int, seed: int
) -> np.ndarray:
    """One value of a metric on bootstrap samples of the examples (Efron 1979): n examples drawn with replacement.

    Example i is drawn wᵢ times, (w₁ … wₙ) ~ Multinomial(n; 1/n, …, 1/n), and the metric is reduce(Σ wᵢ · statisticsᵢ).
    The weights depend on `n`, `resamples` and `seed` only, so that two calls for two models see the same samples:
    their differences are paired.

    Args:
        measure: The metric.
        predictions: n predictions.
        references: n references.
        key: Which of the metric's values.
        resamples: Number of samples.
        seed: Seed of the draw.

    Returns:
        Array (resamples,); NaN where a sample leaves the value undefined.
    """
    size = len(references)
    if measure.statistics is None or measure.reduce is None:
        return np.array(
            [
                measure.compute(_take(predictions, drawn), _take(references, drawn)).get(key, np.nan)
                for drawn in _draws(size, resamples, seed)
            ],
            dtype=float,
        )
    statistics = measure.statistics(predictions, references)
    sums = np.concatenate([weights @ statistics for weights in _weights(size, resamples, seed)])
    return np.asarray(measure.reduce(sums)[key], dtype=float)


def percentile_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The 2.5 % and 97.5 % quantiles of bootstrap values; (None, None) where none is finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None, None
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def mcnemar_p(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947) that two models err equally often.

    Of the n examples that one model gets right and the other wrong, each is equally likely to go either way under the
    null hypothesis: p = min(1, 2 · Σ_{i ≤ k} C(n, i) / 2ⁿ) with k the smaller of the two counts.

    Example:
        >>> mcnemar_p(0, 5)
        0.0625
    """
    total, fewer = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    if total <= 1000:
        return min(1.0, 2 * sum(math.comb(total, i) for i in range(fewer + 1)) / 2**total)
    logs = (math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(log - total * math.log(2)) for log in logs))


def expected_calibration_error(confidences: Any, correct: Any, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    ECE = Σ_b |B_b| / n · |accuracy(B_b) - mean confidence(B_b)|, where bin b holds the confidences in ((b-1)/bins,
    b/bins].

    Args:
        confidences: Probability of the predicted class, (n,).
        correct: Whether the prediction is right, (n,).
        bins: Number of bins.

    Example:
        >>> round(expected_calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]), 6)
        0.15
    """
    confidences, correct = np.asarray(confidences, dtype=float), np.asarray(correct, dtype=float)
    number = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(number, weights=correct - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def _draws(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(0, size, size)


def _weights(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The draws as counts, in blocks (rows, size)."""
    block: list[np.ndarray] = []
    for drawn in _draws(size, resamples, seed):
        block.append(np.bincount(drawn, minlength=size).astype(float))
        if len(block) * size >= MAX_WEIGHTS:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def _take(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
