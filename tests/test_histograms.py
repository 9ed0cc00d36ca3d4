"""Histograms: exact counts whatever the order, bounds kept as they are, memory that does not grow."""

import numpy as np
import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.histograms import BINS, Histogram


def histogram_of(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(torch.as_tensor(part))
    return histogram


def random_values(number=20000, seed=0):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed)) ** 3


def test_counts_are_those_of_all_values_at_once():
    values = random_values()
    histogram = histogram_of(*values.split(777))
    expected, _ = np.histogram(values.double().numpy(), bins=histogram.edges())
    assert np.array_equal(histogram.counts.numpy(), expected)
    assert histogram.total == len(values) == int(histogram.counts.sum())
    assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_order_and_batches_do_not_matter(size):
    values = random_values(2000) if size == 1 else random_values()
    at_once = histogram_of(values)
    for ordered in (values.sort().values, values.abs().argsort(), values):
        ordered = values[ordered] if ordered.dtype == torch.int64 else ordered
        found = histogram_of(*ordered.split(size))
        assert torch.equal(found.counts, at_once.counts)
        assert found.width == at_once.width


def test_bins_double_by_hand():
    """0.5, −0.25 fill [−1, 1]; then −3 makes the bins four times as wide."""
    histogram = histogram_of([0.5, -0.25])
    assert histogram.width == 2 / BINS
    histogram.add(torch.tensor([-3.0]))
    assert histogram.width == 8 / BINS
    places = {int(place) - BINS // 2: int(histogram.counts[place]) for place in histogram.counts.nonzero()}
    assert places == {BINS // 16: 1, -BINS // 32: 1, -BINS * 3 // 8: 1}


def test_at_least_a_quarter_of_the_bins_is_used():
    for largest in (1.0, 1.001, 3.99, 1e-30, 7e20):
        histogram = histogram_of([largest])
        assert BINS / 4 <= largest / histogram.width <= BINS / 2


def test_memory_does_not_grow():
    histogram = histogram_of(*(random_values(seed=seed) * 10**seed for seed in range(6)))
    assert histogram.counts.shape == (BINS,)
    assert histogram.total == 6 * 20000


def test_zeros_and_nothing():
    histogram = histogram_of([0.0, 0.0], [])
    assert (histogram.low, histogram.high, histogram.total) == (0.0, 0.0, 2)
    histogram.add(torch.tensor([5.0]))
    assert int(histogram.counts[BINS // 2]) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad):
    histogram = histogram_of([1.0])
    with pytest.raises(SettingError, match="NaN or infinite values have no histogram"):
        histogram.add(torch.tensor([0.0, bad]))
    assert histogram.total == 1
