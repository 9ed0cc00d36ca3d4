"""Budgets: largest remainders by hand, every class kept, random subsets of the right sizes."""

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import budgets_left, by_class, class_budgets, random_subset, share_out


def test_largest_remainders_by_hand():
    # 10 of 47, 16, 15.8, 12, 6.1, 3.1 %: quotas 4.7 1.6 1.58 1.2 .61 .31, rest of 3 to .7, .61, .6
    assert share_out([4700, 1600, 1580, 1200, 610, 310], 10).tolist() == [5, 2, 1, 1, 1, 0]


def test_of_equal_remainders_the_larger_group_then_the_earlier_is_served():
    assert share_out([3, 1], 2).tolist() == [2, 0]  # quotas 1.5 and 0.5
    assert share_out([2, 2, 2], 2).tolist() == [1, 1, 0]


def test_a_class_below_the_minimum_is_raised_and_the_others_share_the_rest():
    labels = [0] * 90 + [1] * 9 + [2]
    assert class_budgets(labels, 10) == {0: 8, 1: 1, 2: 1}  # quotas 9, .9, .1: the two small ones get 1 each
    assert class_budgets(labels, 10, minimum=3) == {0: 6, 1: 3, 2: 1}
    assert class_budgets(labels, 3) == {0: 1, 1: 1, 2: 1}
    assert class_budgets(labels, 100) == {0: 90, 1: 9, 2: 1}


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_keep_the_minimum_and_stay_within_one_of_the_quota(seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 40, size=7) ** 2
    minimum = int(generator.integers(0, 3))
    size = int(generator.integers(np.minimum(counts, minimum).sum(), counts.sum() + 1))
    shares = share_out(counts, size, minimum)
    assert shares.sum() == size
    assert (shares <= counts).all()
    assert (shares >= np.minimum(counts, minimum)).all()
    if not minimum:
        assert (np.abs(shares - size * counts / counts.sum()) < 1).all()


def test_names_are_classes_too():
    assert class_budgets(["b", "a", "b", "b"], 2) == {"a": 1, "b": 1}


def test_random_subsets_have_the_size_and_rise():
    rows = random_subset(100, 17, seed=3)
    assert rows.dtype == np.int64
    assert len(rows) == 17
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == random_subset(100, 17, seed=3).tolist() != random_subset(100, 17, seed=4).tolist()


def test_every_row_is_drawn_equally_often():
    drawn = np.bincount(np.concatenate([random_subset(10, 3, seed) for seed in range(3000)]), minlength=10)
    assert (np.abs(drawn - 900) < 5 * np.sqrt(900 * 0.7)).all()  # binomial, five standard deviations


def test_stratified_random_subsets_hold_the_budgets():
    labels = np.array([0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    rows = random_subset(10, 5, labels=labels)
    assert dict(enumerate(np.bincount(labels[rows]).tolist())) == class_budgets(labels, 5)


def test_the_whole_is_kept_whole():
    assert random_subset(5, 5).tolist() == random_subset(5, 5, labels=[0, 1, 1, 2, 2]).tolist() == [0, 1, 2, 3, 4]


def test_a_method_gets_each_class_with_its_budget_and_only_those_it_must_choose_from():
    asked = []

    def first(rows, budget):
        asked.append((rows.tolist(), budget))
        return np.arange(budget)

    assert by_class(6, 3, ["x", "y", "x", "x", "x", "x"], first).tolist() == [0, 1, 2]
    assert asked == [([0, 2, 3, 4, 5], 2)]  # the single y is kept without asking


@pytest.mark.parametrize("size", [0, 11, -1, 2.0, True, None])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(SettingError, match=r"size must be a whole number in 1\.\.10"):
        random_subset(10, size)


def test_fewer_rows_than_classes_are_refused():
    with pytest.raises(SettingError, match="at least 3, so that each of the 3 classes keeps an example, got 2"):
        class_budgets([0, 1, 2, 2], 2)
    with pytest.raises(SettingError, match="at least 5, so that each of the 3 classes keeps 2 examples, got 4"):
        class_budgets([0, 1, 1, 1, 2, 2], 4, minimum=2)


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(SettingError, match=r"one class number or name for each row, got float64 of shape \(3,\)"):
        class_budgets([0.5, 1.0, 2.0], 3)
    with pytest.raises(SettingError, match=r"of shape \(2, 2\)"):
        class_budgets([[0, 1], [1, 0]], 2)
    with pytest.raises(SettingError, match=r"A label is missing \(None\)"):
        class_budgets([0, None, 1], 2)
    with pytest.raises(SettingError, match=r"as many as the rows \(4\), got 3"):
        random_subset(4, 3, labels=[0, 1, 1])


def test_budgets_of_what_is_left_add_up_and_leave_no_class_out():
    rng = np.random.default_rng(0)
    for _ in range(300):
        classes = int(rng.integers(1, 6))
        n = int(rng.integers(classes, 60))
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
        left = np.sort(rng.choice(n, int(rng.integers(classes, n + 1)), replace=False))
        size = int(rng.integers(classes, len(left) + 1))
        budgets = budgets_left(labels, left, size)
        room = {name: int((labels[left] == name).sum()) for name in range(classes)}
        assert sum(budgets.values()) == size
        assert all(bool(room[name]) <= budgets[name] <= room[name] for name in range(classes))


def test_budgets_follow_all_rows_where_enough_of_each_class_is_left():
    labels, left = np.repeat([0, 1], 50), np.concatenate([np.arange(50), np.arange(50, 80)])
    assert budgets_left(labels, left, 40) == {0: 20, 1: 20} != class_budgets(labels[left], 40)
