"""Histograms that grow with the data and not with the number of samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hfshrink.errors import SettingError

BINS = 8192
"""Bins on both sides of 0 together: 64 KB per tensor. A tensor fills at least a quarter of them."""
SMALLEST_EXPONENT = -126
"""Bins below 2**-126, where float32 ends, are never needed."""


class Histogram:
    """Counts of values in `BINS` bins of one width, with 0 between the two middle ones.

    Bin k holds the values in [k·w, (k+1)·w), k = −BINS/2 … BINS/2 − 1. The width w is a power of two; where a value
    lies outside, w doubles and neighbours merge. Merging is exact, so the counts depend on neither the order of the
    data nor how it was cut into batches. Smallest and largest value are kept as they are.

    Attributes:
        counts: Number of values per bin; shape (BINS,), int64.
        exponent: All values lie in [−2**exponent, 2**exponent].
        low: Smallest value, 0.0 before the first.
        high: Largest value, 0.0 before the first.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.tensor([0.0, 1.0]))
        >>> histogram.add(torch.tensor([-3.0]))
        >>> histogram.low, histogram.high, histogram.total, histogram.width
        (-3.0, 1.0, 3, 0.0009765625)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent = SMALLEST_EXPONENT
        self.low = 0.0
        self.high = 0.0
        self.total = 0

    @property
    def width(self) -> float:
        """Width of a bin, in the unit of the values."""
        return 2.0**self.exponent / (BINS // 2)

    def edges(self) -> np.ndarray:
        """Left edges of the bins and the right edge of the last; shape (BINS + 1,), float64."""
        return np.arange(-BINS // 2, BINS // 2 + 1) * self.width

    def add(self, values: Tensor) -> None:
        """Count values of any shape.

        Raises:
            SettingError: NaN or infinity among them.
        """
        if not values.numel():
            return
        values = values.detach().cpu().double().flatten()
        low, high = (float(bound) for bound in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SettingError("NaN or infinite values have no histogram.")
        self.low, self.high = (min(self.low, low), max(self.high, high)) if self.total else (low, high)
        self.total += values.numel()
        # frexp: x = m · 2**e with m < 1, so that every value lies strictly below 2**e
        self._widen(max(math.frexp(abs(low))[1], math.frexp(abs(high))[1]))
        bins = torch.floor(values / self.width).int() + BINS // 2
        self.counts += torch.bincount(bins, minlength=BINS)

    def _widen(self, exponent: int) -> None:
        doublings = exponent - self.exponent
        if doublings <= 0:
            return
        bins = torch.arange(-BINS // 2, BINS // 2) >> min(doublings, 63)  # floor(k / 2**doublings)
        self.counts = torch.zeros_like(self.counts).index_add_(0, bins + BINS // 2, self.counts)
        self.exponent = exponent
