"""Coresets: optima by brute force, slow loops, exact sizes, and memory maps."""

from itertools import combinations

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection import blockwise, coresets
from hfshrink.selection.budgets import class_budgets
from hfshrink.selection.centroids import find_clusters
from hfshrink.selection.coresets import facility_location, herding, k_center, kmeans_subset, moderate

pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `select`)")
METHODS = [kmeans_subset, herding, k_center, facility_location, moderate]
ORDER_FREE = [herding, k_center, facility_location, moderate]


def points(n=60, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def radius(array, chosen):
    return max(min(np.linalg.norm(row - array[c]) for c in chosen) for row in array)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 7, 59])
def test_sizes_are_exact_and_indices_rise(method, size):
    rows = method(points(), size)
    assert rows.dtype == np.int64
    assert len(rows) == size
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < 60
    assert np.array_equal(rows, method(points(), size))


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_is_kept_whole(method):
    assert method(points(), 60).tolist() == list(range(60))
    assert method(points(), 60, np.arange(60) % 3).tolist() == list(range(60))


@pytest.mark.parametrize("method", METHODS)
def test_with_labels_each_class_gives_its_budget_and_is_worked_on_alone(method):
    array, labels = points(), np.array([0] * 40 + [1] * 19 + [2])
    rows = method(array, 12, labels)
    assert dict(enumerate(np.bincount(labels[rows]).tolist())) == class_budgets(labels, 12) == {0: 7, 1: 4, 2: 1}
    if method is not kmeans_subset:
        assert rows[labels[rows] == 1].tolist() == (40 + method(array[40:59], 4)).tolist()


@pytest.mark.parametrize("method", ORDER_FREE)
def test_the_order_of_the_rows_does_not_change_the_set(method):
    array, order = points(), np.random.default_rng(1).permutation(60)
    assert sorted(order[method(array[order], 11)].tolist()) == method(array, 11).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_memory_maps_and_small_blocks_change_nothing(method, tmp_path, monkeypatch):
    labels = np.arange(60) % 2
    expected = method(points(), 9, labels)
    np.save(tmp_path / "e.npy", points())
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 40)
    assert np.array_equal(method(np.load(tmp_path / "e.npy", mmap_mode="r"), 9, labels), expected)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_all_alike_still_give_the_size(method):
    assert len(method(np.ones((20, 3), dtype=np.float32), 6)) == 6
    assert len(method(np.zeros((20, 3), dtype=np.float32), 6)) == 6


@pytest.mark.parametrize("method", [kmeans_subset, herding, k_center, moderate])
def test_normalizing_equals_normalized_rows(method):
    array = points() * np.arange(1, 61, dtype=np.float32)[:, None]
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    assert np.array_equal(method(array, 8, normalize=True), method(unit, 8))


@pytest.mark.parametrize("seed", range(8))
def test_k_center_is_within_twice_the_optimum(seed):
    array = points(12, 2, seed)
    best = min(radius(array, chosen) for chosen in combinations(range(12), 3))
    assert radius(array, k_center(array, 3)) <= 2 * best + 1e-6


def test_k_center_without_outliers_leaves_them():
    array = points()
    array[3], array[50] = array[3] + 40, array[50] - 40
    assert {3, 50} <= set(k_center(array, 6).tolist())
    assert not {3, 50} & set(k_center(array, 6, outliers=0.04).tolist())
    assert len(k_center(array, 58, outliers=0.9)) == 58  # no more are left out than can be spared


@pytest.mark.parametrize("seed", range(8))
def test_facility_location_is_within_the_bound_of_greedy(seed):
    array = points(10, 3, seed)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)

    def value(chosen):
        return (1 + unit @ unit[list(chosen)].T).max(axis=1).sum()

    best = max(value(chosen) for chosen in combinations(range(10), 3))
    assert value(facility_location(array, 3)) >= (1 - 1 / np.e) * best


