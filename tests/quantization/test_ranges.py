"""Scales by hand, and chosen ranges against slow searches over the values."""

import numpy as np
import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.histograms import Histogram
from hfshrink.quantization.ranges import (
    RANGE_METHODS,
    affine_scale,
    choose_range,
    clippings,
    quantile,
    symmetric_scale,
)


def histogram_of(values):
    histogram = Histogram()
    histogram.add(torch.as_tensor(values))
    return histogram


def with_outlier(number=20000, outlier=20.0):
    values = torch.randn(number, generator=torch.Generator().manual_seed(0))
    values[0] = outlier
    return values


class TestScales:
    @pytest.mark.parametrize(
        ("low", "high", "scale", "zero_point"),
        [(-1.28, 1.27, 0.01, 128), (0.5, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255), (0.0, 0.0, 1.0, 0)],
    )
    def test_affine_by_hand(self, low, high, scale, zero_point):
        found = affine_scale(low, high)
        assert found == (pytest.approx(scale, rel=1e-6), zero_point)
        assert float(np.float32(found[0])) == found[0]

    def test_zero_is_always_a_code(self):
        generator = np.random.default_rng(0)
        for low, high in generator.normal(size=(200, 2)):
            scale, zero_point = affine_scale(min(low, high), max(low, high))
            assert 0 <= zero_point <= 255
            ends = np.clip(np.round(np.array([min(low, high, 0), max(low, high, 0)]) / scale) + zero_point, 0, 255)
            back = (ends - zero_point) * scale
            assert np.abs(back - [min(low, high, 0), max(low, high, 0)]).max() <= 0.501 * scale

    @pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (1.0, -1.0)])
    def test_ranges_that_are_none(self, low, high):
        with pytest.raises(SettingError, match=r"range of layer.3 must be finite and in order, got \("):
            affine_scale(low, high, name="layer.3")

    def test_tiny_ranges_do_not_divide_by_zero(self):
        assert affine_scale(0.0, 1e-45) == (1.0, 0)

    def test_symmetric_is_the_slow_maximum(self):
        weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
        weight[:, 1] = 0
        expected = [weight[:, c].abs().max().item() / 127 if c != 1 else 1.0 for c in range(3)]
        assert symmetric_scale(weight, axis=1).tolist() == pytest.approx(expected)
        assert symmetric_scale(weight, bits=7).item() == pytest.approx(weight.abs().max().item() / 63)

    def test_weights_that_are_not_finite(self):
        with pytest.raises(SettingError, match="fc.weight has NaN or infinite values"):
            symmetric_scale(torch.tensor([[1.0, float("inf")]]), axis=0, name="fc.weight")


class TestChoice:
    def test_min_max_is_exact(self):
        values = with_outlier()
        assert choose_range(histogram_of(values), "min-max") == (float(values.min()), 20.0)
        assert choose_range(histogram_of(values), "min-max", symmetric=True) == (-20.0, 20.0)

    @pytest.mark.parametrize("percentile", [90.0, 99.01, 99.973])
    def test_percentile_is_numpys_within_a_bin(self, percentile):
        values = with_outlier()
        histogram = histogram_of(values)
        cut = (100 - percentile) / 2
        expected = np.percentile(values.numpy(), [cut, 100 - cut], method="inverted_cdf")
        found = choose_range(histogram, "percentile", percentile=percentile)
        assert np.abs(np.array(found) - expected).max() <= histogram.width
        both = np.percentile(values.abs().numpy(), percentile, method="inverted_cdf")
        low, high = choose_range(histogram, "percentile", percentile=percentile, symmetric=True)
        assert -low == high
        assert abs(high - both) <= histogram.width

    def test_all_of_the_values_are_the_hundredth_percentile(self):
        histogram = histogram_of(with_outlier())
        assert choose_range(histogram, "percentile", percentile=100.0) == (histogram.low, histogram.high)
        assert quantile(histogram, 0.0) == histogram.low

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_mse_is_the_best_of_a_slow_search(self, bits, symmetric):
        values = with_outlier(4000)
        histogram = histogram_of(values)

        def error(low, high):
            scale, zero_point = affine_scale(low, high, bits=bits)
            total = 0.0
            for value in values.tolist():
                code = min(max(round(value / scale) + zero_point, 0), 2**bits - 1)
                total += (value - (code - zero_point) * scale) ** 2
            return total

        found = choose_range(histogram, "mse", bits=bits, symmetric=symmetric)
        every_fourth = clippings(histogram, symmetric)[::4]
        assert error(*found) <= 1.001 * min(error(*candidate) for candidate in every_fourth)
        assert error(*found) <= error(*clippings(histogram, symmetric)[0])

    def test_fewer_bits_clip_more(self):
        histogram = histogram_of(with_outlier())
        widths = [np.ptp(choose_range(histogram, "mse", bits=bits)) for bits in (2, 4, 8)]
        assert widths == sorted(widths)
        assert widths[0] < widths[2]

    def test_entropy_keeps_what_has_no_tail_and_clips_a_rare_one(self):
        even = torch.rand(200000, generator=torch.Generator().manual_seed(0)) * 2 - 1
        low, high = choose_range(histogram_of(even), "entropy")
        assert low < -0.98
        assert high > 0.98
        peaked = torch.cat([even, torch.tensor([3.9])])
        low, high = choose_range(histogram_of(peaked), "entropy")
        assert 0.98 < high < 1.1

    def test_entropy_is_the_slow_sum(self):
        """KL of one clipping, with loops over bins and levels."""
        from hfshrink.quantization.ranges import _divergence

        counts = np.array([3.0, 0, 2, 5, 1, 1, 0, 4, 2, 6])
        centres, cut = np.arange(10) + 0.5, 8.0
        kept = list(counts[:8])
        clipped = [*kept[:7], kept[7] + 8]
        shared = [0.0] * 8
        for level in range(4):
            places = [place for place in range(8) if place * 4 // 8 == level and kept[place]]
            for place in places:
                shared[place] = sum(kept[p] for p in places) / len(places)
        expected = 0.0
        for p, q in zip(clipped, shared, strict=True):
            if p:
                p, q = p / sum(clipped), q / sum(shared)
                expected += p * np.log(p / max(q, 1e-12))
        assert _divergence(counts, centres, 1.0, 0.0, cut, 2) == pytest.approx(expected)

    @pytest.mark.parametrize("method", RANGE_METHODS)
    def test_every_range_holds_zero_and_lies_in_the_values(self, method):
        for values in (torch.rand(1000) + 1, -torch.rand(1000) - 1, torch.zeros(3), torch.full((5,), 2.5)):
            low, high = choose_range(histogram_of(values), method)
            assert min(float(values.min()), 0) <= low <= 0 <= high <= max(float(values.max()), 0)

    def test_errors(self):
        histogram = histogram_of([1.0])
        with pytest.raises(SettingError, match="ranges must be one of min-max, percentile, entropy, mse, got 'max'"):
            choose_range(histogram, "max")
        with pytest.raises(SettingError, match=r"percentile must be in \(0, 100\], got 0"):
            choose_range(histogram, "percentile", percentile=0)
        with pytest.raises(SettingError, match="An empty histogram has no range"):
            choose_range(Histogram(), "mse")
