import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection.methods import (
    FREE_MEASURE,
    MEASURES,
    METHODS,
    NAMES,
    Measure,
    choose_method,
    hardest_rows,
    random_rows,
)
from hfshrink.selection.strata import easiest

EVERYTHING = {"has_scores": True, "has_embeddings": True}


def test_table_holds_every_method_that_the_documentation_names():
    asked = (
        "random kmeans herding k-center facility el2n grand forgetting aum ambiguous easy hard h-score ccs moderate"
    )
    assert set(METHODS) == set(asked.split())
    assert (*METHODS, "auto") == NAMES
    assert set(FREE_MEASURE) <= set(NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_names_its_source_and_a_known_measure(name):
    method = METHODS[name]
    assert method.source
    assert method.measure is None or method.measure in MEASURES
    assert not (method.embeddings and method.measure)


def test_hardest_rows_without_cutoff_are_the_hardest():
    scores = np.random.default_rng(0).random(40)
    labels = np.arange(40) % 3
    assert hardest_rows(scores, 13, labels=labels).tolist() == easiest(-scores, 13, labels).tolist()


def test_cutoff_leaves_the_highest_of_each_class_out():
    scores = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]
    assert hardest_rows(scores, 4, 0.25, [0] * 4 + [1] * 4).tolist() == [1, 2, 5, 6]


def test_cutoff_leaves_enough_rows():
    assert hardest_rows([3.0, 1.0, 2.0], 2, 0.9).tolist() == [1, 2]


def test_cutoff_outside_its_range_is_refused():
    with pytest.raises(SettingError, match=r"cutoff must be a share in \[0, 1\) of the rows, got 1"):
        hardest_rows([1.0, 2.0], 1, 1.0)


def test_random_rows_depend_on_their_seed_alone():
    assert random_rows(50, 9, seed=4).tolist() == random_rows(50, 9, seed=4).tolist()
    assert random_rows(50, 9, seed=4).tolist() != random_rows(50, 9, seed=5).tolist()


def test_measures_turn_towards_harder():
    scores = np.array([0.1, 0.9])
    assert MEASURES["el2n"].towards_harder(scores).tolist() == [0.1, 0.9]
    assert MEASURES["aum"].towards_harder(scores).tolist() == [-0.1, -0.9]
    assert MEASURES["confidence"].towards_harder(scores).tolist() == [-0.1, -0.9]
    assert MEASURES["h-score"].towards_harder(scores).tolist() == [0.1, 0.9]


def test_rows_never_learned_are_one_harder_than_the_hardest_other():
    assert MEASURES["forgetting"].towards_harder(np.array([0.0, np.inf, 3.0])).tolist() == [0, 4, 3]
    assert MEASURES["forgetting"].towards_harder(np.array([np.inf, np.inf])).tolist() == [0, 0]


def test_values_that_a_measure_can_not_have_are_refused():
    with pytest.raises(SettingError, match=r"must lie in 0..1.41421, got -2..1.*Name it with score="):
        MEASURES["el2n"].towards_harder(np.array([-2.0, 1.0]))
    with pytest.raises(SettingError, match="NaN or infinite, the first of row 1"):
        Measure().towards_harder(np.array([0.0, np.nan]))
    with pytest.raises(SettingError, match="NaN or infinite, the first of row 0"):
        MEASURES["aum"].towards_harder(np.array([np.inf, 1.0]))


@pytest.mark.parametrize(
    ("kept", "per_class", "method", "why"),
    [
        (0.8, 1000, "random", "80 % of the rows are kept, half or more: the hardest 5 % of each class and near-dup"),
        (0.98, 10, "random", "the hardest 1 % of each class and near-duplicates leave first"),
        (0.5, 1000, "random", "half or more"),
        (0.499, 1000, "random", "20 % or more: the hardest 5 % of each class leave first, the others are drawn"),
        (0.2, 1000, "random", "20 % of the rows are kept, 20 % or more"),
        (0.199, 1000, "ccs", "below 20 %: coverage of the scores"),
        (0.1, 1000, "ccs", "10 % of the rows are kept, below 20 %"),
        (0.099, 1000, "kmeans", "below 10 %: the rows nearest to the centroids"),
        (0.3, 5, "kmeans", "under 20 a class"),
    ],
)
def test_auto_follows_the_kept_share_and_says_so(kept, per_class, method, why):
    choice = choose_method(kept, per_class, **EVERYTHING)
    assert choice.method == method
    assert why in choice.why
    assert choice.deduplicate == (kept >= 0.5)
    assert choice.measure == "el2n"
    cutoff = {"random": min(0.05, (1 - kept) / 2), "ccs": 0, "kmeans": {0.099: 0.3, 0.3: 0.1}.get(kept)}
    assert choice.cutoff == pytest.approx(cutoff[method])


@pytest.mark.parametrize(("kept", "method"), [(0.9, "random"), (0.3, "kmeans"), (0.01, "kmeans")])
def test_auto_without_labels_goes_without_scores(kept, method):
    assert choose_method(kept, 100, has_scores=False, has_embeddings=True).method == method


def test_auto_without_embeddings_goes_by_the_scores():
    choices = [choose_method(kept, 100, has_scores=True, has_embeddings=False) for kept in (0.9, 0.3, 0.1, 0.01)]
    assert [choice.method for choice in choices] == ["random", "random", "ccs", "ccs"]
    assert [choice.deduplicate for choice in choices] == [True, False, False, False]  # of equal rows
    assert "near-duplicates need embeddings" in choices[0].why


def test_auto_with_nothing_to_judge_by_says_what_to_pass():
    with pytest.raises(SettingError, match="pass model=.*embeddings=.*data_map= or scores=.*'random' needs none"):
        choose_method(0.3, 10, has_scores=False, has_embeddings=False)
