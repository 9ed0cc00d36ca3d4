"""Duplicates: planted ones are found, kept rows are no duplicates, every dropped row is like its kept one."""

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection import blockwise, deduplication
from hfshrink.selection.deduplication import find_duplicates, find_overlap, without_duplicates


def points(n=100, d=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def planted(copies=10, noise=1e-3):
    """100 rows and near copies of the first ten, at other lengths."""
    return np.concatenate([points(), 3 * points()[:copies] + noise * points(copies, seed=1)])


def cosines(array):
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    return unit @ unit.T


def as_sets(groups):
    return {frozenset(group.tolist()) for group in groups}


def test_planted_pairs_are_found():
    groups = find_duplicates(planted(), 0.99)
    assert as_sets(groups) == {frozenset({row, 100 + row}) for row in range(10)}
    kept = without_duplicates(110, groups)
    assert len(kept) == 100
    assert (np.triu(cosines(planted()[kept]), 1) <= 0.99).all()


def test_the_row_nearest_the_centre_is_kept_and_stands_first():
    array = np.array([[1.0, 0.2], [1.0, 0.1], [1.0, 0.0], [1.0, 0.3]], dtype=np.float32)
    (group,) = find_duplicates(array, 0.9)
    assert group.tolist() == [1, 0, 2, 3]  # the mean angle lies between rows 0 and 1, a little nearer to 1
    assert without_duplicates(4, [group]).tolist() == [1]


@pytest.mark.parametrize("block", [60, 2**22])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_no_two_kept_rows_are_alike_and_each_dropped_one_is_like_its_kept_one(monkeypatch, block, threshold):
    """Against the full matrix of cosines: chains of likeness don't drop rows that are unlike every kept row."""
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", block)
    monkeypatch.setattr(deduplication, "BLOCK_NUMBERS", block)
    array = points()
    similarity, groups = cosines(array), find_duplicates(array, threshold)
    kept = without_duplicates(100, groups)
    assert len(kept) + sum(len(group) - 1 for group in groups) == 100
    assert (similarity[np.ix_(kept, kept)] - 2 * np.eye(len(kept)) <= threshold).all()
    for group in groups:
        assert (similarity[group[0], group[1:]] > threshold).all()
        assert (np.diff(group[1:]) > 0).all()


def test_blocks_change_nothing(monkeypatch):
    whole = find_duplicates(points(), 0.4)
    monkeypatch.setattr(deduplication, "BLOCK_NUMBERS", 300)
    assert [group.tolist() for group in find_duplicates(points(), 0.4)] == [group.tolist() for group in whole]


def test_the_order_of_the_rows_does_not_change_the_kept_set():
    array, order = points(), np.random.default_rng(3).permutation(100)
    kept = without_duplicates(100, find_duplicates(array, 0.4))
    again = without_duplicates(100, find_duplicates(array[order], 0.4))
    assert sorted(order[again].tolist()) == kept.tolist()


def test_clusters_find_the_pairs_within_them():
    pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `select`)")
    far = np.repeat(np.eye(4, 16, dtype=np.float32) * 9, 25, axis=0)
    array = np.concatenate([points() + far, (points() + far)[::10]])
    one, four = find_duplicates(array, 0.995), find_duplicates(array, 0.995, clusters=4)
    assert as_sets(one) == as_sets(four) == {frozenset({10 * i, 100 + i}) for i in range(10)}


def test_equal_texts_are_told_by_their_normal_form():
    texts = ["A film", "other", "a  FILM\n", "\uff41 film", "another", "other"]  # row 3 begins with a full-width a
    groups = find_duplicates(texts=texts)
    assert [group.tolist() for group in groups] == [[0, 2, 3], [1, 5]]
    assert find_duplicates(texts=["a", "b"]) == []
    assert [g.tolist() for g in find_duplicates(points(2), None, texts=["a", "A"])] == [[0, 1]]


def test_equal_texts_and_near_embeddings_join_into_one_group():
    array = planted()
    texts = [f"text {row}" for row in range(110)]
    texts[50] = texts[3]  # equal text, another embedding
    groups = find_duplicates(array, 0.99, texts)
    assert frozenset({3, 50, 103}) in as_sets(groups)
    assert len(groups) == 10
    assert without_duplicates(110, groups).size == 99


def test_rows_of_zeros_are_like_nothing():
    array = points()
    array[[2, 9]] = 0
    assert find_duplicates(array, 0.99) == []


def test_many_copies_of_one_row_leave_one():
    groups = find_duplicates(np.ones((300, 4), dtype=np.float32), 0.9)
    assert [len(group) for group in groups] == [300]
    assert without_duplicates(300, groups).size == 1


def test_rows_shared_with_the_test_rows_are_found(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 500)
    array, others = planted(), points(30, seed=9)
    others[[4, 8]] = 0.5 * array[[20, 60]]
    assert find_overlap(array, others, 0.99).tolist() == [20, 60]
    texts, other_texts = [f"t{row}" for row in range(110)], [f"o{row}" for row in range(30)]
    other_texts[7] = "T33 "
    assert find_overlap(array, others, 0.99, texts, other_texts).tolist() == [20, 33, 60]
    assert find_overlap(None, None, None, texts, other_texts).tolist() == [33]
    assert find_overlap(array[:5], points(7, seed=8), 0.99).size == 0


def test_bad_input_is_refused():
    with pytest.raises(SettingError, match="needs embeddings and a threshold, or texts"):
        find_duplicates()
    for threshold in (0, 1, 1.5, float("nan")):
        with pytest.raises(SettingError, match=r"threshold must be a cosine in \(0, 1\)"):
            find_duplicates(points(), threshold)
    with pytest.raises(SettingError, match="one row for each of the 99 labels or texts, got 100"):
        find_duplicates(points(), 0.9, ["a"] * 99)
    with pytest.raises(SettingError, match="texts must be strings, got NoneType in row 1"):
        find_duplicates(texts=["a", None])
    with pytest.raises(SettingError, match="clusters must be a whole number from 1 on, got 0"):
        find_duplicates(points(), 0.9, clusters=0)
    with pytest.raises(SettingError, match="embedded by the same model, got embeddings of 16 and 8 numbers"):
        find_overlap(points(), points(d=8))
    with pytest.raises(SettingError, match="needs both sides"):
        find_overlap(points(), None)
    array = points()
    array[3, 3] = np.nan
    with pytest.raises(SettingError, match="embedding of row 3 holds NaN"):
        find_duplicates(array)
    with pytest.raises(SettingError, match="embedding of row 3 holds NaN"):
        find_overlap(points(), array)
