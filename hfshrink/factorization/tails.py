"""The exact error that each rank leaves in each module: as a table, and as what ranks are allocated by."""

from __future__ import annotations

import math
import statistics as averages
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError
from hfshrink.factorization.allocation import Size, uniform_ranks
from hfshrink.factorization.factors import Decomposition, decompose
from hfshrink.factorization.sites import check_is_model, factorable, matrix, size_of
from hfshrink.loading import load
from hfshrink.sensitivity import Sensitivity, SensitivityRow
from hfshrink.terminal import progress

WEIGHTINGS = ("none", "fisher", "activation", "fisher+activation")
LEVELS = (0.9, 0.7, 0.5, 0.3)

LEAST_WEIGHT = 0.01
"""Share of the median below which a measured weight counts as noise."""


def factor_errors(
    model: Any,
    levels: Sequence[float] = LEVELS,
    *,
    weighting: str = "none",
    statistics: Mapping[str, ModuleStatistics] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] | None = None,
) -> Sensitivity:
    """The share of each module's squared norm that the best factors of some rank ratios lose, exactly.

    ‖D (W − W_r) S‖² / ‖D W S‖², with r = ⌊ρ · mn/(m+n)⌋ for a ratio ρ, D and S the weightings of `decompose`; with
    "activation" that is the share of the module's output energy. No data is run: the spectrum's tail is the error.

    Args:
        model: Any module, a folder or a Hub id.
        levels: Rank ratios (kept / dense parameters) in (0, 1]; at 1 a module stays as it is.
        weighting: "none", "fisher", "activation" or "fisher+activation".
        statistics: Module -> what `collect_statistics` found; needed by all weightings but "none". Modules without are
            left out.
        include: Wildcards of module names.
        exclude: Wildcards of names to leave out; None means the task head. Tied weights are left out in any case.

    Returns:
        A table to print, `plot` or rank by `best_first`; its rises are the shares, in [0, 1].

    Raises:
        SettingError: An unknown weighting, a level out of range, missing statistics, a wildcard without match, nothing
            to factor, or weights that are no numbers.
        UnsupportedModelError: An export, or quantized weights.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> model[0].weight.data = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        >>> print(factor_errors(model, levels=(1.0, 0.5)))
        share of squared norm lost, factorize, weighting none
        | place | 1      | 0.5    |
        |-------|--------|--------|
        | 0     | 0.0000 | 0.3333 |
    """
    check_weighting(weighting, statistics)
    strengths = checked_levels(levels)
    if not isinstance(model, nn.Module):
        model, _ = load(model)
    check_is_model(model)
    places = factor_places(model, weighting, statistics, include, exclude)
    rows = []
    for name, module in progress(places.items(), "factor errors", total=len(places)):
        tails = decompose_module(name, module, weighting, statistics).tails
        for level in strengths:
            share = _share(tails, trial_rank(name, size_of(module), level))
            rows.append(SensitivityRow(name, level, share, share))
    return Sensitivity(f"factorize, weighting {weighting}", 0.0, 0, tuple(rows), "error")


