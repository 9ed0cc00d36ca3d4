"""Distances of distributions and coverage of rows: by hand, against scipy, against simulation and slow loops."""

from math import comb

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection import group_measures
from hfshrink.selection.group_measures import (
    chance_of_at_most,
    chi_squared,
    expected_variation,
    nearest_distances,
    total_variation,
)


def test_total_variation_by_hand_and_its_bounds():
    assert total_variation(np.array([60, 40]), np.array([3, 7])) == pytest.approx(0.3)
    assert total_variation(np.array([60, 40]), np.array([6, 4])) == 0
    assert total_variation(np.array([1, 99]), np.array([1, 0])) == pytest.approx(0.99)


def test_expected_variation_is_that_of_random_subsets():
    generator = np.random.default_rng(0)
    rows = np.array([500, 300, 150, 50])
    drawn = generator.multivariate_hypergeometric(rows, 100, size=2000)
    simulated = np.mean([total_variation(rows, kept) for kept in drawn])
    assert expected_variation(rows, 100) == pytest.approx(simulated, rel=0.05)
    assert expected_variation(rows, 1000) == 0


def test_chi_squared_is_the_test_of_independence_between_kept_and_group():
    stats = pytest.importorskip("scipy.stats")
    rows, kept = np.array([500, 300, 200]), np.array([60, 25, 15])
    expected = stats.chi2_contingency(np.stack([kept, rows - kept]), correction=False)
    assert chi_squared(rows, kept) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))


def test_chi_squared_without_a_test_to_make():
    rows = np.array([50, 30])
    assert chi_squared(rows, rows) == (0.0, 1.0)
    assert chi_squared(np.array([80]), np.array([8])) == (0.0, 1.0)
    statistic, p_value = chi_squared(rows, np.array([5, 0]))  # 3.1 and 1.9 rows were expected
    assert statistic > 0
    assert p_value is None


def test_chi_squared_without_scipy_has_no_p_value(monkeypatch):
    monkeypatch.setattr(group_measures.importlib.util, "find_spec", lambda name: None)
    assert chi_squared(np.array([500, 500]), np.array([60, 40]))[1] is None


@pytest.mark.parametrize(("kept", "rows", "size", "n"), [(0, 5, 6, 20), (2, 5, 6, 20), (4, 9, 15, 20), (3, 12, 9, 20)])
def test_chance_agrees_with_counting(kept, rows, size, n):
    expected = sum(comb(rows, k) * comb(n - rows, size - k) for k in range(kept + 1)) / comb(n, size)
    assert chance_of_at_most(kept, rows, size, n) == pytest.approx(expected)


def test_chance_at_its_ends_and_for_large_numbers():
    assert chance_of_at_most(5, 5, 6, 20) == 1.0
    assert chance_of_at_most(3, 12, 12, 20) == 0.0  # at least 4 of 12 are kept: only 8 rows are elsewhere
    assert chance_of_at_most(0, 10, 100_000, 1_000_000) == pytest.approx(0.9**10, rel=1e-3)
    assert chance_of_at_most(0, 500_000, 500_000, 1_000_000) == 0.0  # too small for a float


@pytest.mark.parametrize("block", [2**22, 8])
def test_distances_agree_with_all_pairs_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(group_measures, "CENTRES", 3)
    monkeypatch.setattr("hfshrink.selection.blockwise.BLOCK_NUMBERS", block)
    points = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    kept = np.array([0, 3, 4, 17, 21, 30, 39])
    expected = np.linalg.norm(points[:, None] - points[None, kept], axis=2).min(axis=1)
    found = nearest_distances(points, kept)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[kept] == 0).all()
    some = np.array([1, 3, 20, 38])
    np.testing.assert_allclose(nearest_distances(points, kept, some), expected[some], rtol=1e-5, atol=1e-6)


def test_all_rows_kept_or_all_rows_equal_give_distance_zero():
    points = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32) + 1000
    assert (nearest_distances(points, np.arange(30)) == 0).all()
    assert (nearest_distances(np.repeat(points[:1], 9, axis=0), np.array([4])) == 0).all()


def test_nan_is_refused():
    points = np.ones((5, 2), dtype=np.float32)
    points[3, 1] = np.nan
    with pytest.raises(SettingError, match="embedding of row 3 holds NaN or infinity"):
        nearest_distances(points, np.array([0]))
