"""The searches with a pool equal the plain searches, however small pool and blocks are."""

from itertools import islice

import numpy as np
import pytest

from hfshrink.selection import blockwise, greedy
from hfshrink.selection.blockwise import Rows
from hfshrink.selection.greedy import best_facilities, farthest_first, herd, inliers


def points(n=80, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def plain_farthest_first(array, size):
    array = array.astype(np.float64)
    chosen = [int(((array - array.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    while len(chosen) < size:
        distances = np.array([min(np.linalg.norm(row - array[c]) for c in chosen) for row in array])
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
    return chosen


def losses(array, chosen):
    """For each choice the best gain of any row at that moment, less its own: 0 for plain greedy (ties are many)."""
    unit = array.astype(np.float64) / np.linalg.norm(array, axis=1, keepdims=True)
    similarity, covered, found = 1 + unit @ unit.T, np.zeros(len(array)), []
    for row in chosen:
        gains = np.maximum(similarity - covered, 0).sum(axis=1)
        found.append(gains.max() - gains[row])
        covered = np.maximum(covered, similarity[row])
    return np.array(found)


@pytest.mark.parametrize("pool", [1, 3, 10, 80])
def test_farthest_first_equals_the_plain_search_whatever_the_pool(monkeypatch, pool):
    monkeypatch.setattr(greedy, "POOL_NUMBERS", pool * 4)
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 60)
    array = points()
    assert list(islice(farthest_first(Rows(array).centred()), 30)) == plain_farthest_first(array, 30)


def test_farthest_first_reads_the_rows_far_less_often_than_it_names_centres(monkeypatch):
    passes, nearest = [], greedy.nearest
    monkeypatch.setattr(greedy, "nearest", lambda *these: passes.append(1) or nearest(*these))
    monkeypatch.setattr(greedy, "POOL_NUMBERS", 200 * 16)
    list(islice(farthest_first(Rows(points(2000, 16)).centred()), 100))
    assert len(passes) <= 10


def test_rows_that_repeat_are_named_once_each():
    array = np.repeat(points(3), 4, axis=0)
    named = list(islice(farthest_first(Rows(array).centred()), 12))
    assert sorted(named) == list(range(12))
    assert len({row // 4 for row in named[:3]}) == 3  # first one of each
    rows = Rows(array, normalize=True)
    named = list(islice(best_facilities(rows, rows.take(np.arange(12))), 12))
    assert sorted(named) == list(range(12))
    assert sorted(islice(herd(array - array.mean(axis=0)), 12)) == list(range(12))


@pytest.mark.parametrize("pool", [1, 7, 80])
@pytest.mark.parametrize("rechecked", [1, 5])
def test_lazy_greedy_equals_plain_greedy(monkeypatch, pool, rechecked):
    monkeypatch.setattr(greedy, "POOL_NUMBERS", pool * 80)
    monkeypatch.setattr(greedy, "RECHECKED", rechecked)
    array = points(seed=1)
    rows = Rows(array, normalize=True)
    chosen = list(islice(best_facilities(rows, rows.take(np.arange(80))), 40))
    assert len(set(chosen)) == 40
    assert np.abs(losses(array, chosen)).max() < 1e-5


def test_lazy_greedy_computes_few_gains_anew(monkeypatch):
    asked, gains = [], greedy._gains
    monkeypatch.setattr(greedy, "_gains", lambda sims, covered: asked.append(len(sims)) or gains(sims, covered))
    monkeypatch.setattr(greedy, "RECHECKED", 4)
    rows = Rows(points(400), normalize=True)
    list(islice(best_facilities(rows, rows.take(np.arange(400))), 50))
    assert sum(asked) < 0.2 * 400 * 50


def test_herding_equals_a_slow_loop():
    array = points(seed=2).astype(np.float64)
    mean, chosen = array.mean(axis=0), []
    for _ in range(30):
        errors = [
            np.inf if row in chosen else np.linalg.norm(mean - array[[*chosen, row]].mean(axis=0)) for row in range(80)
        ]
        chosen.append(int(np.argmin(errors)))
    assert list(islice(herd((array - mean).astype(np.float32)), 30)) == chosen


def test_rows_far_from_all_others_are_no_inliers():
    array = points()
    array[[5, 31]] += 50  # two together are outliers still
    assert sorted(set(range(80)) - set(inliers(Rows(array), 78, seed=0).tolist())) == [5, 31]


def test_a_row_is_no_neighbour_of_itself(monkeypatch):
    monkeypatch.setattr(greedy, "LOCAL_SAMPLE", 40)
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 160)
    array = points(seed=3)
    sample = np.sort(np.random.default_rng(7).choice(80, 40, replace=False, shuffle=False))
    means = []
    for row in range(80):
        distances = [np.linalg.norm(array[row] - array[other]) for other in sample if other != row]
        means.append(np.mean(sorted(distances)[:5]))
    expected = np.sort(np.argsort(means)[:60])
    assert np.array_equal(inliers(Rows(array), 60, seed=7), expected)
