"""`evaluate`: the metrics of a model on a data set, with an interval for the main one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfshrink.data import encode, read_dataset
from hfshrink.errors import SettingError
from hfshrink.evaluation.bootstrap import percentile_interval, resample_values
from hfshrink.evaluation.labels import LANGUAGE_TASKS, find_references, require_label_column, without_class_column
from hfshrink.evaluation.measures import LABELS, MACRO, Measure, ratio, resolve_measures, split_counts
from hfshrink.evaluation.prediction import (
    Predictions,
    Source,
    predict_answers,
    predict_classes,
    predict_features,
    predict_labels,
    predict_likelihoods,
    predict_numbers,
    predict_tags,
)
from hfshrink.evaluation.spans import read_answers, split_windows
from hfshrink.evaluation.tags import tag_counts
from hfshrink.inputs import input_names
from hfshrink.loading import infer_task, load
from hfshrink.measurement import Measurement, Score
from hfshrink.record import config_of
from hfshrink.terminal import table

if TYPE_CHECKING:
    from datasets import Dataset

RESAMPLES, SEED = 1000, 0
MAX_CLASS_ROWS = 30  # printed; the data are complete


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class, label or entity type; `support` is how often it is the truth."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of one model on one data set, and what they were computed from.

    Attributes:
        task: One of `hfshrink.loading.TASKS`.
        kind: Form of the output: "single_label", "multi_label", "regression", "tokens", "answers", "language" or
            "features".
        scores: One per metric, the main one first, with its interval.
        per_class: One per class, label or entity type; empty for other outputs.
        output: Predictions and references of every row.
        measures: The metrics themselves, so that `compare` can resample them.
    """

    task: str
    kind: str
    scores: tuple[Score, ...]
    per_class: tuple[ClassScore, ...]
    output: Predictions
    measures: tuple[Measure, ...]

    @property
    def predictions(self) -> Any:
        """Per row: class number, 0/1 per label, number, tags, answer, Σ -ln p, or vector."""
        return self.output.predictions

    @property
    def references(self) -> Any:
        """Per row the truth: class number, 0/1 per label, number, tags, accepted answers, or the number of tokens."""
        return self.output.references

    @property
    def main(self) -> Score:
        """The score that stands for the model."""
        return self.scores[0]

    def correct(self) -> np.ndarray | None:
        """Whether each row is all right, (rows,); None for numbers, tags, language and features."""
        measure = {"single_label": "accuracy", "multi_label": "subset_accuracy", "answers": "exact_match"}.get(
            self.kind
        )
        if measure is None:
            return None
        statistics = resolve_measures(measure, self.kind)[0].statistics
        return None if statistics is None else statistics(self.predictions, self.references)[:, 0] == 1

    def to_measurement(self) -> Measurement:
        """The scores as they go into a record."""
        return Measurement(scores=self.scores)

    def __str__(self) -> str:
        where = " · ".join(str(part) for part in (self.main.dataset, self.main.split) if part)
        head = f"{self.task}: {self.main.examples} examples" + f" of {where}" * bool(where)
        parts = [
            head,
            table(("metric", "value [95 % interval]"), [(score.metric, str(score)) for score in self.scores]),
        ]
        if self.per_class:
            rows = [
                (c.name, f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.f1:.4f}", str(c.support))
                for c in self.per_class[:MAX_CLASS_ROWS]
            ]
            parts.append(table(("class", "precision", "recall", "f1", "support"), rows))
        if len(self.per_class) > MAX_CLASS_ROWS:
            parts.append(f"… and {len(self.per_class) - MAX_CLASS_ROWS} more classes in `per_class`.")
        return "\n\n".join(parts)