def comparable_tails(
    tails: Mapping[str, Tensor],
    weighting: str,
    input_energy: Mapping[str, float] | None = None,
    row_energy: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Tails that may be added up over modules, for `budget_ranks`.

    - With gradients, in units of the loss. To second order the loss rises by ½ Σ_ij F_ij e_ij² where e = W − W_r and F
      is the Fisher information. With F_ij ≈ w_i² G_jj / tr(G) for row weights w_i² = Σ_j F_ij and inputs of Gram
      matrix G, and the whole of G for its diagonal (K-FAC, arXiv:1503.05671), this is tail / (2 tr(G)) where the tail
      is weighted by w ("fisher", "fisher+activation"), and mean(w²) · tail / (2 tr(G)) where it isn't. Without a Gram
      matrix G = I and tr(G) is the number of inputs. The factor ½ and the number of examples are the same for all
      modules and left out.
    - Without: tails[r] / tails[0], the share of the module's energy (or of its output's) that is lost. What a unit of
      output error costs downstream is unknown then, so all modules count alike, which may do no better than one ratio
      for all.

    Args:
        tails: Module -> squared error left at rank 0, 1, …, weighted.
        weighting: What they were weighted by.
        input_energy: Module -> tr(G), or its number of input features without a Gram matrix; needed with gradients.
        row_energy: Module -> mean(w²) = Σ_ij F_ij / rows, for "none" and "activation"; None knows no gradients.

    Raises:
        SettingError: An unknown weighting, or an energy that is missing for a module or out of range.

    Example:
        >>> import torch
        >>> comparable_tails({"a": torch.tensor([8.0, 2.0, 0.0])}, "none")["a"].tolist()
        [1.0, 0.25, 0.0]
        >>> comparable_tails({"a": torch.tensor([8.0, 2.0, 0.0])}, "fisher", {"a": 4})["a"].tolist()
        [2.0, 0.5, 0.0]
        >>> comparable_tails({"a": torch.tensor([8.0, 2.0, 0.0])}, "activation", {"a": 4}, {"a": 3})["a"].tolist()
        [6.0, 1.5, 0.0]
    """
    if weighting not in WEIGHTINGS:
        raise SettingError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    scaled = {}
    for name, found in tails.items():
        factor = 1 / (float(found[0]) or 1.0)
        if "fisher" in weighting or row_energy is not None:
            inputs = float((input_energy or {}).get(name, math.nan))
            rows = 1.0 if "fisher" in weighting else float((row_energy or {}).get(name, math.nan))
            if not 0 < inputs < math.inf:
                raise SettingError(f"input_energy of {name} must be above 0 for {weighting!r}, got {inputs!r}.")
            if not 0 <= rows < math.inf:
                raise SettingError(f"row_energy of {name} must be at least 0, got {rows!r}.")
            factor = rows / inputs
        scaled[name] = found.double() * factor
    return scaled


def measured_weights(found: Sensitivity, tails: Mapping[str, Tensor], sizes: Mapping[str, Size]) -> dict[str, float]:
    """Module -> loss rise per unit of its tail, as weights for `budget_ranks`: w = Σ rise · tail / Σ tail².

    That is the least-squares line through 0 and all measured levels. A rise that is no number is left out; a weight
    below a hundredth of the median is noise and raised to that.

    Args:
        found: From `measure_sensitivity` with `perturbation` of this room; its places name all modules of `tails`.
        tails: Module -> squared error left at rank 0, 1, …; give the same to `budget_ranks`.
        sizes: Module -> its size.

    Raises:
        SettingError: A module was not measured, no rise of it is a number, or no rise at all lies above 0.

    Example:
        >>> import torch
        >>> rows = (SensitivityRow("a", 0.5, 1.3, 0.3), SensitivityRow("b", 0.5, 1.1, 0.1))
        >>> tails = dict.fromkeys("ab", torch.tensor([10.0, 5.0, 0.0, 0.0]))
        >>> measured_weights(Sensitivity("", 1.0, 8, rows), tails, dict.fromkeys("ab", Size(9, 3, 3)))
        {'a': 0.06, 'b': 0.02}
    """
    missing = sorted(set(tails) - set(found.places))
    if missing:
        measured = ", ".join(found.places[:6])
        raise SettingError(f"{missing[0]} was not measured, and {len(missing) - 1} more; measured: {measured}.")
    weights = {}
    for name, tail in tails.items():
        pairs = []
        for level in found.levels:
            rise = found.rise(name, level)
            rank = trial_rank(name, sizes[name], level)
            if rise is not None and rank is not None:
                pairs.append((rise, float(tail[rank])))
        square = sum(error**2 for _, error in pairs)
        if not pairs:
            raise SettingError(f"No loss rise of {name} is a number. Take larger rank ratios as levels.")
        weights[name] = sum(rise * error for rise, error in pairs) / square if square else 0.0
    positive = [weight for weight in weights.values() if weight > 0]
    if not positive:
        raise SettingError("No measured loss rises above the dense one: it is all noise. Take more samples.")
    least = LEAST_WEIGHT * averages.median(positive)
    return {name: max(weight, least) for name, weight in weights.items()}


def check_weighting(weighting: str, statistics: Mapping[str, ModuleStatistics] | None) -> None:
    """Refuse an unknown weighting, and one without the statistics that it needs.

    Raises:
        SettingError: As said.
    """
    if weighting not in WEIGHTINGS:
        raise SettingError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    if weighting != "none" and not statistics:
        fields = " and ".join(_fields(weighting))
        raise SettingError(
            f"weighting={weighting!r} needs statistics with {fields} of each module, got {statistics!r}. "
            "collect_statistics gives them."
        )


def checked_levels(levels: Any) -> list[float]:
    """Rank ratios, each once.

    Raises:
        SettingError: None, or one that is not in (0, 1].
    """
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise SettingError(f"levels must be a list of rank ratios in (0, 1], got {levels!r}.")
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level <= 1:
            raise SettingError(f"A level must be a rank ratio (kept / dense parameters) in (0, 1], got {level!r}.")
    return list(dict.fromkeys(levels))


def factor_places(
    model: nn.Module,
    weighting: str,
    statistics: Mapping[str, ModuleStatistics] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] | None = (),
) -> dict[str, nn.Module]:
    """The modules of `factorable` that a rank makes smaller, with the statistics that the weighting needs.

    Raises:
        SettingError: There is none, or see `factorable`.
        UnsupportedModelError: Quantized weights.
    """
    chosen, _ = factorable(model, include, exclude)
    known = statistics or {}
    found = {
        name: module
        for name, module in chosen.items()
        if size_of(module).largest_rank
        and all(getattr(known.get(name), field, None) is not None for field in _fields(weighting))
    }
    if not found:
        raise SettingError(
            f"None of {len(chosen)} modules can be factored with weighting={weighting!r}: each is too small, or has "
            f"no statistics; there are some for {', '.join(list(known)[:6]) or 'none'}."
        )
    return found


def decompose_module(
    name: str, module: nn.Module, weighting: str, statistics: Mapping[str, ModuleStatistics] | None = None
) -> Decomposition:
    """The decomposition of a module's weight as (out, in), weighted; convolutions in the form "channel".

    All tails, and the factors of all ranks that save parameters.

    Raises:
        SettingError: What `decompose` says, with the module's name.
    """
    collected = (statistics or {}).get(name, ModuleStatistics())
    squares, row_weight = collected.squared_gradient, None
    if "fisher" in weighting and squares is not None:
        row_weight = matrix(module, squares).double().sum(dim=1).sqrt()
    input_gram = collected.input_gram if "activation" in weighting else None
    try:
        return decompose(matrix(module), size_of(module).largest_rank, row_weight=row_weight, input_gram=input_gram)
    except SettingError as error:
        raise SettingError(f"{error} ({name})") from None


def trial_rank(name: str, size: Size, level: float) -> int | None:
    """The rank of a module at a rank ratio; None where it stays as it is."""
    return None if level >= 1 else uniform_ranks({name: size}, level, 1)[name]


def _share(tails: Tensor, rank: int | None) -> float:
    whole = float(tails[0])
    return 0.0 if rank is None or whole == 0 else float(tails[rank]) / whole


def _fields(weighting: str) -> list[str]:
    """Fields of `ModuleStatistics` that a weighting reads."""
    fields = {"fisher": "squared_gradient", "activation": "input_gram"}
    return [fields[part] for part in weighting.split("+") if part in fields]
