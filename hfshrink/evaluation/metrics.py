"""The metrics as `evaluate.Metric` classes: for `evaluate.combine`, `compute_metrics`, or `evaluate(metric=…)`.

`evaluate.load("accuracy")` fetches a script from the Hub; these are part of the package and need no network. Importing
this module imports `evaluate`, which takes seconds: nothing else in hfshrink does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import evaluate

from hfshrink.evaluation import measures

INTEGER, NUMBER, TEXT = datasets.Value("int64"), datasets.Value("float64"), datasets.Value("string")


class MeasureMetric(evaluate.Metric):
    """An `evaluate.Metric` around one `Measure`; a subclass names it, and the form of a prediction and a reference."""

    measure: ClassVar[measures.Measure]
    prediction: ClassVar[Any] = INTEGER
    reference: ClassVar[Any] = INTEGER

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=" predictions: one per example. references: one per example.",
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self.measure.compute(predictions, references)


class Accuracy(MeasureMetric):
    """Share of right classes.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"] == 2 / 3
        True
    """

    measure = measures.ACCURACY


class MacroScores(MeasureMetric):
    """Precision, recall and F1, each the mean over the classes that are predicted or actual."""

    measure = measures.MACRO


class MultiLabelF1(MeasureMetric):
    """F1 over all labels together (micro) and the mean of each label's (macro); rows of 0 and 1."""

    measure = measures.LABELS
    prediction = reference = datasets.Sequence(INTEGER)


class SubsetAccuracy(MeasureMetric):
    """Share of examples whose labels are all right; rows of 0 and 1."""

    measure = measures.SUBSET
    prediction = reference = datasets.Sequence(INTEGER)


class Pearson(MeasureMetric):
    """Pearson's correlation."""

    measure = measures.PEARSON
    prediction = reference = NUMBER


class Spearman(MeasureMetric):
    """Spearman's rank correlation."""

    measure = measures.SPEARMAN
    prediction = reference = NUMBER


class MeanSquaredError(MeasureMetric):
    """Mean squared error."""

    measure = measures.SQUARED_ERROR
    prediction = reference = NUMBER


class EntityScores(MeasureMetric):
    """F1, precision and recall of entities by the rule of `hfshrink.evaluation.tags`; rows of tags."""

    measure = measures.ENTITIES
    prediction = reference = datasets.Sequence(TEXT)


class TokenAccuracy(MeasureMetric):
    """Share of right tags; rows of tags."""

    measure = measures.TOKENS
    prediction = reference = datasets.Sequence(TEXT)


class AnswerScores(MeasureMetric):
    """Exact match and F1 of SQuAD in 0..1; an answer, and the list of accepted answers."""

    measure = measures.ANSWERS
    prediction, reference = TEXT, datasets.Sequence(TEXT)


class Perplexity(MeasureMetric):
    """exp of the mean negative log-likelihood; predictions are its sums per row, references the numbers of tokens."""

    measure = measures.PERPLEXITY
    prediction = reference = NUMBER


class TopKAccuracy(MeasureMetric):
    """Share of examples whose class is among the predicted ones; rows of k classes, and one class."""

    measure = measures.top_measure(5)
    prediction = datasets.Sequence(INTEGER)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return measures.top_measure(len(predictions[0])).compute(predictions, references)


METRICS: dict[str, type[MeasureMetric]] = {
    "accuracy": Accuracy,
    "macro": MacroScores,
    "labels": MultiLabelF1,
    "subset_accuracy": SubsetAccuracy,
    "pearson": Pearson,
    "spearman": Spearman,
    "mse": MeanSquaredError,
    "entities": EntityScores,
    "token_accuracy": TokenAccuracy,
    "answers": AnswerScores,
    "perplexity": Perplexity,
    "top_k_accuracy": TopKAccuracy,
}
"""name -> class; the name is the `Measure`'s."""
