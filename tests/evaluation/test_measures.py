"""The maths of the metrics against scikit-learn, scipy, hand cases and slow loops."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from hfshrink.errors import SettingError
from hfshrink.evaluation import bootstrap, measures
from hfshrink.evaluation.tags import find_entities


@pytest.fixture
def classes():
    generator = np.random.default_rng(3)
    return generator.integers(0, 5, 60), generator.choice([0, 1, 2, 4, 6], 60)


def test_accuracy_and_macro_scores_equal_sklearn(classes):
    predictions, references = classes
    assert measures.ACCURACY.compute(*classes)["accuracy"] == sk.accuracy_score(references, predictions)
    expected = sk.precision_recall_fscore_support(references, predictions, average="macro", zero_division=0)[:3]
    assert list(measures.MACRO.compute(*classes).values()) == pytest.approx(expected)


def test_totals_are_the_sum_of_the_statistics(classes):
    np.testing.assert_array_equal(measures.class_totals(*classes), measures.class_counts(*classes).sum(axis=0))


def test_label_scores_equal_sklearn():
    generator = np.random.default_rng(4)
    predictions, references = generator.integers(0, 2, (50, 6)), generator.integers(0, 2, (50, 6))
    references[:, 5] = predictions[:, 5] = 0  # a label that never occurs
    found = measures.LABELS.compute(predictions, references)
    for average in ("micro", "macro"):
        expected = sk.f1_score(references, predictions, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected)
    assert measures.SUBSET.compute(predictions, references)["subset_accuracy"] == sk.accuracy_score(
        references, predictions
    )


def test_regression_scores_equal_scipy():
    generator = np.random.default_rng(5)
    x, y = generator.normal(1e4, 1, 40).round(1), generator.normal(-3, 2, 40).round(0)
    assert measures.PEARSON.compute(x, y)["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert measures.SPEARMAN.compute(x, y)["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert measures.SQUARED_ERROR.compute(x, y)["mse"] == pytest.approx(sk.mean_squared_error(y, x))


def test_correlation_with_a_constant_is_undefined():
    assert math.isnan(measures.PEARSON.compute([0.1] * 7, np.arange(7))["pearson"])
    assert math.isnan(measures.SPEARMAN.compute(np.arange(7), [0.3] * 7)["spearman"])


def test_ranks_equal_scipy():
    values = np.random.default_rng(6).integers(0, 5, 30)
    np.testing.assert_array_equal(measures.ranks(values), stats.rankdata(values))


def test_top_accuracy_by_hand():
    found = measures.top_measure(2).compute(np.array([[0, 1], [2, 0], [1, 2]]), np.array([1, 1, 1]))
    assert found == {"top_2_accuracy": 2 / 3}


def test_perplexity_by_hand():
    found = measures.PERPLEXITY.compute([2 * math.log(4), math.log(4)], [2, 1])
    assert found["perplexity"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O", [("A", 0, 1)]),
        ("B-A B-A", [("A", 0, 0), ("A", 1, 1)]),
        ("O I-A I-A O", [("A", 1, 2)]),  # seqeval's default: I- after O starts an entity
        ("I-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
        ("B-A I-B I-B", [("A", 0, 0), ("B", 1, 2)]),  # another type starts one too
        ("B-A O I-A", [("A", 0, 0), ("A", 2, 2)]),
        ("B-A I-A E-A I-A", [("A", 0, 2), ("A", 3, 3)]),
        ("S-A I-A", [("A", 0, 0), ("A", 1, 1)]),
        ("NOUN NOUN VERB O NOUN", [("NOUN", 0, 1), ("VERB", 2, 2), ("NOUN", 4, 4)]),
        ("B-X-Y I-X-Y", [("X-Y", 0, 1)]),
        ("B I O B", [("", 0, 1), ("", 3, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_by_hand(tags, expected):
    assert find_entities(tags.split()) == expected


def test_entity_scores_by_hand():
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predictions = [["B-PER", "I-PER", "O", "B-PER"], ["O", "I-LOC"]]
    found = measures.ENTITIES.compute(predictions, references)
    assert found == {"f1": pytest.approx(2 / 3), "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert measures.TOKENS.compute(predictions, references)["token_accuracy"] == 4 / 6


def test_bootstrap_equals_a_slow_loop(classes):
    values = bootstrap.resample_values(measures.MACRO, *classes, key="f1", resamples=20, seed=7)
    generator = np.random.default_rng(7)
    for value in values:
        drawn = generator.integers(0, 60, 60)
        expected = sk.f1_score(classes[1][drawn], classes[0][drawn], average="macro", zero_division=0)
        assert value == pytest.approx(expected)


def test_recomputed_bootstrap_sees_the_same_samples(classes):
    slow = measures.Measure("slow", function=lambda p, r: {"accuracy": sk.accuracy_score(r, p)})
    values = [
        bootstrap.resample_values(measure, *classes, key="accuracy", resamples=30, seed=1)
        for measure in (measures.ACCURACY, slow)
    ]
    np.testing.assert_allclose(*values)


def test_blocks_of_weights_do_not_change_the_samples(classes, monkeypatch):
    whole = bootstrap.resample_values(measures.ACCURACY, *classes, key="accuracy", resamples=9, seed=1)
    monkeypatch.setattr(bootstrap, "MAX_WEIGHTS", 130)
    parts = bootstrap.resample_values(measures.ACCURACY, *classes, key="accuracy", resamples=9, seed=1)
    np.testing.assert_array_equal(whole, parts)


def test_interval_of_accuracy_covers_the_binomial_one():
    right = np.arange(400) < 300
    values = bootstrap.resample_values(
        measures.ACCURACY, right, np.ones(400, bool), key="accuracy", resamples=4000, seed=0
    )
    low, high = bootstrap.percentile_interval(values)
    error = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.006)
    assert bootstrap.percentile_interval(np.array([np.nan])) == (None, None)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 3), (1, 12), (200, 260), (700, 800), (2000, 1500)])
def test_mcnemar_equals_the_binomial_test(counts):
    total = sum(counts)
    expected = stats.binomtest(counts[0], total, 0.5).pvalue if total else 1.0
    assert bootstrap.mcnemar_p(*counts) == pytest.approx(expected, rel=1e-9)
    assert bootstrap.mcnemar_p(*counts) == bootstrap.mcnemar_p(*counts[::-1])


def test_calibration_error_equals_a_slow_loop():
    generator = np.random.default_rng(8)
    confidences = np.concatenate([generator.uniform(0.2, 1, 200), [1.0, 1 / 15, 2 / 3]])
    correct = generator.uniform(size=203) < confidences
    expected = 0.0
    for i in range(15):
        inside = (confidences > i / 15) & (confidences <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    assert bootstrap.expected_calibration_error(confidences, correct) == pytest.approx(expected)
    assert bootstrap.expected_calibration_error([1.0, 1.0], [True, True]) == 0


def test_resolving_names_functions_objects_and_lists():
    assert [m.name for m in measures.resolve_measures(None, "single_label")] == ["accuracy", "macro"]
    assert measures.resolve_measures("recall", "single_label")[0].compute([0, 1], [0, 0]) == {"recall": 0.25}
    assert measures.resolve_measures("entities", "tokens")[0].keys == ("f1", "precision", "recall")
    both = measures.resolve_measures(["f1", sk.accuracy_score], "single_label")
    assert [measure.name for measure in both] == ["f1", "accuracy_score"]
    assert both[1].compute([0, 1], [0, 0]) == {"accuracy_score": 0.5}


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        ("acuracy", "single_label", "one of accuracy, precision, recall, f1 .*got 'acuracy'"),
        ("accuracy", "regression", "one of pearson, spearman, mse"),
        (3, "single_label", "a function .*got int"),
        ([], "single_label", "empty list"),
        (None, "features", "Pass metric="),
    ],
)
def test_bad_metrics(metric, kind, message):
    with pytest.raises(SettingError, match=message):
        measures.resolve_measures(metric, kind)


def test_a_metric_must_return_numbers():
    with pytest.raises(SettingError, match="must return a number or a dict of numbers"):
        measures.resolve_measures(lambda p, r: [1, 2], "features")[0].compute([1], [1])
