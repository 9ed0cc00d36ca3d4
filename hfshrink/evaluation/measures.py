"""The maths of the metrics: each is `statistics` per example and `reduce` of their sum.

So a bootstrap is a matrix product. A metric of this form is a function of the sum over examples of some numbers, as
accuracy is of (right, all): resampling the examples only changes the weights of that sum. Rank correlation has no such
form and is recomputed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfshrink.errors import SettingError
from hfshrink.evaluation.spans import answer_overlap
from hfshrink.evaluation.tags import tag_counts

Values = dict[str, Any]
"""name -> value, or array of values over the leading axes of the sums."""


@dataclass(frozen=True)
class Measure:
    """One metric, of one or several named values.

    Attributes:
        name: Its name in the tables.
        keys: Names of its values, the main one first; empty takes what `function` returns.
        statistics: (predictions, references) -> array (n, k), one row of numbers per example.
        reduce: Sums of these rows, (…, k), -> name -> array (…).
        function: (predictions, references) -> name -> number, for a metric that is no function of sums.
        totals: (predictions, references) -> the sum of `statistics`, (k,), where that needs less memory than its rows.
        source: The field of the evaluation that is its first argument: "predictions", or "top" for the k best classes.
        is_cheap: Whether a function may be called hundreds of times for an interval.
    """

    name: str
    keys: tuple[str, ...] = ()
    statistics: Callable[[Any, Any], np.ndarray] | None = None
    reduce: Callable[[np.ndarray], Values] | None = None
    function: Callable[[Any, Any], Mapping[str, float]] | None = None
    totals: Callable[[Any, Any], np.ndarray] | None = None
    source: str = "predictions"
    is_cheap: bool = True

    def compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """All values of the metric on all examples, the main one first."""
        values: Mapping[str, Any] = {}
        if self.statistics is not None and self.reduce is not None:
            values = self.reduce(self.sums(predictions, references))
        elif self.function is not None:
            values = self.function(predictions, references)
        return {name: float(values[name]) for name in self.keys or values}

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        """The sums of `statistics` over all examples, (k,)."""
        if self.totals is not None:
            return self.totals(predictions, references)
        return np.zeros(0) if self.statistics is None else self.statistics(predictions, references).sum(axis=0)


def ratio(part: Any, whole: Any) -> np.ndarray:
    """`part / whole`, and 0 where `whole` is 0, as scikit-learn and seqeval do for precision, recall and F1."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def share(sums: np.ndarray) -> np.ndarray:
    """First of two sums over the second, NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def matches(predictions: Any, references: Any) -> np.ndarray:
    """(1 if all of the prediction is right else 0, 1) per example; labels of shape (n,) or (n, labels)."""
    equal = np.asarray(predictions) == np.asarray(references)
    right = equal.reshape(len(equal), -1).all(axis=1)
    return np.stack([right, np.ones(len(right))], axis=1).astype(float)


def top_matches(predictions: Any, references: Any) -> np.ndarray:
    """(1 if the class is among the k predicted ones else 0, 1) per example; predictions (n, k), references (n,)."""
    right = (np.asarray(predictions) == np.asarray(references)[:, None]).any(axis=1)
    return np.stack([right, np.ones(len(right))], axis=1).astype(float)


def class_counts(predictions: Any, references: Any) -> np.ndarray:
    """Per example and class: hit, predicted, actual; (n,) class numbers -> (n, 3 · classes)."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    classes = np.arange(1 + max(predictions.max(initial=0), references.max(initial=0)))
    predicted, actual = predictions[:, None] == classes, references[:, None] == classes
    return np.concatenate([predicted & actual, predicted, actual], axis=1).astype(float)


def class_totals(predictions: Any, references: Any) -> np.ndarray:
    """The sum of `class_counts` over the examples, (3 · classes,), without its rows."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    size = 1 + max(predictions.max(initial=0), references.max(initial=0))
    sides = predictions[predictions == references], predictions, references
    return np.concatenate([np.bincount(side, minlength=size) for side in sides]).astype(float)


def label_counts(predictions: Any, references: Any) -> np.ndarray:
    """Per example and label: hit, predicted, actual; (n, labels) of 0 and 1 -> (n, 3 · labels)."""
    predicted, actual = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
    return np.concatenate([predicted & actual, predicted, actual], axis=1).astype(float)


def split_counts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums (…, 3 · classes) -> hits, predicted and actual counts, each (…, classes)."""
    hits, predicted, actual = np.split(sums, 3, axis=-1)
    return hits, predicted, actual


