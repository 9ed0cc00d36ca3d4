"""The statistics of a proof: scores of every run on resampled rows, means over resampled seeds, paired differences."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.evaluation.bootstrap import percentile_interval, resample_values
from hfshrink.evaluation.measures import Measure, class_counts, class_totals, macro_scores, ratio, split_counts
from hfshrink.proof.results import METRICS, Interval

Floats = NDArray[np.float64]


def all_scores(sums: Floats) -> dict[str, Floats]:
    """Accuracy, and precision, recall and F1 as means over the classes, from sums of `class_counts`.

    Args:
        sums: (…, 3 · classes) hits, predicted and actual rows of each class.

    Returns:
        {"scores": (…, 4)} in the order of `METRICS`.
    """
    hits, _, actual = split_counts(sums)
    values = {"accuracy": ratio(hits.sum(axis=-1), actual.sum(axis=-1)), **macro_scores(sums)}
    return {"scores": np.stack([values[name] for name in METRICS], axis=-1)}


SCORES = Measure("scores", ("scores",), class_counts, all_scores, totals=class_totals)


def run_scores(predictions: NDArray[np.int64], references: NDArray[np.int64]) -> Floats:
    """(seeds, 4) scores of each seed's predictions, (seeds, n), on references (n,); in the order of `METRICS`.

    Example:
        >>> run_scores(np.array([[0, 1], [0, 0]]), np.array([0, 1]))[:, 0].tolist()
        [1.0, 0.5]
    """
    return np.stack([all_scores(class_totals(run, references))["scores"] for run in predictions])


def resampled_scores(
    predictions: NDArray[np.int64], references: NDArray[np.int64], resamples: int, seed: int
) -> Floats:
    """The scores on bootstrap samples of the rows (Efron 1979), the same samples for every call with as many rows.

    Args:
        predictions: (seeds, n) class numbers.
        references: (n,) class numbers.
        resamples: Number of samples.
        seed: Of the draw.

    Returns:
        (resamples, seeds, 4).
    """
    how: dict[str, Any] = {"key": "scores", "resamples": resamples, "seed": seed}
    return np.stack([resample_values(SCORES, run, references, **how) for run in predictions], axis=1)


def draw_seeds(seeds: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """(resamples, seeds) which seeds each sample consists of, drawn with replacement, whatever the arm."""
    return np.random.default_rng((seed, seeds)).integers(seeds, size=(resamples, seeds))


def seed_means(values: Floats, drawn: NDArray[np.int64]) -> Floats:
    """Means over the drawn seeds.

    Args:
        values: (resamples, seeds, k).
        drawn: (resamples, seeds) of `draw_seeds`.

    Returns:
        (resamples, k).

    Example:
        >>> seed_means(np.array([[[1.0], [3.0]]]), np.array([[1, 1]])).tolist()
        [[3.0]]
    """
    return np.take_along_axis(values, drawn[..., None], axis=1).mean(axis=1)


def interval(value: float, samples: Floats) -> Interval:
    """A value with the 2.5 % and 97.5 % quantiles of its samples, (resamples,)."""
    return Interval(float(value), *percentile_interval(samples))


def verdict(found: Interval, seeds: int) -> str:
    """What an interval of a difference says, and no more: one seed speaks of its own models alone.

    Example:
        >>> verdict(Interval(0.1, 0.02, 0.2), 3), verdict(Interval(-0.1, -0.2, 0.0), 3)
        ('better', 'not told apart')
    """
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "not told apart"
    said = "better" if found.low > 0 else "worse"
    return said if seeds > 1 else f"{said}, with this seed"


def class_recalls(predictions: NDArray[np.int64], references: NDArray[np.int64], classes: int) -> Floats:
    """(classes,) recall of each class, mean over the seeds; NaN where no row is of it.

    Example:
        >>> class_recalls(np.array([[0, 1, 1], [1, 1, 1]]), np.array([0, 1, 1]), 2).tolist()
        [0.5, 1.0]
    """
    actual = np.bincount(references, minlength=classes)
    hits = [np.bincount(references[run == references], minlength=classes) for run in predictions]
    with np.errstate(invalid="ignore"):
        return np.mean(hits, axis=0) / actual
