"""The statistics of a proof against slow loops and by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from hfshrink.proof.intervals import class_recalls, draw_seeds, interval, resampled_scores, run_scores, seed_means
from hfshrink.proof.intervals import verdict as said
from hfshrink.proof.results import Interval

GENERATOR = np.random.default_rng(7)
REFERENCES = GENERATOR.integers(0, 3, 40)
RUNS = np.where(GENERATOR.random((2, 40)) < 0.7, REFERENCES, GENERATOR.integers(0, 3, (2, 40)))


def by_scikit(predictions, references):
    macro = precision_recall_fscore_support(references, predictions, average="macro", zero_division=0)
    return [accuracy_score(references, predictions), *macro[:3]]


def test_scores_of_each_seed_are_those_of_scikit_learn():
    expected = [by_scikit(run, REFERENCES) for run in RUNS]
    np.testing.assert_allclose(run_scores(RUNS, REFERENCES), expected)


def test_resampled_scores_are_those_of_a_slow_loop_over_the_same_rows():
    found = resampled_scores(RUNS, REFERENCES, resamples=5, seed=3)
    generator = np.random.default_rng(3)
    for sample in found:
        rows = generator.integers(0, 40, 40)
        np.testing.assert_allclose(sample, [by_scikit(run[rows], REFERENCES[rows]) for run in RUNS])


def test_seeds_are_drawn_alike_for_every_arm_and_their_means_are_those_of_a_loop():
    drawn = draw_seeds(3, 50, seed=0)
    np.testing.assert_array_equal(drawn, draw_seeds(3, 50, seed=0))
    assert {0, 1, 2} == set(drawn.ravel().tolist())
    values = GENERATOR.random((50, 3, 2))
    loop = [[np.mean([values[b, s, k] for s in drawn[b]]) for k in range(2)] for b in range(50)]
    np.testing.assert_allclose(seed_means(values, drawn), loop)


def test_equal_arms_differ_by_nothing_with_certainty():
    values = seed_means(resampled_scores(RUNS, REFERENCES, 20, 0), draw_seeds(2, 20, 0))
    assert interval(0.0, (values - values)[:, 0]) == Interval(0.0, 0.0, 0.0)


def test_interval_holds_95_percent_of_the_samples():
    found = interval(0.5, np.linspace(0, 1, 1001))
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))
    assert found.show(".2f") == "0.50 [0.03, 0.97]"


@pytest.mark.parametrize(
    ("low", "high", "seeds", "words"),
    [
        (0.01, 0.2, 3, "better"),
        (-0.2, -0.01, 3, "worse"),
        (-0.1, 0.1, 3, "not told apart"),
        (0.0, 0.1, 3, "not told apart"),
        (None, None, 3, "not told apart"),
        (0.01, 0.2, 1, "better, with this seed"),
    ],
)
def test_words_say_no_more_than_the_interval(low, high, seeds, words):
    assert said(Interval(0.05, low, high), seeds) == words


def test_recall_of_a_class_without_rows_is_unknown():
    found = class_recalls(np.array([[0, 0, 1], [0, 1, 1]]), np.array([0, 0, 1]), 3)
    assert found[:2].tolist() == [0.75, 1.0]
    assert np.isnan(found[2])
