"""How many ranks each module gets: by one ratio, by a share of energy, or by a budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfshrink.errors import BudgetError, SettingError
from hfshrink.factorization.hulls import choose_points

NOISE = 1e-12
"""Share of a weight's energy that counts as none: float32 rounds the product of exact factors to about 1e-14."""

LEAST_SHARE = 0.9
"""What each module keeps at least, as a part of what one ratio for all would leave it. Shares of energy do not tell
how dear they are downstream: where they alone decide, modules are cut to almost nothing that the model needs."""


@dataclass(frozen=True)
class Size:
    """Parameters of one module, dense and factored; the same for linear layers and all forms of convolutions.

    Attributes:
        dense_parameters: Of the dense weight, m·n for shape (m, n).
        parameters_per_rank: What each rank costs, m + n.
        full_rank: Largest rank that the weight can have, min(m, n).

    Raises:
        SettingError: A number below 1.

    Example:
        >>> size = Size.of_matrix(24, 16)
        >>> size.break_even, size.largest_rank
        (9.6, 9)
    """

    dense_parameters: int
    parameters_per_rank: int
    full_rank: int

    def __post_init__(self) -> None:
        if min(self.dense_parameters, self.parameters_per_rank, self.full_rank) < 1:
            raise SettingError(f"A module's sizes must be at least 1, got {self}.")

    @classmethod
    def of_matrix(cls, out_features: int, in_features: int) -> Size:
        """The size of a weight of shape (out, in) as `up` (out, rank) and `down` (rank, in)."""
        return cls(out_features * in_features, out_features + in_features, min(out_features, in_features))

    @property
    def break_even(self) -> float:
        """The rank at which the factors have as many parameters as the weight, mn/(m+n)."""
        return self.dense_parameters / self.parameters_per_rank

    @property
    def largest_rank(self) -> int:
        """The largest rank that saves parameters; 0 where none does."""
        return min((self.dense_parameters - 1) // self.parameters_per_rank, self.full_rank)

    def ranks(self, multiple: int) -> range:
        """All ranks that save parameters, in steps of `multiple`; single ones where no multiple saves any."""
        step = multiple if multiple <= self.largest_rank else 1
        return range(step, self.largest_rank + 1, step)

    def parameters(self, rank: int | None) -> int:
        """The module's parameters at a rank; None means dense."""
        return self.dense_parameters if rank is None else rank * self.parameters_per_rank


class Allocation(dict[str, int | None]):
    """Module -> its rank, None where it stays dense, with the reasons why.

    Attributes:
        reasons: Module that stays dense -> why, with its break-even rank.
        parameters: Of all weights together, factored ones as both factors.
        error: Sum of the errors that were minimised; None where no budget was asked for.
    """

    def __init__(
        self,
        ranks: Mapping[str, int | None],
        sizes: Mapping[str, Size],
        reasons: Mapping[str, str],
        error: float | None = None,
    ) -> None:
        super().__init__(ranks)
        self.reasons, self.error = dict(reasons), error
        self.parameters = sum(sizes[name].parameters(rank) for name, rank in ranks.items())


def fixed_ranks(sizes: Mapping[str, Size], rank: int) -> Allocation:
    """The same rank for all modules; those that it would not make smaller stay dense.

    Args:
        sizes: Module -> its size.
        rank: Of each module, at least 1; not rounded.

    Raises:
        SettingError: No sizes, or a rank below 1.

    Example:
        >>> found = fixed_ranks({"wide": Size.of_matrix(24, 16), "thin": Size.of_matrix(8, 8)}, rank=6)
        >>> found, found.reasons
        ({'wide': 6, 'thin': None}, {'thin': 'rank 6 saves no parameters: break-even rank is 4'})
    """
    _check_sizes(sizes)
    _check_whole("rank", rank)
    ranks = {name: rank if rank <= size.largest_rank else None for name, size in sizes.items()}
    reasons = {
        name: f"rank {rank} saves no parameters: break-even rank is {sizes[name].break_even:g}"
        for name, found in ranks.items()
        if found is None
    }
    return Allocation(ranks, sizes, reasons)


def uniform_ranks(sizes: Mapping[str, Size], rank_ratio: float, multiple: int = 8) -> Allocation:
    """The same ratio ρ of kept to dense parameters for all modules: rank ⌊ρ · mn/(m+n)⌋, rounded down to a multiple.

    No rank is smaller than one multiple. Where a module is so small that no multiple saves parameters, single ranks
    are taken; where not even rank 1 does, it stays dense.

    Args:
        sizes: Module -> its size.
        rank_ratio: Kept parameters / dense parameters, in (0, 1).
        multiple: Of ranks, what the hardware likes.

    Raises:
        SettingError: No sizes, or a ratio or multiple out of range.

    Example:
        >>> uniform_ranks({"query": Size.of_matrix(768, 768), "up": Size.of_matrix(3072, 768)}, rank_ratio=0.5)
        {'query': 192, 'up': 304}
    """
    _check_sizes(sizes)
    _check_whole("multiple", multiple)
    if not _is_number(rank_ratio) or not 0 < rank_ratio < 1:
        raise SettingError(f"rank_ratio must lie between 0 and 1 (kept / dense parameters), got {rank_ratio!r}.")
    ranks = {name: allowed[0] for name, allowed in _options(sizes, multiple, rank_ratio).items()}
    return Allocation(ranks, sizes, {name: _too_small(sizes[name]) for name, rank in ranks.items() if rank is None})


def energy_ranks(
    tails: Mapping[str, Tensor], sizes: Mapping[str, Size], energy: float, multiple: int = 8
) -> Allocation:
    """The smallest rank that keeps a share e of each weight's energy, rounded up: tails[r] ≤ (1 − e) · tails[0].

    Args:
        tails: Module -> squared error left at rank 0..full_rank, shape (full_rank + 1,); the end may be missing
            beyond the largest rank that saves parameters.
        sizes: Module -> its size.
        energy: Share of the squared norm (weighted as the tails are) to keep, in (0, 1]; 1 keeps all but rounding.
        multiple: Of ranks.

    Raises:
        SettingError: No sizes, names or shapes that don't fit, tails that are no numbers, or a setting out of range.

    Example:
        >>> import torch
        >>> tails = torch.tensor([10.0, 1.0, 0.1, 0.0])
        >>> energy_ranks({"a": tails}, {"a": Size.of_matrix(9, 3)}, energy=0.9, multiple=1)
        {'a': 1}
    """
    curves = _checked_tails(tails, sizes, multiple)
    if not _is_number(energy) or not 0 < energy <= 1:
        raise SettingError(f"energy must be in (0, 1], the share of the squared norm to keep, got {energy!r}.")
    ranks: dict[str, int | None] = {}
    reasons = {}
    for name, errors in curves.items():
        size, allowed = sizes[name], (1 - energy + NOISE) * errors[0]
        ranks[name] = next((rank for rank in size.ranks(multiple) if errors[rank] <= allowed), None)
        if not size.largest_rank:
            reasons[name] = _too_small(size)
        elif ranks[name] is None:
            needed = next((rank for rank, error in enumerate(errors) if error <= allowed), size.full_rank)
            step = size.ranks(multiple).step
            reasons[name] = (
                f"{energy:.4g} of the energy needs rank {-(-needed // step) * step}, at or above the break-even rank "
                f"{size.break_even:g}"
            )
    return Allocation(ranks, sizes, reasons)


def budget_ranks(
    tails: Mapping[str, Tensor],
    sizes: Mapping[str, Size],
    max_parameters: int,
    multiple: int = 8,
    weights: Mapping[str, float] | None = None,
    least_share: float = LEAST_SHARE,
) -> Allocation:
    """Minimise Σ weight(m) · tails(m)[r(m)] over all ranks r with Σ parameters(m, r(m)) ≤ max_parameters.

    A module may also stay dense: error 0 at its dense parameters. Ranks that lie above the line between two others
    of the curve (parameters, error) are taken only to use up what is left: near break-even, staying dense is often
    the better bargain. Every module gets one multiple of ranks first, or the part `least_share` of what one ratio for
    all would give it; then the step that saves most error per parameter goes first, along the convex hull of each
    curve, and what is left is spent by dynamic programming. The result is the best of its size, or within one step of
    it; with `least_share` 0 a larger budget never gives a larger error.

    Errors are added up over modules, so their tails must be comparable: see `comparable_tails`.

    Args:
        tails: Module -> squared error left at rank 0..full_rank, shape (full_rank + 1,); the end may be missing
            beyond the largest rank that saves parameters.
        sizes: Module -> its size.
        max_parameters: Of all these modules' weights together.
        multiple: Of ranks.
        weights: Module -> factor of its error; None means 1.
        least_share: In [0, 1]; halved until the budget allows for it, where ranks are few. Take less than the default
            where tails or weights are in units of the loss.

    Raises:
        SettingError: No sizes, names or shapes that don't fit, tails or weights that are no numbers, a setting out of
            range.
        BudgetError: Not even the smallest ranks fit; the message tells the least that is possible.

    Example:
        >>> import torch
        >>> tails = {"steep": torch.tensor([10.0, 1.0, 0.1, 0.0]), "flat": torch.tensor([10.0, 7.0, 3.5, 0.0])}
        >>> found = budget_ranks(tails, dict.fromkeys(tails, Size.of_matrix(9, 3)), max_parameters=39, multiple=1)
        >>> found, found.parameters, found.error
        ({'steep': 1, 'flat': None}, 39, 1.0)
        >>> found.reasons
        {'flat': 'worth its parameters: rank 2 would save 3 and lose 0.35 of its energy; break-even rank is 2.25'}
    """
    curves = _checked_tails(tails, sizes, multiple)
    _check_whole("max_parameters", max_parameters)
    factors = _checked_weights(weights, sizes)
    if not _is_number(least_share) or not 0 <= least_share <= 1:
        raise SettingError(f"least_share must be in [0, 1], got {least_share!r}.")
    dense = sum(size.dense_parameters for size in sizes.values())
    least = _parameters(_options(sizes, multiple, 0.0), sizes)
    if max_parameters < least:
        raise BudgetError(
            f"max_parameters={max_parameters:,} can't be reached: at rank {multiple} everywhere {len(sizes)} modules "
            f"keep {least:,} of {dense:,} parameters, the fewest with a rank_multiple of {multiple}. Allow at least "
            f"{least:,}{', take a smaller multiple' if multiple > 1 else ''} or include more modules."
        )
    ratio = least_share * min(max_parameters / dense, 1)
    while _parameters(options := _options(sizes, multiple, ratio), sizes) > max_parameters:
        ratio /= 2
    points = [
        [(sizes[n].parameters(rank), 0.0 if rank is None else factors[n] * curves[n][rank]) for rank in options[n]]
        for n in sizes
    ]
    chosen = dict(zip(sizes, choose_points(points, max_parameters), strict=True))
    ranks = {name: options[name][position] for name, position in chosen.items()}
    error = math.fsum(curve[position][1] for curve, position in zip(points, chosen.values(), strict=True))
    reasons = {name: _not_worth(sizes[name], curves[name], multiple) for name, rank in ranks.items() if rank is None}
    return Allocation(ranks, sizes, reasons, error)


def _options(sizes: Mapping[str, Size], multiple: int, ratio: float) -> dict[str, list[int | None]]:
    """Module -> the ranks that it may get, rising, none of them below that of a ratio; None at the end is dense."""
    options: dict[str, list[int | None]] = {}
    for name, size in sizes.items():
        steps = size.ranks(multiple)
        first = math.floor(ratio * size.break_even + 1e-9) // steps.step
        options[name] = [*steps[min(max(first, 1), len(steps)) - 1 :], None] if steps else [None]
    return options


def _parameters(options: Mapping[str, list[int | None]], sizes: Mapping[str, Size]) -> int:
    """Of all modules at their first option."""
    return sum(size.parameters(options[name][0]) for name, size in sizes.items())


def _check_sizes(sizes: Mapping[str, Size]) -> None:
    if not sizes:
        raise SettingError("There is no module to give ranks to: sizes is empty.")


def _check_whole(name: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, got {number!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_tails(tails: Mapping[str, Tensor], sizes: Mapping[str, Size], multiple: int) -> dict[str, list[float]]:
    """The tails as lists that never rise; what is only rounding counts as 0."""
    _check_sizes(sizes)
    _check_whole("multiple", multiple)
    if set(tails) != set(sizes):
        raise SettingError(f"tails and sizes must name the same modules, got {sorted(tails)} and {sorted(sizes)}.")
    curves = {}
    for name, size in sizes.items():
        found = tails[name].detach().double().cpu()
        if found.ndim != 1 or not size.largest_rank < len(found) <= size.full_rank + 1:
            raise SettingError(
                f"The tails of {name} must have shape ({size.full_rank + 1},), for rank 0..{size.full_rank} (or at "
                f"least up to {size.largest_rank}), got {tuple(found.shape)}."
            )
        if not bool(found.isfinite().all()):
            raise SettingError(f"The tails of {name} have NaN or infinite values. Check its weight and statistics.")
        noise = NOISE * float(found[0])
        last = float(found[size.full_rank]) if len(found) > size.full_rank else 0.0
        if last > noise or bool((found < -noise).any() or (found.diff() > noise).any()):
            raise SettingError(
                f"The tails of {name} must fall from the weight's energy at rank 0 to 0 at rank {size.full_rank}, got "
                f"{float(found[0]):.4g} … {float(found[-1]):.4g}."
            )
        curves[name] = found.cummin(0).values.where(found > noise, 0.0).tolist()
    return curves


def _checked_weights(weights: Mapping[str, float] | None, sizes: Mapping[str, Size]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(sizes, 1.0)
    if set(weights) != set(sizes):
        raise SettingError(f"weights and sizes must name the same modules, got {sorted(weights)} and {sorted(sizes)}.")
    for name, weight in weights.items():
        if not _is_number(weight) or weight < 0:
            raise SettingError(f"The weight of {name} must be a number of at least 0, got {weight!r}.")
    return {name: float(weights[name]) for name in sizes}


def _too_small(size: Size) -> str:
    return f"no rank saves parameters: break-even rank is {size.break_even:.3g}"


def _not_worth(size: Size, errors: list[float], multiple: int) -> str:
    if not size.largest_rank:
        return _too_small(size)
    rank = size.ranks(multiple)[-1]
    saved, lost = size.dense_parameters - size.parameters(rank), errors[rank] / errors[0]
    return (
        f"worth its parameters: rank {rank} would save {saved:,} and lose {lost:.3g} of its energy; "
        f"break-even rank is {size.break_even:g}"
    )
