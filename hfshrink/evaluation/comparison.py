"""`compare`: two models on the same rows, paired."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfshrink.data import read_dataset
from hfshrink.errors import SettingError
from hfshrink.evaluation.bootstrap import expected_calibration_error, mcnemar_p, percentile_interval, resample_values
from hfshrink.evaluation.scoring import Evaluation, dataset_name, evaluate_loaded
from hfshrink.loading import load
from hfshrink.measurement import Score
from hfshrink.terminal import table


@dataclass(frozen=True)
class WorstClass:
    """The class whose recall falls most from a to b."""

    name: str
    recall_a: float
    recall_b: float


@dataclass(frozen=True)
class Comparison:
    """Two models, a and b, on the same rows. None means "not defined for this output".

    Attributes:
        task: The task.
        metric: Name of the main metric.
        a: Its value for a.
        b: Its value for b.
        difference: b - a.
        low: Lower end of the paired 95 % bootstrap interval of the difference.
        high: Its upper end.
        examples: Number of rows.
        resamples: Number of bootstrap samples.
        seed: Their seed.
        mcnemar_p: Exact two-sided p-value that both are right equally often (classification and answers).
        agreement: Share of rows, or of tags, with equal predictions.
        right_to_wrong: Rows that a gets right and b wrong.
        wrong_to_right: Rows that a gets wrong and b right.
        worst_class: The class with the largest fall of recall; None also where no recall falls.
        calibration_error_a: Expected calibration error of a in 15 bins (one label per row only).
        calibration_error_b: The same of b.
        scores_a: All scores of a.
        scores_b: All scores of b.
    """

    task: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    examples: int
    resamples: int
    seed: int
    mcnemar_p: float | None = None
    agreement: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    worst_class: WorstClass | None = None
    calibration_error_a: float | None = None
    calibration_error_b: float | None = None
    scores_a: tuple[Score, ...] = ()
    scores_b: tuple[Score, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        others = {score.metric: score for score in self.scores_b}
        pairs = [(s.metric, s.value, others[s.metric].value) for s in self.scores_a if s.metric in others]
        rows = [(name, _show(a), _show(b), _show(_minus(b, a), "+.4f")) for name, a, b in pairs]
        ours, theirs = self.calibration_error_a, self.calibration_error_b
        if ours is not None and theirs is not None:
            rows.append(("calibration error", _show(ours), _show(theirs), _show(theirs - ours, "+.4f")))
        if self.worst_class is not None:
            name, a, b = dataclasses.astuple(self.worst_class)
            rows.append((f"recall of {name} (worst class)", _show(a), _show(b), _show(b - a, "+.4f")))
        return f"{table(('what', 'a', 'b', 'b - a'), rows)}\n\n{table(('paired', 'value'), self._paired_rows())}"

    def _paired_rows(self) -> list[tuple[str, str]]:
        interval = "undefined" if self.low is None else f"[{_show(self.low, '+.4f')}, {_show(self.high, '+.4f')}]"
        rows = [("examples", str(self.examples)), (f"{self.metric}: 95 % interval of b - a", interval)]
        if self.agreement is not None:
            rows.append(("equal predictions", f"{self.agreement:.4f}"))
        if self.mcnemar_p is not None:
            rows.append(("right -> wrong / wrong -> right", f"{self.right_to_wrong} / {self.wrong_to_right}"))
            rows.append(("McNemar's exact p", f"{self.mcnemar_p:.4g}"))
        return rows


def compare(
    a: Any,
    b: Any,
    dataset: Any = None,
    metric: Any = None,
    *,
    processor: Any = None,
    task: str | None = None,
    split: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Evaluate two models on the same rows, and say how surely they differ.

    The interval is the percentile interval of the paired bootstrap (Efron 1979): rows are drawn with replacement, the
    same ones for both models. McNemar's test (1947) is the exact one. The calibration error is that of Guo et al.
    (2017) with 15 bins.

    Args:
        a: The first model, such as the teacher: whatever `evaluate` takes, or an `Evaluation`.
        b: The second model, such as the compressed one; likewise.
        dataset: The rows; not needed with two evaluations.
        metric: As in `evaluate`; its first value is compared. Ignored for evaluations.
        processor: Tokenizer or image processor of both; None takes each model's own, and that of `a` for a `b` without
            one.
        task: As in `evaluate`.
        split: As in `evaluate`.
        text_columns: As in `evaluate`.
        label_column: As in `evaluate`.
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        resamples: Number of bootstrap samples.
        seed: Their seed.

    Returns:
        The comparison; `print` shows it as tables.

    Raises:
        SettingError: No data set, evaluations of other rows or metrics, models that order their labels differently,
            `resamples` < 1; and what `evaluate` raises.
        UnsupportedModelError: As in `evaluate`.
        CheckpointError: As in `evaluate`.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "labels": [0, 1]})
        >>> same = compare(model, model, rows)
        >>> same.difference, same.mcnemar_p, same.agreement
        (0.0, 1.0, 1.0)
    """
    if resamples < 1:
        raise SettingError(f"resamples must be at least 1, got {resamples}.")
    ready = [side for side in (a, b) if isinstance(side, Evaluation)]
    if len(ready) == 1 or (len(ready) == 0 and dataset is None):
        given = "one evaluation and one model" if ready else "no data set"
        raise SettingError(f"Expected two models and a data set, or two evaluations, got {given}.")
    if len(ready) < 2:
        columns = {"text_columns": text_columns, "label_column": label_column, "max_length": max_length}
        rows = read_dataset(dataset, split)
        name = dataset_name(dataset, rows), split or (None if rows.split is None else str(rows.split))
        (model_a, own_a), (model_b, own_b) = load(a, task), load(b, task)
        sides = (model_a, processor or own_a), (model_b, processor or own_b or own_a)
        ready = [
            evaluate_loaded(model, rows, metric, own, task, columns=columns, batch_size=batch_size, name=name)
            for model, own in sides
        ]
    return compare_evaluations(*ready, resamples=resamples, seed=seed)


