"""Swap kept and dropped units of a group so that what is lost together weighs less."""

from __future__ import annotations

import torch
from torch import Tensor

from hfshrink.errors import SettingError


def lost_energy(gradients: Tensor, kept: Tensor) -> float:
    """Σ_samples (Σ_dropped g)² = dᵀ(GᵀG)d, d = 1 for dropped units (Kwon et al. 2022, arXiv:2204.09656, eq. 9).

    Off the diagonal of the Fisher information stand pairs: units that make up for each other cost less together.

    Args:
        gradients: G of unit masks, shape (samples, units).
        kept: Booleans (units,).

    Example:
        >>> lost_energy(torch.tensor([[1.0, -1.0, 3.0]]), torch.tensor([False, False, True]))
        0.0
    """
    return float(gradients.double()[:, ~kept].sum(dim=1).square().sum())


def rearrange_units(gradients: Tensor, kept: Tensor, *, passes: int = 10) -> Tensor:
    """Swap kept for dropped units, one pair at a time, as long as that lowers `lost_energy`.

    For each dropped unit in turn the best of all kept units takes its place, if any lowers the sum. The number of
    kept units stays.

    Args:
        gradients: G of unit masks, shape (samples, units).
        kept: Booleans (units,), where the search starts.
        passes: At most so many rounds over all dropped units.

    Returns:
        Booleans (units,).

    Raises:
        SettingError: Shapes that do not fit, or gradients that are no numbers.

    Example:
        >>> gradients = torch.tensor([[1.0, -1.1, 0.5]])
        >>> rearrange_units(gradients, torch.tensor([True, True, False])).tolist()
        [True, True, False]
        >>> rearrange_units(gradients, torch.tensor([True, False, False])).tolist()
        [False, False, True]
    """
    if gradients.ndim != 2 or kept.shape != gradients.shape[1:]:
        raise SettingError(
            f"Expected gradients (samples, units) and booleans (units,), got {tuple(gradients.shape)} and "
            f"{tuple(kept.shape)}."
        )
    if not bool(torch.isfinite(gradients).all()):
        raise SettingError(f"Gradients of {gradients.shape[1]} units hold NaN or infinite values.")
    g, kept = gradients.double(), kept.clone()
    fisher = g.T @ g
    coupling = fisher[:, ~kept].sum(dim=1)  # F d
    tolerance = 1e-12 * float(fisher.diagonal().sum())
    for _ in range(passes):
        before = kept.clone()
        for unit in (~kept).nonzero().flatten().tolist():
            coupling = _swap(fisher, coupling, kept, unit, tolerance)
        if torch.equal(before, kept):
            break
    return kept


def _swap(fisher: Tensor, coupling: Tensor, kept: Tensor, unit: int, tolerance: float) -> Tensor:
    """Keep `unit` instead of the best of the kept ones, if that lowers dᵀFd; `kept` changes in place.

    d' = d − e_i + e_j changes the sum by F_ii + F_jj − 2 F_ij − 2 (Fd)_i + 2 (Fd)_j.
    """
    diagonal = fisher.diagonal()
    change = diagonal[unit] + diagonal - 2 * fisher[unit] - 2 * coupling[unit] + 2 * coupling
    change = change.masked_fill(~kept, torch.inf)
    other = int(change.argmin())
    if not float(change[other]) < -tolerance:
        return coupling
    kept[unit], kept[other] = True, False
    return coupling - fisher[unit] + fisher[other]
