"""Scores of difficulty against the papers' formulas, written out slowly; GraNd against a real backward pass."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.selection import difficulty
from hfshrink.selection.datamap_measures import RunningMeasures, row_measures
from hfshrink.selection.difficulty import aum, cartography, el2n, forgetting, grand_last_layer, h_score

RUNS, ROWS, CLASSES, WIDTH = 6, 12, 4, 5


@pytest.fixture
def history():
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal((RUNS, ROWS, CLASSES))
    return logits, difficulty.probabilities_of(logits), generator.integers(CLASSES, size=ROWS)


def test_the_softmax_does_not_overflow():
    assert difficulty.probabilities_of([1e4, 0.0]).tolist() == [1.0, 0.0]


def test_el2n_is_the_mean_length_of_the_error(history):
    _, probabilities, labels = history
    slow = [
        sum(
            math.sqrt(sum((p - (c == labels[row])) ** 2 for c, p in enumerate(probabilities[run, row])))
            for run in range(RUNS)
        )
        / RUNS
        for row in range(ROWS)
    ]
    assert el2n(probabilities, labels) == pytest.approx(slow)


def test_grand_is_the_norm_of_the_gradient_that_autograd_finds(history):
    _, _, labels = history
    features = np.random.default_rng(1).standard_normal((ROWS, WIDTH))
    layer = torch.nn.Linear(WIDTH, CLASSES).double()
    found, answers = [], []
    for row in range(ROWS):
        layer.zero_grad()
        answer = layer(torch.from_numpy(features[row]))
        torch.nn.functional.cross_entropy(answer, torch.tensor(labels[row])).backward()
        found.append(
            (float(layer.weight.grad.norm()), float(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()))
        )
        answers.append(answer.detach().numpy())
    probabilities = difficulty.probabilities_of([answers])
    assert grand_last_layer(probabilities, labels, features, bias=False) == pytest.approx([one for one, _ in found])
    assert grand_last_layer(probabilities, labels, features) == pytest.approx([both for _, both in found])
    twice = grand_last_layer(np.repeat(probabilities, 2, axis=0), labels, np.stack([features, features]))
    assert twice == pytest.approx([both for _, both in found])


def test_forgetting_counts_the_falls_from_right_to_wrong():
    correct = np.random.default_rng(0).random((9, 40)) < 0.4
    correct[:, 0] = False
    for never in (np.inf, 9):
        slow = []
        for row in correct.T.tolist():
            events = sum(one and not two for one, two in pairwise(row))
            slow.append(events if any(row) else never)
        assert forgetting(correct, never).tolist() == slow
    assert forgetting([[1, 0]]).tolist() == [0.0, np.inf]


def test_aum_is_the_mean_margin_over_the_best_other_class(history):
    logits, _, labels = history
    slow = [
        sum(z[row, y] - max(v for c, v in enumerate(z[row]) if c != y) for z in logits) / RUNS
        for row, y in enumerate(labels)
    ]
    assert aum(logits, labels) == pytest.approx(slow)
    assert aum(logits + 7, labels) == pytest.approx(slow)  # a constant makes no difference


def test_cartography_by_a_slow_loop(history):
    logits, probabilities, labels = history
    gold = probabilities[:, np.arange(ROWS), labels]
    correct = logits.argmax(axis=2) == labels
    confidence, variability, correctness = cartography(gold, correct)
    for row in range(ROWS):
        mean = sum(gold[:, row]) / RUNS
        assert confidence[row] == pytest.approx(mean)
        assert variability[row] == pytest.approx(math.sqrt(sum((p - mean) ** 2 for p in gold[:, row]) / RUNS))
        assert correctness[row] == pytest.approx(sum(correct[:, row]) / RUNS)
    assert cartography(gold)[2] == pytest.approx((gold > 0.5).mean(axis=0))


def test_the_h_score_is_the_success_rate():
    correct = np.random.default_rng(0).random((3, 4, 10)) < 0.5
    assert h_score(correct) == pytest.approx([correct[:, :, row].sum() / 12 for row in range(10)])
    assert h_score(correct[0]) == pytest.approx(correct[0].mean(axis=0))


def test_the_data_maps_sums_agree(history):
    """The streaming sums of a data map and these functions say the same of the same run."""
    logits, probabilities, labels = history
    running = RunningMeasures(ROWS)
    for epoch, z in enumerate(logits, start=1):
        found = row_measures(torch.from_numpy(z), torch.from_numpy(labels))
        running.add(epoch, {name: value.numpy() for name, value in found.items()})
    arrays, correct = running.arrays(), logits.argmax(axis=2) == labels
    gold = probabilities[:, np.arange(ROWS), labels]
    expected = {"el2n": el2n(probabilities, labels), "aum": aum(logits, labels), "forgetting": forgetting(correct)}
    expected |= dict(zip(("confidence", "variability", "correctness"), cartography(gold, correct), strict=True))
    for name, values in expected.items():
        assert arrays[name] == pytest.approx(values, abs=1e-6), name


PAIR = [[[0.5, 0.5]]]
BAD = {
    "one pass without its axis": (
        lambda: el2n([[0.5, 0.5]], [0]),
        r"shape \(runs or epochs, rows, classes\), got \(1, 2\)",
    ),
    "one class": (lambda: aum([[[1.0]]], [0]), r"got \(1, 1, 1\)"),
    "too many labels": (lambda: el2n(PAIR, [0, 1]), "one class number for each of 1 rows"),
    "names as labels": (lambda: el2n(PAIR, ["a"]), "one class number for each of 1 rows, got <U1"),
    "a label too high": (lambda: aum(PAIR, [2]), r"labels must lie in 0..1, the classes of the logits, got 2..2"),
    "a missing label": (lambda: aum(PAIR, [-100]), r"got -100..-100"),
    "NaN": (
        lambda: aum([[[0.0, 1.0], [np.nan, 0.0]]], [0, 0]),
        "logits of row 1 are NaN or infinite in run or epoch 0",
    ),
    "logits as probabilities": (lambda: el2n([[[3.0, 1.0]]], [0]), "must add up to 1.*Are they logits"),
    "features of other rows": (lambda: grand_last_layer(PAIR, [0], [[1.0], [2.0]]), r"shape \(1, d\) or \(1, 1, d\)"),
    "features of other runs": (lambda: grand_last_layer(PAIR, [0], [[[1.0]], [[2.0]]]), r"got \(2, 1, 1\)"),
    "shares as truths": (lambda: forgetting([[0.5]]), r"only 0 and 1 in the shape \(epochs or runs, rows\)"),
    "a flat row of truths": (lambda: h_score([1, 0]), r"\(epochs or runs, rows\) or \(runs, epochs, rows\)"),
    "no epoch": (lambda: forgetting(np.zeros((0, 3))), r"got an array of shape \(0, 3\)"),
    "percentages": (lambda: cartography([[50.0]]), r"probabilities of shape \(epochs, rows\), got .* 50..50"),
    "NaN probabilities": (lambda: cartography([[np.nan]]), "Expected probabilities"),
    "other truths": (lambda: cartography([[0.5]], [[1, 0]]), r"the probabilities' shape \(1, 1\), got \(1, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(SettingError, match=message):
        call()