def test_facility_location_on_a_sample_still_chooses_from_all_rows():
    array = np.repeat(np.eye(5, dtype=np.float32), 40, axis=0) + 0.01 * points(200, 5)
    rows = facility_location(array, 5, references=50)
    assert sorted(rows // 40) == [0, 1, 2, 3, 4]


def test_herding_comes_nearer_to_the_mean_than_random_rows():
    array = points(500)
    error = np.linalg.norm(array[herding(array, 20)].mean(axis=0) - array.mean(axis=0))
    random = [
        np.linalg.norm(array[np.random.default_rng(s).choice(500, 20)].mean(axis=0) - array.mean(axis=0))
        for s in range(20)
    ]
    assert error < 0.1 * min(random)


def test_large_classes_are_herded_in_parts_towards_one_mean(monkeypatch):
    monkeypatch.setattr(coresets, "HERD", 100)
    array = points(450)
    rows = herding(array, 43, seed=1)
    assert len(set(rows.tolist())) == 43
    assert np.linalg.norm(array[rows].mean(axis=0) - array.mean(axis=0)) < 0.02
    assert not np.array_equal(rows, herding(array, 43, seed=2))


def test_moderate_rows_lie_at_the_median_distance():
    array = points(seed=4)
    distances = np.linalg.norm(array - array.mean(axis=0), axis=1)
    ranked = sorted(range(60), key=lambda row: abs(distances[row] - np.median(distances)))
    assert moderate(array, 9).tolist() == sorted(ranked[:9])


def test_one_row_of_each_cluster_is_the_nearest_to_its_centroid():
    array = points(300)
    found = find_clusters(blockwise.Rows(array), 12, seed=5)
    nearest = [
        min(np.flatnonzero(found.index == c), key=lambda row, c=c: np.linalg.norm(array[row] - found.centroids[c]))
        for c in range(12)
    ]
    assert kmeans_subset(array, 12, seed=5).tolist() == sorted(nearest)


def test_few_clusters_give_rows_in_proportion_nearest_first():
    sizes = [10, 20, 30]
    centres = np.repeat(np.eye(3, dtype=np.float32) * 100, sizes, axis=0)
    array = centres + points(60, 3)
    rows = kmeans_subset(array, 12, clusters=3)
    expected = []
    for start, size, share in zip([0, 10, 30], sizes, [2, 4, 6], strict=True):
        own = array[start : start + size]
        expected += sorted((start + np.linalg.norm(own - own.mean(axis=0), axis=1).argsort()[:share]).tolist())
    assert rows.tolist() == expected


def test_above_the_affordable_size_the_square_root_of_the_rows_is_the_number_of_clusters(monkeypatch):
    asked = []
    monkeypatch.setattr(coresets, "find_clusters", lambda rows, k, _: asked.append(k) or find_clusters(rows, k))
    kmeans_subset(points(), 20, np.arange(60) % 2)
    monkeypatch.setattr(coresets, "MOST_CENTROIDS", 19)
    kmeans_subset(points(), 20, np.arange(60) % 2)
    kmeans_subset(points(), 20, clusters=100)
    assert asked == [10, 10, 5, 5, 60]


def test_clusters_left_empty_by_repeated_rows_are_made_up_for():
    array = np.repeat(points(4), 10, axis=0)
    rows = kmeans_subset(array, 8)
    assert np.bincount(rows // 10).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_refused(method):
    array = points()
    for size in (0, 61, 1.5):
        with pytest.raises(SettingError, match=r"size must be a whole number in 1\.\.60"):
            method(array, size)
    with pytest.raises(SettingError, match=r"labels must be as many as the rows \(60\), got 59"):
        method(array, 5, np.zeros(59, dtype=int))
    with pytest.raises(SettingError, match="at least 3, so that each of the 3 classes"):
        method(array, 2, np.arange(60) % 3)
    with pytest.raises(SettingError, match="embeddings must be real numbers"):
        method(array[:, 0], 5)
    array[13, 1] = np.nan
    with pytest.raises(SettingError, match="embedding of row 13 holds NaN"):
        method(array, 5)
    with pytest.raises(SettingError, match="embedding of row 13 holds NaN"):
        method(array, 5, np.arange(60) % 2)


def test_settings_out_of_range_are_refused():
    with pytest.raises(SettingError, match=r"outliers must be a share in \[0, 1\).*got 1"):
        k_center(points(), 5, outliers=1)
    with pytest.raises(SettingError, match="clusters must be a whole number from 1 on, got 0"):
        kmeans_subset(points(), 5, clusters=0)
    with pytest.raises(SettingError, match="references must be a whole number from 1 on, got 0"):
        facility_location(points(), 5, references=0)
