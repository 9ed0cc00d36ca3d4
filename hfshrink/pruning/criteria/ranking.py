"""From scores to masks: which weights or units go at a given sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.thresholds import (
    check_pattern,
    count_dropped,
    global_masks,
    global_thresholds,
    histogram_threshold,
    keep_largest,
)


def hidden_weights(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: str = "global",
    max_sparsity: float = 0.98,
    signed: bool = False,
) -> dict[str, Tensor]:
    """True for the weights that go: the lowest scores of all modules together, or of each.

    Exactly round(sparsity·n) of n weights go; of equal scores the last ones of a module first.

    Args:
        scores: Module name -> scores of the weight's shape.
        sparsity: Share that goes, in [0, 1).
        scope: "global" or "module".
        max_sparsity: With the global scope, what a module may lose.
        signed: Whether scores may be negative.

    Raises:
        SettingError: A module would lose all its weights, or the caps don't allow the sparsity.

    Example:
        >>> hidden_weights({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.25)
        {'a': tensor([ True, False]), 'b': tensor([False, False])}
    """
    if sparsity == 0:
        return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    sizes = {name: values.numel() for name, values in scores.items()}
    if scope == "global" and sparsity != max_sparsity:  # where all lose the most they may, rounding would not add up
        limits = global_thresholds(scores, sparsity, max_sparsity, signed=signed)
        most = {name: min(count_dropped(max_sparsity, size), size - 1) for name, size in sizes.items()}
        return _lowest(scores, limits, count_dropped(sparsity, sum(sizes.values())), most)
    most = {name: count_dropped(sparsity, size) for name, size in sizes.items()}
    for name, size in sizes.items():
        if most[name] == size:
            raise SettingError(f"sparsity {sparsity} leaves {name} empty: it has {size} weights. Keep at least one.")
    limits = {name: histogram_threshold([values], sparsity, signed=signed) for name, values in scores.items()}
    return _lowest(scores, limits, sum(most.values()), most)


def _lowest(
    scores: Mapping[str, Tensor], limits: Mapping[str, float], count: int, most: Mapping[str, int]
) -> dict[str, Tensor]:
    """True for `count` scores: those below the limits, then those that equal them, up to `most` of a module."""
    hidden = {name: values < limits[name] for name, values in scores.items()}
    below = {name: int(torch.count_nonzero(found)) for name, found in hidden.items()}
    missing = count - sum(below.values())
    for name, values in scores.items():
        room = min(missing, most[name] - below[name])
        if room > 0:
            equal = (values == limits[name]).nonzero()[-room:]
            hidden[name][tuple(equal.T)] = True
            missing -= len(equal)
    return hidden


def hidden_in_pattern(scores: Mapping[str, Tensor], pattern: tuple[int, int], share: float = 1.0) -> dict[str, Tensor]:
    """True for the weights that go in an N:M pattern; on the way there only in the cheapest groups of m.

    Args:
        scores: Module name -> scores (out, in), of at least 0.
        pattern: (n, m).
        share: Share of all groups of m neighbours that have the pattern, 0 to 1; a group costs what it loses.

    Example:
        >>> hidden_in_pattern({"a": torch.tensor([[1.0, 2.0, 9.0, 8.0]])}, (1, 2), share=0.5)
        {'a': tensor([[ True, False, False, False]])}
    """
    n, m = pattern
    hidden, costs = {}, {}
    for name, values in scores.items():
        check_pattern(n, m, values.shape[1])
        groups = values.unflatten(1, (-1, m))
        lowest = groups.argsort(dim=-1, stable=True)[..., : m - n]
        hidden[name] = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True)
        costs[name] = groups.gather(-1, lowest).sum(-1)
    if share < 1:
        sizes = {name: values.numel() for name, values in costs.items()}
        limit = histogram_threshold(list(costs.values()), share)
        chosen = _lowest(costs, dict.fromkeys(costs, limit), count_dropped(share, sum(sizes.values())), sizes)
        hidden = {name: found & chosen[name][..., None] for name, found in hidden.items()}
    return {name: found.flatten(1) for name, found in hidden.items()}


def kept_units(
    scores: Mapping[str, Tensor], sparsity: float, *, scope: str = "global", max_sparsity: float = 0.98
) -> dict[str, Tensor]:
    """True for the units that stay; each group keeps at least one.

    Args:
        scores: Group name -> scores (units,).
        sparsity: Share of the units that goes.
        scope: "global" ranks all groups together, "module" each by itself.
        max_sparsity: With the global scope, what a group may lose.

    Raises:
        SettingError: A group would lose all its units, or the caps don't allow the sparsity.

    Example:
        >>> kept_units({"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([2.0, 8.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    if scope == "global":
        return global_masks(scores, sparsity, max_sparsity)
    found = {name: keep_largest(values, sparsity) for name, values in scores.items()}
    for name, kept in found.items():
        if not bool(kept.any()):
            raise SettingError(
                f"sparsity {sparsity} leaves {name} empty: it has {len(kept)} units. Keep at least one."
            )
    return found
