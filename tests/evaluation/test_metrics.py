"""The `evaluate.Metric` classes give what their measures give, without the network."""

import evaluate
import numpy as np
import pytest

from hfshrink.evaluation import measures
from hfshrink.evaluation.metrics import METRICS, Accuracy, MacroScores

CASES = {
    "accuracy": ([0, 1, 2], [0, 2, 2]),
    "macro": ([0, 1, 2], [0, 2, 2]),
    "labels": ([[0, 1], [1, 1]], [[0, 1], [1, 0]]),
    "subset_accuracy": ([[0, 1], [1, 1]], [[0, 1], [1, 0]]),
    "pearson": ([0.5, 1.5, 1.0], [1.0, 2.0, 4.0]),
    "spearman": ([0.5, 1.5, 1.0], [1.0, 2.0, 4.0]),
    "mse": ([0.5, 1.5], [1.0, 2.0]),
    "entities": ([["B-A", "O"], ["I-A"]], [["B-A", "O"], ["O"]]),
    "token_accuracy": ([["B-A", "O"], ["I-A"]], [["B-A", "O"], ["O"]]),
    "answers": (["the cat", "a dog"], [["cat"], ["dog days", "day"]]),
    "perplexity": ([3.0, 1.0], [2.0, 2.0]),
    "top_k_accuracy": ([[0, 1], [2, 1]], [1, 0]),
}


@pytest.mark.parametrize("name", METRICS)
def test_class_equals_its_measure(name):
    predictions, references = CASES[name]
    measure = measures.top_measure(2) if name == "top_k_accuracy" else METRICS[name].measure
    sides = (np.array(predictions), np.array(references)) if name == "top_k_accuracy" else (predictions, references)
    found = METRICS[name]().compute(predictions=predictions, references=references)
    assert found == pytest.approx(measure.compute(*sides))


def test_every_default_measure_has_a_class():
    assert {m.name for found in measures.DEFAULTS.values() for m in found} | {"top_k_accuracy"} == set(METRICS)


def test_combine():
    found = evaluate.combine([Accuracy(), MacroScores()]).compute(predictions=[0, 1], references=[0, 1])
    assert found == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1}
