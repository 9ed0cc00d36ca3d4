"""From scores to masks: exact counts in one-shot pruning, thresholds by histogram in each step of training.

A mask is a bool tensor, True where a weight stays. Sparsity is the fraction that goes; of n scores round(sparsity·n)
go. Equal scores go by position, the last ones first, so that a mask does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from hfshrink.errors import SettingError

LOW_BITS = 15
"""A float32 has 32 bits: 17 of them choose the coarse bin, these the place in it."""

CHUNK = 2**18
"""Values per piece: 1 MB in float32."""


def count_dropped(sparsity: float, size: int) -> int:
    """round(sparsity·size): how many of `size` scores go.

    Raises:
        SettingError: `sparsity` is not in [0, 1).

    Example:
        >>> count_dropped(0.5, 7), count_dropped(0.29, 100)
        (4, 29)
    """
    if not 0 <= sparsity < 1:
        raise SettingError(f"sparsity must lie in [0, 1): 0.9 drops 90 %, got {sparsity}.")
    return round(sparsity * size)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the round(sparsity·n) smallest of n scores.

    Args:
        scores: Any shape; may be negative or infinite.
        sparsity: Fraction that goes, in [0, 1).

    Returns:
        Mask of the scores' shape.

    Raises:
        SettingError: A sparsity outside [0, 1), or NaN scores.

    Example:
        >>> keep_largest(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.25).tolist()
        [[True, True], [False, True]]
    """
    return keep_largest_per_row(scores.reshape(1, -1), sparsity).view(scores.shape)


def keep_largest_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the round(sparsity·in) smallest scores of each row.

    Args:
        scores: Shape (out, in).
        sparsity: Fraction that goes, in [0, 1).

    Returns:
        Mask of shape (out, in).

    Raises:
        SettingError: A sparsity outside [0, 1), NaN scores, or another shape.

    Example:
        >>> keep_largest_per_row(torch.tensor([[3.0, 1.0], [0.1, 0.2]]), 0.5).tolist()
        [[True, False], [False, True]]
    """
    if scores.ndim != 2:
        raise SettingError(f"Expected scores of shape (out, in), got {tuple(scores.shape)}.")
    return drop_smallest(scores, count_dropped(sparsity, scores.shape[1]))


def drop_smallest(scores: Tensor, count: int) -> Tensor:
    """The mask of each row without its `count` smallest scores, shape (out, in); of equal ones the last go.

    Raises:
        SettingError: NaN scores, or a count outside 0..in.

    Example:
        >>> drop_smallest(torch.tensor([[1.0, 1.0, 2.0]]), 1).tolist()
        [[True, False, True]]
    """
    _check_numbers(scores)
    if not 0 <= count <= scores.shape[1]:
        raise SettingError(f"Of {scores.shape[1]} scores per row 0..{scores.shape[1]} can go, got {count}.")
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    if bool((equal.sum(dim=1, keepdim=True) == missing).all()):
        return ~(below | equal)
    rank_from_end = equal.flip(1).cumsum(dim=1).flip(1)
    return ~(below | (equal & (rank_from_end <= missing)))


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest scores in each m consecutive inputs: 2:4 is the pattern of NVIDIA's sparse tensor cores.

    Args:
        scores: Shape (out, in).
        n: How many stay, in 1..m.
        m: Length of a group; it must divide the inputs.

    Returns:
        Mask of shape (out, in) with exactly n True in each group.

    Raises:
        SettingError: n outside 1..m, m that does not divide the inputs, another shape, or NaN scores.

    Example:
        >>> n_of_m_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4).tolist()
        [[False, True, True, False]]
    """
    if scores.ndim != 2:
        raise SettingError(f"Expected scores of shape (out, in), got {tuple(scores.shape)}.")
    check_pattern(n, m, scores.shape[1])
    _check_numbers(scores)
    groups = scores.reshape(-1, m)
    best = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    return mask.view(scores.shape)