def compare_evaluations(a: Evaluation, b: Evaluation, *, resamples: int, seed: int) -> Comparison:
    """`compare` for two evaluations of the same rows."""
    _check_pair(a, b)
    key = a.main.metric
    values = [
        resample_values(
            side.measures[0],
            getattr(side.output, side.measures[0].source),
            side.references,
            key=key,
            resamples=resamples,
            seed=seed,
        )
        for side in (a, b)
    ]
    low, high = percentile_interval(values[1] - values[0])
    fell, rose = _flips(a, b)
    errors = [_calibration_error(side) for side in (a, b)]
    return Comparison(
        task=a.task,
        metric=key,
        a=a.main.value,
        b=b.main.value,
        difference=_minus(b.main.value, a.main.value),
        low=low,
        high=high,
        examples=len(a.references),
        resamples=resamples,
        seed=seed,
        mcnemar_p=None if fell is None or rose is None else mcnemar_p(fell, rose),
        agreement=_agreement(a, b),
        right_to_wrong=fell,
        wrong_to_right=rose,
        worst_class=_worst_class(a, b),
        calibration_error_a=errors[0],
        calibration_error_b=errors[1],
        scores_a=a.scores,
        scores_b=b.scores,
    )


def _check_pair(a: Evaluation, b: Evaluation) -> None:
    for what, ours, theirs in (
        ("kinds of output", a.kind, b.kind),
        ("main metrics", a.main.metric, b.main.metric),
        ("numbers of rows", len(a.references), len(b.references)),
    ):
        if ours != theirs:
            raise SettingError(
                f"The two evaluations have different {what}: {ours} and {theirs}. Evaluate both in the same way."
            )
    if not _equal(a.references, b.references):
        why = (
            "Perplexities of different tokenizers can't be compared."
            if a.kind == "language"
            else ("Are they the same rows, and do both models list their labels in the same order (config.id2label)?")
        )
        raise SettingError(f"The two evaluations have different references. {why}")


def _equal(ours: Any, theirs: Any) -> bool:
    both = isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray)
    return np.array_equal(ours, theirs) if both else list(ours) == list(theirs)


def _flips(a: Evaluation, b: Evaluation) -> tuple[int | None, int | None]:
    ours, theirs = a.correct(), b.correct()
    if ours is None or theirs is None:
        return None, None
    return int((ours & ~theirs).sum()), int((~ours & theirs).sum())


def _agreement(a: Evaluation, b: Evaluation) -> float | None:
    if a.kind in ("regression", "language", "features"):
        return None
    pairs = list(zip(a.predictions, b.predictions, strict=True))
    if a.kind == "tokens":
        pairs = [tags for row in pairs for tags in zip(*row, strict=True)]
    return sum(bool(np.array_equal(ours, theirs)) for ours, theirs in pairs) / len(pairs) if pairs else None


def _worst_class(a: Evaluation, b: Evaluation) -> WorstClass | None:
    others = {score.name: score.recall for score in b.per_class}
    found = [WorstClass(c.name, c.recall, others.get(c.name, 0.0)) for c in a.per_class if c.support]
    worst = min(found, key=lambda pair: pair.recall_b - pair.recall_a, default=None)
    return worst if worst is not None and worst.recall_b < worst.recall_a else None


def _calibration_error(side: Evaluation) -> float | None:
    correct = side.correct()
    if side.kind != "single_label" or side.output.confidences is None or correct is None:
        return None
    return expected_calibration_error(side.output.confidences, correct)


def _minus(b: float | None, a: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _show(value: float | None, form: str = ".4f") -> str:
    return "undefined" if value is None or not math.isfinite(value) else format(value, form)
