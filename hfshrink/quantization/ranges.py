"""From values to integers: scales and zero points, and which range of a tensor to spread the integers over."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.histograms import Histogram

CANDIDATES = 128
"""Clippings that "entropy" and "mse" try, evenly spaced up to the largest absolute value."""


def affine_scale(low: float, high: float, *, bits: int = 8, name: str = "the tensor") -> tuple[float, int]:
    """Scale s and zero point z of unsigned integers q: x ≈ s·(q − z), 0 ≤ q < 2**bits (arXiv:1712.05877, section 2.1).

    The range is widened to hold 0, which becomes an integer exactly: padding and ReLU stay exact.

    Args:
        low: Smallest value.
        high: Largest value.
        bits: Width of the integers.
        name: Of the tensor, for the message.

    Returns:
        The scale (a float32 number) and the zero point. A range of nothing but 0 has the scale 1.

    Raises:
        SettingError: A bound is NaN or infinite, or `low` lies above `high`.

    Example:
        >>> affine_scale(-1.0, 1.55)
        (0.009999999776482582, 100)
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise SettingError(f"The range of {name} must be finite and in order, got ({low}, {high}).")
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = float(np.float32((high - low) / levels))
    if scale < np.finfo(np.float32).tiny:
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), levels)


def symmetric_scale(weight: Tensor, axis: int | None = None, *, bits: int = 8, name: str = "the weight") -> Tensor:
    """Scales s = max|w| / (2**(bits − 1) − 1) of signed integers with zero point 0 (arXiv:2004.09602, section 3.1.2).

    Args:
        weight: Any shape.
        axis: The axis of the output channels, each with a scale of its own; None gives one for all.
        bits: Width of the integers; 7 keeps sums of products small on processors without VNNI.
        name: Of the weight, for the message.

    Returns:
        Shape (channels,) or (), float32. Channels of nothing but 0 have the scale 1.

    Raises:
        SettingError: NaN or infinity in the weight.

    Example:
        >>> symmetric_scale(torch.tensor([[1.27, -2.54], [0.0, 0.0]]), axis=0)
        tensor([0.0200, 1.0000])
    """
    values = weight.detach().abs().double()
    largest = values.amax() if axis is None else values.movedim(axis, 0).flatten(1).amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise SettingError(f"{name} has NaN or infinite values; no scale fits them.")
    scale = (largest / (2 ** (bits - 1) - 1)).float()
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def choose_range(
    histogram: Histogram, method: str, *, bits: int = 8, symmetric: bool = False, percentile: float = 99.99
) -> tuple[float, float]:
    """The range of a tensor that the integers are spread over; what lies outside is clipped.

    - "min-max": all values.
    - "percentile": the middle `percentile` % of the values, or of the absolute values where symmetric
      (arXiv:2004.09602, section 4.2).
    - "entropy": the clipping whose quantized distribution differs least from that of the values, by KL(P‖Q)
      (Migacz, 8-bit inference with TensorRT, 2017).
    - "mse": the clipping with the smallest expected squared error of clipping and rounding (arXiv:1810.05723).

    Args:
        histogram: Of the values.
        method: One of the above.
        bits: Width of the integers.
        symmetric: Whether the range must reach as far below 0 as above.
        percentile: In (0, 100]; only "percentile" reads it.

    Returns:
        Lower and upper bound, with 0 between or on them.

    Raises:
        SettingError: Unknown method, a percentile out of range, or no values.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(torch.arange(100.0))
        >>> choose_range(histogram, "min-max")
        (0.0, 99.0)
    """
    if method not in RANGE_METHODS:
        raise SettingError(f"ranges must be one of {', '.join(RANGE_METHODS)}, got {method!r}.")
    if not 0 < percentile <= 100:
        raise SettingError(f"percentile must be in (0, 100], got {percentile}.")
    if not histogram.total:
        raise SettingError("An empty histogram has no range.")
    if method == "percentile":
        low, high = _percentile(histogram, percentile, symmetric)
    elif method == "min-max" or histogram.low == histogram.high:
        low, high = histogram.low, histogram.high
    else:
        low, high = _search(histogram, _LOSSES[method], bits, symmetric)
    low, high = min(low, 0.0), max(high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def quantile(histogram: Histogram, fraction: float) -> float:
    """The value below which `fraction` of the values lie, evenly spread within its bin; exact at 0 and 1."""
    target = fraction * histogram.total
    if target <= 0:
        return histogram.low
    counts = histogram.counts.numpy()
    reached = np.cumsum(counts)
    place = min(int(np.searchsorted(reached, target)), int(np.flatnonzero(counts)[-1]))
    inside = (target - (reached[place] - counts[place])) / counts[place]
    found = float(histogram.edges()[place] + inside * histogram.width)
    return min(max(found, histogram.low), histogram.high)


def _percentile(histogram: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        folded = Histogram()
        folded.exponent, folded.total = histogram.exponent, histogram.total
        folded.high = max(abs(histogram.low), abs(histogram.high))
        half = len(histogram.counts) // 2
        folded.counts[half:] = histogram.counts[half:] + histogram.counts[:half].flip(0)
        largest = quantile(folded, percentile / 100)
        return -largest, largest
    cut = (1 - percentile / 100) / 2
    return quantile(histogram, cut), quantile(histogram, 1 - cut)


def clippings(histogram: Histogram, symmetric: bool = False) -> list[tuple[float, float]]:
    """Ranges to try: the values' own, and those cut at i/`CANDIDATES` of the largest absolute value."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    largest = max(-low, high)
    low, high = (-largest, largest) if symmetric else (low, high)
    cuts = [largest * step / CANDIDATES for step in range(CANDIDATES, 0, -1)]
    return list(dict.fromkeys((max(low, -cut), min(high, cut)) for cut in cuts))


def _search(histogram: Histogram, loss: Callable[..., float], bits: int, symmetric: bool) -> tuple[float, float]:
    """The candidate with the smallest loss; of equal ones the widest."""
    used = np.flatnonzero(histogram.counts.numpy())
    inside = slice(used[0], used[-1] + 1)
    counts = histogram.counts.numpy()[inside].astype(float)
    centres = (histogram.edges()[:-1] + histogram.width / 2)[inside]
    candidates = clippings(histogram, symmetric)
    losses = [loss(counts, centres, histogram.width, *candidate, bits) for candidate in candidates]
    return candidates[int(np.argmin(losses))]


def _squared_error(counts: np.ndarray, centres: np.ndarray, width: float, low: float, high: float, bits: int) -> float:
    """Σ counts · (x − q(x))², x the middle of a bin and q(x) its value after clipping and rounding."""
    scale, zero_point = affine_scale(low, high, bits=bits)
    codes = np.clip(np.round(centres / scale) + zero_point, 0, 2**bits - 1)
    return float(counts @ (centres - (codes - zero_point) * scale) ** 2)


def _divergence(counts: np.ndarray, centres: np.ndarray, width: float, low: float, high: float, bits: int) -> float:
    """KL(P‖Q): P the clipped values, Q what is left of those inside when 2**bits levels share their bins.

    What is clipped belongs to P's outermost bins but not to Q's, which makes clipping dear.
    """
    inside = np.flatnonzero((centres > low) & (centres < high))
    if len(inside) < 2**bits:  # fewer bins than levels: the histogram can't tell what rounding costs
        return math.inf
    first, last = inside[0], inside[-1] + 1
    kept = counts[first:last]
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    levels = np.arange(len(kept)) * 2**bits // len(kept)
    used = kept > 0
    sums, sizes = np.bincount(levels, kept), np.bincount(levels, used)
    shared = np.where(used, sums[levels] / np.maximum(sizes[levels], 1), 0.0)
    p, q = clipped / clipped.sum(), shared / max(shared.sum(), 1.0)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))))


_LOSSES: dict[str, Callable[..., float]] = {"entropy": _divergence, "mse": _squared_error}
RANGE_METHODS = ("min-max", "percentile", *_LOSSES)