def check_pattern(n: int, m: int, inputs: int) -> None:
    """Check that n of each m of `inputs` inputs can be kept.

    Raises:
        SettingError: n outside 1..m, or m that does not divide the inputs.
    """
    if not 1 <= n <= m:
        raise SettingError(f"N:M keeps N of M weights, 1 ≤ N ≤ M, got {n}:{m}.")
    if inputs % m:
        raise SettingError(
            f"{n}:{m} needs a number of inputs that {m} divides, got {inputs}. Exclude the module or choose another M."
        )


def global_masks(scores: Mapping[str, Tensor], sparsity: float, max_sparsity: float = 0.98) -> dict[str, Tensor]:
    """Keep all but the smallest scores of all modules together, and spare each module from being emptied.

    What the cap saves in one module is dropped elsewhere, so the total is exactly round(sparsity·n) of n scores.

    Args:
        scores: Module name -> scores of any shape, comparable between modules.
        sparsity: Fraction of all scores that goes, in [0, 1).
        max_sparsity: Largest fraction that goes in one module; one score at least stays in each.

    Returns:
        Module name -> mask.

    Raises:
        SettingError: No scores, NaN scores, a sparsity outside [0, 1), or one that the cap does not allow.

    Example:
        >>> masks = global_masks({"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([3.0, 4.0])}, 0.5, 0.5)
        >>> {name: mask.tolist() for name, mask in masks.items()}
        {'a': [False, True], 'b': [False, True]}
    """
    _check_cap(scores, sparsity, max_sparsity)
    guarded = []
    for name, given in scores.items():
        _check_numbers(given, name)
        protected = drop_smallest(given.reshape(1, -1), _most_dropped(given.numel(), max_sparsity)).flatten()
        guarded.append(given.flatten().float().masked_fill(protected, inf))
    kept = keep_largest(torch.cat(guarded), sparsity).split([given.numel() for given in scores.values()])
    return {name: mask.view(given.shape) for (name, given), mask in zip(scores.items(), kept, strict=True)}


def global_thresholds(
    scores: Mapping[str, Tensor], sparsity: float, max_sparsity: float = 0.98, *, signed: bool = False
) -> dict[str, float]:
    """What `global_masks` does, as one threshold per module and fast enough for every step of training.

    Args:
        scores: Module name -> scores, or weights, of any shape.
        sparsity: Fraction of all that goes, in [0, 1).
        max_sparsity: Largest fraction that goes in one module; one score at least stays in each.
        signed: Rank the values themselves (movement scores) instead of their magnitude |w|.

    Returns:
        Module name -> threshold: keep `scores >= threshold`, or `scores.abs() >= threshold`. All but the capped
        modules share one.

    Raises:
        SettingError: As `global_masks`.

    Example:
        >>> global_thresholds({"a": torch.tensor([0.1, -0.5]), "b": torch.tensor([-3.0, 4.0])}, 0.5, 0.5)
        {'a': 0.5, 'b': 4.0}
    """
    _check_cap(scores, sparsity, max_sparsity)
    for name, given in scores.items():
        _check_numbers(given, name)
    caps = {name: _most_dropped(given.numel(), max_sparsity) for name, given in scores.items()}
    left, free = count_dropped(sparsity, sum(given.numel() for given in scores.values())), dict(scores)
    found: dict[str, float] = {}
    while True:  # each round caps a module or ends
        threshold = _select(list(free.values()), left, signed)
        full = [name for name, given in free.items() if _count_below(given, threshold, signed) > caps[name]]
        if not full:
            return {name: found.get(name, threshold) for name in scores}
        for name in full:
            found[name] = _select([free.pop(name)], caps[name], signed)
            left -= caps[name]


