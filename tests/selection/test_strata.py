"""Subsets by score: strata by hand, CCS against a slow recomputation, the paper's cutoffs."""

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import class_budgets
from hfshrink.selection.methods import hardest_rows as hardest
from hfshrink.selection.strata import ccs, closest_to, easiest, fill_up, stratum_numbers


def scores(n=200, seed=0):
    return np.random.default_rng(seed).gamma(2.0, size=n)  # many easy rows, a long tail of hard ones


def slow_stratum_budgets(values, strata, size):
    """Rows of each stratum by the paper's words: smallest first, what it can't give goes to the others."""
    edges = np.linspace(min(values), max(values), strata + 1)
    members = {s: [] for s in range(strata)}
    for value in values:
        members[min(sum(value >= edge for edge in edges[1:-1]), strata - 1)].append(value)
    budgets, left, open_strata = {}, size, strata
    for s in sorted(members, key=lambda s: len(members[s])):
        budgets[s] = min(len(members[s]), left // open_strata)
        left, open_strata = left - budgets[s], open_strata - 1
    assert left == 0
    return [budgets[s] for s in range(strata)]


def test_what_small_strata_can_not_give_goes_to_the_others():
    assert fill_up([10, 1, 10, 0], 12).tolist() == [5, 1, 6, 0]
    assert fill_up([10, 10, 10], 9).tolist() == [3, 3, 3]
    assert fill_up([5, 0, 2], 7).tolist() == [5, 0, 2]


@pytest.mark.parametrize(("size", "cutoff", "strata"), [(20, 0.3, 10), (60, 0.1, 50), (100, 0.0, 7), (140, 0.3, 50)])
def test_ccs_equals_a_slow_recomputation(size, cutoff, strata):
    values = scores()
    rows = ccs(values, size, cutoff, strata)
    left = np.sort(values)[: 200 - int(200 * cutoff)]
    assert values[rows].max() <= left.max()
    edges = np.linspace(left.min(), left.max(), strata + 1)
    found = np.clip(np.searchsorted(edges, values[rows], side="right") - 1, 0, strata - 1)
    assert np.bincount(found, minlength=strata).tolist() == slow_stratum_budgets(left, strata, size)


@pytest.mark.parametrize(
    ("kept", "cutoff"),
    [(0.01, 0.3), (0.1, 0.3), (0.15, 0.25), (0.2, 0.2), (0.3, 0.1), (0.4, 0.05), (0.5, 0)],
)
def test_the_cutoff_follows_the_kept_share(kept, cutoff):
    size = round(kept * 200)
    assert np.array_equal(ccs(scores(), size), ccs(scores(), size, cutoff))


def test_the_hardest_share_is_never_kept():
    values = scores()
    top = set(np.argsort(values)[140:].tolist())
    assert not any(top & set(ccs(values, 20, seed=seed).tolist()) for seed in range(10))


def test_ccs_spreads_over_the_range_where_random_rows_crowd():
    values = scores(5000)
    stratum = stratum_numbers(values, 10)
    by_ccs = np.bincount(stratum[ccs(values, 500, 0.0, 10)], minlength=10)
    assert by_ccs[6] >= min(np.bincount(stratum)[6], 50) > 500 * np.mean(stratum == 6)


def test_ccs_draws_at_random_inside_a_stratum():
    assert ccs(scores(), 30, seed=1).tolist() == ccs(scores(), 30, seed=1).tolist() != ccs(scores(), 30).tolist()
    drawn = np.bincount(np.concatenate([ccs(np.zeros(10), 3, 0.0, seed=s) for s in range(2000)]), minlength=10)
    assert (np.abs(drawn - 600) < 5 * np.sqrt(600 * 0.7)).all()


def test_ccs_by_class_keeps_each_budget_and_drops_the_hardest_of_each():
    values, labels = scores(), np.array([0] * 150 + [1] * 49 + [2])
    values[:150] += 100  # one class is harder throughout: it must not vanish
    rows = ccs(values, 20, labels=labels)
    assert dict(enumerate(np.bincount(labels[rows]).tolist())) == class_budgets(labels, 20)
    assert 199 in rows  # a class of one row keeps it, however hard
    for label, count in ((0, 150), (1, 49)):
        own = np.flatnonzero(labels == label)
        hard = own[np.argsort(values[own])[count - int(0.3 * count) :]]
        assert not set(hard.tolist()) & set(rows.tolist())


@pytest.mark.parametrize("method", [ccs, hardest, easiest, closest_to])
def test_sizes_are_exact_indices_rise_and_the_whole_is_kept_whole(method):
    for size in (1, 33, 199, 200):
        for labels in (None, np.zeros(200, dtype=int)):
            rows = method(scores(), size, labels=labels)
            assert rows.dtype == np.int64
            assert len(rows) == size
            assert (np.diff(rows) > 0).all()


def test_hardest_and_easiest_are_the_two_ends():
    values = scores()
    order = np.argsort(values)
    assert easiest(values, 30).tolist() == sorted(order[:30].tolist())
    assert hardest(values, 30).tolist() == sorted(order[-30:].tolist())
    assert sorted([*easiest(values, 80), *hardest(values, 120)]) == list(range(200))
    assert hardest([1, 2, 2, 2], 2).tolist() == [1, 2]


@pytest.mark.parametrize("method", [hardest, easiest, closest_to])
def test_the_order_of_the_rows_does_not_change_the_set(method):
    values, order = scores(), np.random.default_rng(1).permutation(200)
    assert sorted(order[method(values[order], 31)].tolist()) == method(values, 31).tolist()


def test_closest_to_drops_both_ends_and_draws_among_ties():
    h = np.array([0, 0, 1, 2, 2, 2, 2, 3, 4, 4]) / 4  # five runs' worth of "how often right"
    assert closest_to(h, 4).tolist() == [3, 4, 5, 6]
    assert closest_to(h, 6).tolist() == [2, 3, 4, 5, 6, 7]
    assert closest_to(h, 2, value=0.0).tolist() == [0, 1]
    assert len({tuple(closest_to(h, 2, seed=seed).tolist()) for seed in range(90)}) == 6  # every pair of the four


def test_bad_input_is_refused():
    with pytest.raises(SettingError, match=r"size must be a whole number in 1\.\.3, .* got 4"):
        hardest([1, 2, 3], 4)
    with pytest.raises(SettingError, match="scores of 2 rows are NaN or infinite, the first of row 1"):
        ccs([1, np.nan, np.inf], 1)
    with pytest.raises(SettingError, match=r"one number for each row, got int64 of shape \(2, 2\)"):
        easiest([[1, 2], [3, 4]], 1)
    with pytest.raises(SettingError, match=r"cutoff must lie in \[0, 1\) and leave at least the 8 rows to keep of 10"):
        ccs(np.arange(10), 8, cutoff=0.3)
    with pytest.raises(SettingError, match="strata must be a whole number from 1 on, got 0"):
        ccs(np.arange(10), 3, strata=0)
    with pytest.raises(SettingError, match="value must be a finite number, got nan"):
        closest_to([1, 2], 1, value=float("nan"))
    with pytest.raises(SettingError, match="at least 2, so that each of the 2 classes"):
        ccs([1, 2, 3], 1, labels=[0, 1, 1])
    with pytest.raises(SettingError, match=r"as many as the rows \(3\), got 2"):
        hardest([1, 2, 3], 2, labels=[0, 1])
