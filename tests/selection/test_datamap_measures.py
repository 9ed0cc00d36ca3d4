"""Streaming measures of a data map against the papers' formulas, written out slowly over all epochs."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.selection import datamap_measures
from hfshrink.selection.datamap_measures import PARTS, RunningMeasures, row_measures

EPOCHS, ROWS, CLASSES = 7, 40, 5


def running(logits, labels):
    """The measures after all epochs; logits (epochs, rows, …, classes)."""
    found = RunningMeasures(logits.shape[1])
    for epoch, z in enumerate(logits, start=1):
        found.add(epoch, {name: value.numpy() for name, value in row_measures(z, labels).items()})
    return found.arrays()


@pytest.fixture
def history():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(EPOCHS, ROWS, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator)


def softmax(z):
    exponentials = [math.exp(value - max(z)) for value in z]
    return [value / sum(exponentials) for value in exponentials]


def slow(logits, labels):
    """One row after the other, with every epoch in memory."""
    found = {name: [] for name in ("confidence", "variability", "correctness", "aum", "el2n", "forgetting")}
    for row, y in enumerate(labels.tolist()):
        z = [logits[epoch, row].tolist() for epoch in range(len(logits))]
        p = [softmax(values) for values in z]
        gold = [values[y] for values in p]
        mean = sum(gold) / len(gold)
        right = [values.index(max(values)) == y for values in z]
        margins = [values[y] - max(v for i, v in enumerate(values) if i != y) for values in z]
        errors = [math.sqrt(sum((v - (i == y)) ** 2 for i, v in enumerate(values))) for values in p]
        falls = sum(before and not after for before, after in pairwise(right))
        found["confidence"].append(mean)
        found["variability"].append(math.sqrt(sum((value - mean) ** 2 for value in gold) / len(gold)))
        found["correctness"].append(sum(right) / len(right))
        found["aum"].append(sum(margins) / len(margins))
        found["el2n"].append(sum(errors) / len(errors))
        found["forgetting"].append(falls if any(right) else math.inf)
    return found


def test_streaming_equals_the_formulas_over_all_epochs(history):
    found, expected = running(*history), slow(*history)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.array(values), rel=1e-5, abs=1e-6), name
    assert set(expected["forgetting"]) > {0.0, 1.0, math.inf}, "the case must hold never learned and forgotten rows"


def test_the_predicted_class_is_the_rival_of_the_lowest_margin(history):
    logits, labels = history
    found = running(logits, labels)
    for row, y in enumerate(labels.tolist()):
        others = [(float(z[row, y] - z[row, c]), c) for z in logits for c in range(CLASSES) if c != y]
        margin, rival = min(others)
        assert found["predicted"][row] == (rival if margin < 0 else y)
    assert found["labels"].tolist() == labels.tolist()


def test_hand_computed_row():
    """p = 1/2, 1/4 for the label 0: mean 3/8, deviation 1/8; right once (the first of a tie), then forgotten."""
    logits = torch.log(torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]))
    found = running(logits, torch.tensor([0]))
    expected = {
        "confidence": 3 / 8,
        "variability": 1 / 8,
        "correctness": 1 / 2,
        "aum": math.log(1 / 3) / 2,
        "el2n": (math.sqrt(0.5) + math.sqrt(9 / 8)) / 2,
        "forgetting": 1,
        "predicted": 1,
    }
    assert {name: float(found[name][0]) for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_row_of_tokens_has_the_mean_over_its_labelled_ones(history):
    logits, _ = history
    tokens = logits.reshape(EPOCHS, ROWS // 4, 4, CLASSES)
    labels = torch.randint(CLASSES, (ROWS // 4, 4), generator=torch.Generator().manual_seed(1))
    labels[0, 1:] = labels[3, 0] = -100
    one = row_measures(tokens[0], labels)
    for row in range(len(labels)):
        keep = labels[row] != -100
        alone = row_measures(tokens[0, row][keep], labels[row][keep])
        for name in ("probability", "correct", "margin", "error"):
            assert float(one[name][row]) == pytest.approx(float(alone[name].mean()), rel=1e-6), name
    found = running(tokens, labels)
    shares = torch.stack([row_measures(z, labels)["correct"] for z in tokens])
    falls = (shares[:-1] - shares[1:]).clamp(min=0).sum(dim=0)
    falls[shares.amax(dim=0) == 0] = math.inf
    assert found["forgetting"] == pytest.approx(falls.numpy())
    assert "labels" not in found
    assert "predicted" not in found


def test_a_row_without_label_is_nan_and_others_are_not():
    found = running(torch.randn(2, 3, 4), torch.tensor([1, -100, 2]))
    for name in ("confidence", "variability", "correctness", "aum", "el2n", "forgetting"):
        assert np.isnan(found[name]).tolist() == [False, True, False], name
    assert found["labels"].tolist() == [1, -1, 2]


def test_memory_does_not_grow_with_epochs(history):
    logits, labels = history
    parts = {name: value.numpy() for name, value in row_measures(logits[0], labels).items()}
    found, sizes = RunningMeasures(ROWS), set()
    for epoch in range(1, 50):
        found.add(epoch, parts)
        sizes.add(sum(value.nbytes for value in vars(found).values() if isinstance(value, np.ndarray)))
    assert len(sizes) == 1
    assert sizes.pop() <= 12 * 8 * ROWS
    assert set(parts) == set(PARTS)


def test_chunks_of_logits_change_nothing(history, monkeypatch):
    logits, labels = history
    whole = row_measures(logits[0], labels)
    monkeypatch.setattr(datamap_measures, "CHUNK", 3 * CLASSES)
    for name, value in row_measures(logits[0], labels).items():
        assert torch.equal(value, whole[name]), name


def test_half_precision_logits_are_read_in_float32():
    logits, labels = torch.randn(6, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])
    for name, value in row_measures(logits, labels).items():
        assert torch.equal(value, row_measures(logits.float(), labels)[name]), name


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(SettingError, match=r"must lie in 0\.\.2, the model's classes, got 0\.\.3"):
        row_measures(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_measures_without_an_epoch_are_refused():
    with pytest.raises(SettingError, match="no epoch yet"):
        RunningMeasures(3).arrays()