def macro_scores(sums: np.ndarray) -> Values:
    """Mean over classes of precision, recall and F1; a class that is neither predicted nor actual does not count."""
    hits, predicted, actual = split_counts(sums)
    present = (predicted + actual > 0).sum(axis=-1)
    values = {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
        "f1": ratio(2 * hits, predicted + actual),
    }
    return {name: ratio(value.sum(axis=-1), present) for name, value in values.items()}


def label_scores(sums: np.ndarray) -> Values:
    """F1 over all labels together (micro), and the mean over all labels of the F1 of each (macro)."""
    hits, predicted, actual = split_counts(sums)
    micro = ratio(2 * hits.sum(axis=-1), (predicted + actual).sum(axis=-1))
    return {"f1_micro": micro, "f1_macro": ratio(2 * hits, predicted + actual).mean(axis=-1)}


def entity_counts(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(hits, predicted, actual) entities per row of tags."""
    counts = [tag_counts(p, r) for p, r in zip(predictions, references, strict=True)]
    return np.array([[sum(side.values()) for side in row] for row in counts], dtype=float).reshape(-1, 3)


def entity_scores(sums: np.ndarray) -> Values:
    """F1, precision and recall over all entities together (micro)."""
    hits, predicted, actual = np.moveaxis(sums, -1, 0)
    return {
        "f1": ratio(2 * hits, predicted + actual),
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
    }


def tag_matches(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(right tags, tags) per row."""
    pairs = zip(predictions, references, strict=True)
    rows = [(sum(a == b for a, b in zip(p, r, strict=True)), len(r)) for p, r in pairs]
    return np.array(rows, dtype=float).reshape(-1, 2)


def answer_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(exact match, F1, 1) per question."""
    rows = [(*answer_overlap(p, r), 1.0) for p, r in zip(predictions, references, strict=True)]
    return np.array(rows, dtype=float).reshape(-1, 3)


def answer_means(sums: np.ndarray) -> Values:
    """Means over the questions of exact match and F1, from the sums of `answer_scores`."""
    return {"exact_match": sums[..., 0] / sums[..., 2], "f1": sums[..., 1] / sums[..., 2]}


def moments(predictions: Any, references: Any) -> np.ndarray:
    """(1, x, y, x², y², xy) per example, each variable less its median: a constant becomes exactly 0."""
    x, y = (np.asarray(side, dtype=float).ravel() for side in (predictions, references))
    x, y = x - np.median(x), y - np.median(y)
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)


def correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's r = cov(x, y) / (sx · sy) from the sums of `moments`; NaN where a variable is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        constant = (spread_x <= 1e-12 * xx) | (spread_y <= 1e-12 * yy)  # what rounding leaves of a zero
        return np.where(constant, np.nan, np.clip((xy - x * y / n) / np.sqrt(spread_x * spread_y), -1, 1))


def ranks(values: Any) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs.

    Example:
        >>> ranks([10, 30, 10]).tolist()
        [1.5, 3.0, 1.5]
    """
    _, inverse, counts = np.unique(np.asarray(values, dtype=float).ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(predictions: Any, references: Any) -> dict[str, float]:
    """Spearman's rho: Pearson's r of the ranks."""
    return {"spearman": float(correlation(moments(ranks(predictions), ranks(references)).sum(axis=0)))}


def squared_errors(predictions: Any, references: Any) -> np.ndarray:
    """((x - y)², 1) per example."""
    error = np.asarray(predictions, dtype=float).ravel() - np.asarray(references, dtype=float).ravel()
    return np.stack([error**2, np.ones(len(error))], axis=1)


def likelihoods(predictions: Any, references: Any) -> np.ndarray:
    """(sum of -ln p over the tokens, number of tokens) per row, as they come."""
    return np.stack([np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)], axis=1)


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp(mean of -ln p over all tokens)."""
    with np.errstate(over="ignore"):
        return np.exp(share(sums))


ACCURACY = Measure("accuracy", ("accuracy",), matches, lambda sums: {"accuracy": share(sums)})
MACRO = Measure("macro", ("precision", "recall", "f1"), class_counts, macro_scores, totals=class_totals)
LABELS = Measure("labels", ("f1_micro", "f1_macro"), label_counts, label_scores)
SUBSET = Measure("subset_accuracy", ("subset_accuracy",), matches, lambda sums: {"subset_accuracy": share(sums)})
PEARSON = Measure("pearson", ("pearson",), moments, lambda sums: {"pearson": correlation(sums)})
SPEARMAN = Measure("spearman", ("spearman",), function=rank_correlation)
SQUARED_ERROR = Measure("mse", ("mse",), squared_errors, lambda sums: {"mse": share(sums)})
ENTITIES = Measure("entities", ("f1", "precision", "recall"), entity_counts, entity_scores)
TOKENS = Measure("token_accuracy", ("token_accuracy",), tag_matches, lambda sums: {"token_accuracy": share(sums)})
ANSWERS = Measure("answers", ("exact_match", "f1"), answer_scores, answer_means)
PERPLEXITY = Measure("perplexity", ("perplexity",), likelihoods, lambda sums: {"perplexity": perplexity(sums)})

DEFAULTS: dict[str, tuple[Measure, ...]] = {
    "single_label": (ACCURACY, MACRO),
    "multi_label": (LABELS, SUBSET),
    "regression": (PEARSON, SPEARMAN, SQUARED_ERROR),
    "tokens": (ENTITIES, TOKENS),
    "answers": (ANSWERS,),
    "language": (PERPLEXITY,),
    "features": (),
}
"""kind of output -> its metrics; the first value of the first is the main one."""


def top_measure(k: int) -> Measure:
    """The share of examples whose class is among the k most probable ones, named by its k."""
    name = f"top_{k}_accuracy"
    return Measure(name, (name,), top_matches, lambda sums: {name: share(sums)}, source="top")


def default_measures(kind: str, top: int | None = None) -> tuple[Measure, ...]:
    """The metrics of a kind of output; with `top`, also the accuracy over that many best classes."""
    found = DEFAULTS[kind]
    return found if top is None else (found[0], top_measure(top), *found[1:])


def resolve_measures(metric: Any, kind: str, top: int | None = None) -> tuple[Measure, ...]:
    """The metrics that a user means.

    Args:
        metric: None for the defaults; a name; an object with `compute(predictions=, references=)`, such as an
            `evaluate.Metric`; a function (predictions, references) -> number or dict; or a list of these.
        kind: The kind of output, a key of `DEFAULTS`.
        top: k of the top-k accuracy, where there is one.

    Raises:
        SettingError: An unknown name, something else, or none for a kind that has no default.
    """
    defaults = default_measures(kind, top)
    if metric is None:
        if not defaults:
            raise SettingError(
                "feature-extraction has no metric of its own. "
                "Pass metric=, a function (embeddings, labels) -> float or dict."
            )
        return defaults
    if isinstance(metric, list | tuple):
        if not metric:
            raise SettingError("metric is an empty list. Leave it out for the metrics of the task.")
        return tuple(measure for item in metric for measure in resolve_measures(item, kind, top))
    if isinstance(metric, str):
        return (_by_name(metric, kind, defaults),)
    if isinstance(metric, type):
        metric = metric()
    if isinstance(getattr(metric, "measure", None), Measure):
        return (metric.measure,)
    return (_wrap(metric),)


def _by_name(name: str, kind: str, defaults: Sequence[Measure]) -> Measure:
    for measure in defaults:
        if name == measure.name:
            return measure
        if name in measure.keys:
            return dataclasses.replace(measure, name=name, keys=(name,))
    names = [key for measure in defaults for key in measure.keys]
    raise SettingError(
        f"metric must be one of {', '.join(names) or 'none by name'} for this model ({kind}), got {name!r}. "
        "For another one pass an evaluate.Metric or a function (predictions, references) -> float or dict."
    )


def _wrap(metric: Any) -> Measure:
    has_compute = hasattr(metric, "compute")
    if not has_compute and not callable(metric):
        raise SettingError(
            "metric must be a name, a function (predictions, references), or an object with compute, got "
            f"{type(metric).__name__}."
        )
    name = str(getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__)

    def function(predictions: Any, references: Any) -> dict[str, float]:
        if has_compute:
            return _numbers(name, metric.compute(predictions=predictions, references=references))
        return _numbers(name, metric(predictions, references))

    return Measure(name, function=function, is_cheap=not has_compute)


def _numbers(name: str, result: Any) -> dict[str, float]:
    """The plain numbers of what a user's metric returned; tables and lists beside them are left out."""
    values = result if isinstance(result, Mapping) else {name: result}
    found = {str(key): float(value) for key, value in values.items() if np.ndim(value) == 0 and _is_number(value)}
    if not found:
        raise SettingError(f"The metric {name!r} must return a number or a dict of numbers, got {str(result)[:80]}.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) or (
        hasattr(value, "item") and hasattr(value, "dtype")
    )
