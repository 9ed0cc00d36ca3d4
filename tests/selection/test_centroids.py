"""K-means: the known optimum of separate blobs, one answer a seed, the sample's bound, faiss where it is installed."""

import numpy as np
import pytest

from hfshrink.errors import MissingDependencyError, SettingError
from hfshrink.selection import centroids
from hfshrink.selection.blockwise import Rows
from hfshrink.selection.centroids import find_clusters

pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `select`)")


def blobs(n=60, k=4, d=3, seed=0):
    generator = np.random.default_rng(seed)
    centre = np.repeat(np.eye(k, d) * 100 + 50, n // k, axis=0)
    return (centre + generator.standard_normal((n, d))).astype(np.float32)


def within(array, found):
    return sum(((array[found.index == c] - found.centroids[c]) ** 2).sum() for c in range(len(found.centroids)))


def test_separate_blobs_are_found_with_their_means():
    array = blobs()
    found = find_clusters(Rows(array), 4)
    assert found.counts.tolist() == [15] * 4
    for start in range(0, 60, 15):
        own = found.index[start : start + 15]
        assert len(set(own.tolist())) == 1
        assert np.allclose(found.centroids[own[0]], array[start : start + 15].mean(axis=0), atol=1e-4)
    distances = ((array - found.centroids[found.index]) ** 2).sum(axis=1)
    assert np.allclose(found.squared, distances, rtol=1e-3, atol=1e-3)


def test_one_cluster_is_the_mean_and_needs_no_package(monkeypatch):
    monkeypatch.setattr(centroids, "require", None)
    found = find_clusters(Rows(blobs()), 1)
    assert np.allclose(found.centroids[0], blobs().mean(axis=0), atol=1e-4)


def test_as_many_clusters_as_rows_leave_no_distance():
    found = find_clusters(Rows(blobs(12)), 12)
    assert sorted(found.index.tolist()) == list(range(12))
    assert found.squared.max() < 1e-3 * found.centroids.var()


def test_repeated_rows_leave_empty_clusters_without_a_warning():
    found = find_clusters(Rows(np.repeat(blobs(4), 5, axis=0)), 6)
    assert np.count_nonzero(found.counts) == 4
    assert find_clusters(Rows(np.ones((9, 2), dtype=np.float32)), 3).counts.sum() == 9


def test_the_same_seed_gives_the_same_clusters():
    array = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    first, second = find_clusters(Rows(array), 20, seed=1), find_clusters(Rows(array), 20, seed=1)
    assert np.array_equal(first.centroids, second.centroids)
    assert not np.array_equal(first.centroids, find_clusters(Rows(array), 20, seed=2).centroids)


@pytest.mark.parametrize("backend", ["mini-batches", "faiss"])
def test_the_way_for_large_data_comes_near_to_lloyd(monkeypatch, backend):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="needs faiss-cpu")
    else:
        monkeypatch.setattr(centroids.importlib.util, "find_spec", lambda name: None)
    array = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    lloyd = within(array, find_clusters(Rows(array), 25))
    monkeypatch.setattr(centroids, "LLOYD_PAIRS", 0)
    large = find_clusters(Rows(array), 25)
    assert within(array, large) < 1.1 * lloyd
    assert np.array_equal(large.centroids, find_clusters(Rows(array), 25).centroids)


def test_centroids_are_fitted_to_a_sample_and_every_row_is_assigned(monkeypatch):
    monkeypatch.setattr(centroids, "LEAST_SAMPLE", 24)
    monkeypatch.setattr(centroids, "SAMPLE_PER_CENTROID", 2)
    seen = []
    fit = centroids._fit
    monkeypatch.setattr(centroids, "_fit", lambda sample, *rest: seen.append(len(sample)) or fit(sample, *rest))
    found = find_clusters(Rows(blobs()), 4)
    assert seen == [24]
    assert found.counts.tolist() == [15] * 4


def test_missing_scikit_learn_and_nan_are_named(monkeypatch):
    array = blobs()
    array[5, 0] = np.nan
    with pytest.raises(SettingError, match="embedding of row 5"):
        find_clusters(Rows(array), 2)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(MissingDependencyError, match=r"hfshrink\[select\]"):
        find_clusters(Rows(blobs()), 2)