def histogram_threshold(tensors: Sequence[Tensor], sparsity: float, *, signed: bool = False) -> float:
    """The smallest value that stays when round(sparsity·n) of n values go, without a sort.

    Two histograms over the bit patterns of float32, whose order is that of the numbers: the first finds the bin of
    2¹⁷ that holds the threshold, the second its place among the 2¹⁵ patterns of that bin. So it is exact whatever the
    distribution, in two passes and without a copy of all tensors. Halves are widened without loss, float64 is rounded.

    Args:
        tensors: Weights or scores of any shapes.
        sparsity: Fraction that goes, in [0, 1).
        signed: Rank the values themselves (movement scores) instead of their magnitude |w|.

    Returns:
        The threshold: `w.abs() >= threshold` (or `w >= threshold`) stays. Where several values equal it all of them
        stay; otherwise exactly round(sparsity·n) go.

    Raises:
        SettingError: No values, NaN, or a sparsity outside [0, 1).

    Example:
        >>> histogram_threshold([torch.tensor([0.5, -3.0]), torch.tensor([[1.0, -2.0]])], 0.5)
        2.0
    """
    for number, tensor in enumerate(tensors):
        _check_numbers(tensor, f"tensor {number}")
    size = sum(tensor.numel() for tensor in tensors)
    if not size:
        raise SettingError("A threshold needs at least one value, got none.")
    return _select(tensors, count_dropped(sparsity, size), signed)


def _select(tensors: Sequence[Tensor], rank: int, signed: bool) -> float:
    """The value with `rank` values below or equal to it in sorted order, rank 0 the smallest; inf behind the last."""
    if rank >= sum(tensor.numel() for tensor in tensors):
        return inf
    bins = 2 ** (32 - LOW_BITS)
    coarse = torch.zeros(bins, dtype=torch.long)
    for keys in _keys(tensors, signed):
        coarse += torch.bincount((keys >> LOW_BITS) + bins // 2, minlength=bins).cpu()
    high, rank = _locate(coarse, rank)
    fine = torch.zeros(2**LOW_BITS, dtype=torch.long)
    for keys in _keys(tensors, signed):
        inside = keys[(keys >> LOW_BITS) == high - bins // 2]
        fine += torch.bincount(inside & (2**LOW_BITS - 1), minlength=2**LOW_BITS).cpu()
    low, _ = _locate(fine, rank)
    key = torch.tensor([((high - bins // 2) << LOW_BITS) + low], dtype=torch.int32)
    return float(_flip_negative(key).view(torch.float32))


def _keys(tensors: Sequence[Tensor], signed: bool) -> Iterator[Tensor]:
    """int32 numbers in the order of the values, in flat chunks."""
    for chunk in _chunks(tensors):
        if signed:
            yield _flip_negative((chunk + 0.0).view(torch.int32))  # −0.0 + 0.0 = 0.0, which has another pattern
        else:
            yield chunk.abs().view(torch.int32)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """float32 values in pieces that stay in the processor's cache."""
    for tensor in tensors:
        for chunk in tensor.detach().flatten().split(CHUNK):
            yield chunk.float()


def _flip_negative(bits: Tensor) -> Tensor:
    """Turn the order of negative patterns, which fall where the floats rise; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the value of that rank, and its rank in the bin."""
    up_to = histogram.cumsum(dim=0)
    place = int(torch.searchsorted(up_to, rank, right=True))
    return place, rank - (int(up_to[place - 1]) if place else 0)


def _count_below(tensor: Tensor, threshold: float, signed: bool) -> int:
    counts = ((chunk if signed else chunk.abs()) < threshold for chunk in _chunks([tensor]))
    return sum(int(torch.count_nonzero(below)) for below in counts)


def _check_cap(scores: Mapping[str, Tensor], sparsity: float, max_sparsity: float) -> None:
    sizes = [given.numel() for given in scores.values()]
    if not sum(sizes):
        raise SettingError("There are no scores to rank: no module was selected.")
    most = sum(_most_dropped(size, max_sparsity) for size in sizes)
    if count_dropped(sparsity, sum(sizes)) > most:
        raise SettingError(
            f"sparsity {sparsity} can't be reached when no module may lose more than max_sparsity {max_sparsity}, nor "
            f"its last score: that leaves {most} of {sum(sizes)} that can go. Raise max_sparsity, or lower sparsity."
        )


def _most_dropped(size: int, max_sparsity: float) -> int:
    """How many of a module's scores may go: never the last one."""
    return min(count_dropped(max_sparsity, size), max(size - 1, 0))


def _check_numbers(scores: Tensor, name: str = "") -> None:
    if scores.numel() and bool(scores.amax().isnan()):  # amax hands NaN on
        where = f" of {name}" if name else ""
        raise SettingError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores{where} are NaN. "
            "Check the weights and the calibration data, or score in float32."
        )