def evaluate(
    model: Any,
    dataset: Any,
    metric: Any = None,
    *,
    processor: Any = None,
    task: str | None = None,
    split: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Evaluation:
    """Run a model over a data set and compute the metrics of its task.

    | task | metrics, the main one first |
    |---|---|
    | text-classification | accuracy; precision, recall, f1 (mean over classes), and each class |
    | … with several labels per row | f1_micro, f1_macro, subset_accuracy (a label is on where sigmoid > 0.5) |
    | … with one output (regression) | pearson, spearman, mse |
    | token-classification | f1, precision, recall of entities (see `hfshrink.evaluation.tags`), token_accuracy |
    | question-answering | exact_match, f1 of SQuAD, in 0..1 |
    | fill-mask, text-generation, text2text-generation | perplexity per token |
    | image-classification | accuracy, top_5_accuracy (top k with k < 5 below six classes), precision, recall, f1 |
    | feature-extraction | none: pass `metric`, a function of the mean-pooled vectors (rows, features) and the labels |

    The main metric gets a 95 % interval: the percentiles of 1000 bootstrap samples of the rows, seed 0 (Efron 1979).
    Metrics that are objects with `compute` get none here, as they may be slow; `compare` resamples them too.

    Args:
        model: A Hub id, a folder, a loaded model, or a `transformers.exporters.ExportedModel`. It runs in eval mode;
            its training flags are put back afterwards.
        dataset: A `datasets.Dataset` (raw or encoded), a folder that `save_to_disk` wrote, or a Hub id. Question
            answering reads the columns question, context and answers of SQuAD.
        metric: None for the metrics of the task; one of their names; an `evaluate.Metric` or another object with
            `compute(predictions=, references=)`; a function (predictions, references) -> number or dict; or a list of
            these.
        processor: Tokenizer or image processor; None takes the model's own.
        task: One of `hfshrink.loading.TASKS`; None reads it from the model.
        split: Split of the data set, where it has several.
        text_columns: One or two columns of text; None finds them.
        label_column: Column of labels; None takes labels, label, label_ids, ner_tags or tags.
        batch_size: Rows per forward pass. The results do not depend on it.
        max_length: Longest input in tokens; None takes what the model can read (384 per window for question
            answering).

    Returns:
        The scores, a table of classes where there are any, and the predictions.

    Raises:
        SettingError: No rows, no labels, labels or columns that do not fit the model, an unknown metric, an input that
            an export needs, or logits that are NaN or infinite.
        UnsupportedModelError: The model's task is unknown, or its outputs do not fit it.
        CheckpointError: The model or the data set can't be read.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "labels": [0, 1]})
        >>> evaluate(model, rows).main.metric
        'accuracy'
    """
    loaded, found = load(model, task)
    rows = read_dataset(dataset, split)
    columns = {"text_columns": text_columns, "label_column": label_column, "max_length": max_length}
    name = dataset_name(dataset, rows), split or (None if rows.split is None else str(rows.split))
    return evaluate_loaded(
        loaded, rows, metric, processor or found, task, columns=columns, batch_size=batch_size, name=name
    )


def evaluate_loaded(
    model: Any,
    rows: Dataset,
    metric: Any,
    processor: Any,
    task: str | None,
    *,
    columns: dict[str, Any],
    batch_size: int,
    name: tuple[str | None, str | None],
) -> Evaluation:
    """`evaluate` for a loaded model and data set.

    Args:
        model: A model or export.
        rows: The data set.
        metric: As in `evaluate`.
        processor: Tokenizer or image processor, or None.
        task: Its task; None infers it.
        columns: `text_columns`, `label_column` and `max_length` as in `evaluate`.
        batch_size: Rows per forward pass.
        name: (data set, split) for the record.
    """
    task = infer_task(model, task)
    input_names(model)  # raises for an export that can't be called
    if batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, got {batch_size}.")
    if task == "question-answering":
        measures = resolve_measures(metric, "answers")
        output = _answer(model, rows, processor, columns["max_length"], batch_size)
        return _evaluation(task, "answers", output, measures, (), name)
    labels = None if task in LANGUAGE_TASKS else require_label_column(rows, columns["label_column"])
    rows = without_class_column(rows, columns["label_column"]) if task in LANGUAGE_TASKS else rows
    encoded = encode(rows, model, processor, task, **{**columns, "label_column": labels or columns["label_column"]})
    kind, references = find_references(task, encoded, config_of(model))
    top = _top(task, kind, config_of(model))
    measures = resolve_measures(metric, kind, top)
    source = Source(model, encoded, batch_size, decodes=task == "text2text-generation")
    output = _predict(source, kind, references, task, top)
    return _evaluation(task, kind, output, measures, _class_scores(kind, output, config_of(model)), name)


def _predict(source: Source, kind: str, references: Any, task: str, top: int | None) -> Predictions:
    if kind == "single_label":
        return predict_classes(source, references, top)
    if kind == "tokens":
        return predict_tags(source)
    if kind == "language":
        return predict_likelihoods(source, task)
    runs = {"multi_label": predict_labels, "regression": predict_numbers, "features": predict_features}
    return runs[kind](source, references)


def _answer(model: Any, rows: Dataset, tokenizer: Any, max_length: int | None, batch_size: int) -> Predictions:
    answers = read_answers(rows)
    windows, window_rows, spans = split_windows(rows, tokenizer, model, max_length)
    contexts = list(rows.with_format(None)["context"])
    return predict_answers(Source(model, windows, batch_size), window_rows, spans, contexts, answers)


def _evaluation(
    task: str,
    kind: str,
    output: Predictions,
    measures: tuple[Measure, ...],
    per_class: tuple[ClassScore, ...],
    name: tuple[str | None, str | None],
) -> Evaluation:
    scores: list[Score] = []
    for measure in measures:
        values = measure.compute(getattr(output, measure.source), output.references)
        for key, value in values.items():
            low = high = seed = None
            if not scores and measure.is_cheap:
                low, high, seed = *_interval(measure, key, output), SEED
            is_defined = math.isfinite(value)
            scores.append(Score(key, value if is_defined else None, low, high, *name, len(output.references), seed))
    return Evaluation(task, kind, tuple(scores), per_class, output, measures)


def _interval(measure: Measure, key: str, output: Predictions) -> tuple[float | None, float | None]:
    predictions = getattr(output, measure.source)
    return percentile_interval(
        resample_values(measure, predictions, output.references, key=key, resamples=RESAMPLES, seed=SEED)
    )


def _top(task: str, kind: str, config: Any) -> int | None:
    """How many classes the top-k accuracy of an image classifier; None where it would say no more than accuracy."""
    best = min(5, config.num_labels - 1)
    return best if task == "image-classification" and kind == "single_label" and best > 1 else None


def _class_scores(kind: str, output: Predictions, config: Any) -> tuple[ClassScore, ...]:
    if kind == "tokens":
        return _entity_scores(output)
    if kind not in ("single_label", "multi_label"):
        return ()
    measure = MACRO if kind == "single_label" else LABELS
    counted = split_counts(measure.sums(output.predictions, output.references))
    missing = config.num_labels - len(counted[0])
    hits, predicted, actual = (np.pad(side, (0, missing)) for side in counted)
    return tuple(
        _class_score(str(config.id2label.get(number, number)), *numbers)
        for number, numbers in enumerate(zip(hits, predicted, actual, strict=True))
    )


def _entity_scores(output: Predictions) -> tuple[ClassScore, ...]:
    sums: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())
    for predicted, actual in zip(output.predictions, output.references, strict=True):
        for total, counts in zip(sums, tag_counts(predicted, actual), strict=True):
            total.update(counts)
    hits, predictions, references = sums
    return tuple(
        _class_score(name, hits[name], predictions[name], references[name])
        for name in sorted({*predictions, *references})
    )


def _class_score(name: str, hits: float, predicted: float, actual: float) -> ClassScore:
    precision, recall, f1 = ratio([hits, hits, 2 * hits], [predicted, actual, predicted + actual]).tolist()
    return ClassScore(name, precision, recall, f1, int(actual))


def dataset_name(dataset: Any, rows: Dataset) -> str | None:
    if isinstance(dataset, str | Path):
        return Path(dataset).name if Path(dataset).is_dir() else str(dataset)
    name = getattr(rows.info, "dataset_name", None) or rows.info.builder_name
    return None if name in (None, "generator", "json", "csv", "parquet", "text", "arrow") else str(name)
