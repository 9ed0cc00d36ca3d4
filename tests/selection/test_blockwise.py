"""Blocks of rows: what they give equals the array at once, however small the blocks are."""

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection import blockwise
from hfshrink.selection.blockwise import Rows, check_embeddings, nearest, squared_distances


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 50)


def points(n=23, d=5, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype) + np.arange(d, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_blocks_join_to_the_array(dtype):
    array, kept = points(dtype=dtype), np.array([1, 4, 5, 9, 20])
    assert len(list(Rows(array).blocks())) == 3
    joined = np.concatenate([block for _, block in Rows(array, kept).blocks(columns=25)])
    assert joined.dtype == np.float32
    assert np.array_equal(joined, array[kept].astype(np.float32))
    assert np.array_equal(Rows(array, kept).only(np.array([0, 3])).take(np.array([1])), joined[[3]])


def test_rows_are_scaled_then_shifted():
    array = points().astype(np.float64)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    centred = Rows(array.astype(np.float32), normalize=True).centred()
    assert np.allclose(centred.take(np.arange(23)), unit - unit.mean(axis=0), atol=1e-6)
    assert np.allclose(centred.squared_lengths(), ((unit - unit.mean(axis=0)) ** 2).sum(axis=1), atol=1e-6)


def test_a_row_of_zeros_stays_zeros():
    array = points()
    array[7] = 0
    assert not Rows(array, normalize=True).take(np.array([7])).any()


def test_a_memory_map_is_read_as_the_array(tmp_path):
    np.save(tmp_path / "e.npy", points())
    mapped = check_embeddings(np.load(tmp_path / "e.npy", mmap_mode="r"))
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(Rows(mapped).mean(), Rows(points()).mean())


def test_the_nearest_centre_equals_a_loop():
    array, centres = points(), points(6, seed=1)
    index, squared = nearest(Rows(array), centres)
    for row in range(23):
        distances = ((array[row].astype(np.float64) - centres) ** 2).sum(axis=1)
        assert index[row] == distances.argmin()
        assert squared[row] == pytest.approx(distances.min(), rel=1e-4)
    assert np.allclose(squared_distances(array, array[3]), ((array - array[3]) ** 2).sum(axis=1), atol=1e-4)
    assert (squared_distances(array, array[3]) >= 0).all()


def test_small_distances_far_from_zero_keep_their_digits():
    """Centred first: without, ‖x‖² of 10⁶ leaves a squared distance of 10⁻² no correct digit in float32."""
    array = points(dtype=np.float64) * 0.02 + 500
    array = array.astype(np.float32)
    centred = Rows(array).centred()
    _, squared = nearest(centred, centred.take(np.array([0])))
    exact = ((array.astype(np.float64) - array[0]) ** 2).sum(axis=1)
    assert np.allclose(squared, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_named_by_its_row(value):
    array = points()
    array[17, 2] = value
    with pytest.raises(SettingError, match="embedding of row 17 holds NaN or infinity"):
        Rows(array).mean()
    with pytest.raises(SettingError, match="embedding of row 17 holds"):
        Rows(array, np.array([2, 17, 20]), normalize=True).centred()
    assert np.isfinite(Rows(array, np.array([2, 20])).mean()).all()


def test_arrays_of_another_kind_are_refused():
    for wrong in (np.zeros(3), np.zeros((2, 2), dtype=int), np.zeros((0, 4)), [["a"]]):
        with pytest.raises(SettingError, match=r"real numbers of shape \(rows, dimensions\)"):
            check_embeddings(wrong)
    with pytest.raises(SettingError, match="one row for each of the 4 labels or texts, got 3"):
        check_embeddings(np.zeros((3, 2)), 4)
