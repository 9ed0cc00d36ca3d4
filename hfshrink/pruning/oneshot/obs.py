"""Optimal Brain Surgeon on one layer: remove weights, and let those that stay make up for them (SparseGPT)."""

from __future__ import annotations

import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.thresholds import check_pattern, count_dropped, drop_smallest, n_of_m_mask

BLOCK = 128
"""Columns whose mask is chosen together: the paper's choice."""


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ U and H = 2 Σ xxᵀ + λI (Frantar & Alistarh, arXiv:2301.00774).

    Row j of U holds all that removing column j needs once the columns before it are settled: with H_j the part of H
    from j on, U_jj² = [H_j⁻¹]₀₀ and U_j,j: / U_jj is the first row of H_j⁻¹ over its first entry.

    Args:
        gram: Σ xxᵀ over the calibration inputs, shape (in, in).
        damping: λ as a fraction of the mean diagonal of 2 Σ xxᵀ.

    Returns:
        Shape (in, in), float64.

    Raises:
        SettingError: Not a square matrix of numbers, or `damping` not above 0.

    Example:
        >>> inverse_factor(torch.tensor([[1.0]]), damping=1.0).tolist()
        [[0.5]]
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(gram.isfinite().all()):
        raise SettingError(f"Expected a finite Gram matrix (in, in), got shape {tuple(gram.shape)} or NaN values.")
    if not damping > 0:
        raise SettingError(f"damping must be above 0, else features that never fire make H singular, got {damping}.")
    hessian = 2 * gram.double()
    mean = float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping * (mean or 1.0))  # without any input there is nothing to weigh against
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | tuple[int, int],
    *,
    block_size: int = BLOCK,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Remove weights column by column, each time moving the later columns so that W x changes the least.

    Frantar & Alistarh, arXiv:2301.00774. Column j of a row loses w_j; the error (w_j − 0) / U_jj times U_j,j: is taken
    from the columns from j on (`inverse_factor`). The score w_j² / U_jj² is that update's cost. The mask is chosen
    once per block of columns, over all rows, from weights that carry the updates so far.

    Args:
        weight: Shape (out, in).
        gram: Σ xxᵀ over the layer's inputs, shape (in, in).
        sparsity: Fraction that goes, in [0, 1), spread evenly over the blocks; or (n, m): n of each m consecutive
            inputs stay.
        block_size: Columns per block; for N:M the multiple of m at or below it, or m.
        damping: See `inverse_factor`.

    Returns:
        The new weight, float64, and its mask, True where a weight stays; both (out, in).

    Raises:
        SettingError: Shapes that do not fit, a sparsity or pattern out of range, `block_size` below 1.

    Example:
        >>> weight, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), torch.ones(2, 2), 0.5, damping=1e-6)
        >>> mask.tolist(), [round(w, 3) for w in weight[0].tolist()]
        ([[False, True]], [0.0, 3.0])
    """
    rows, columns = weight.shape
    if gram.shape != (columns, columns) or block_size < 1:
        raise SettingError(
            f"A weight of shape {tuple(weight.shape)} needs a Gram matrix ({columns}, {columns}) and a block_size of "
            f"at least 1, got {tuple(gram.shape)} and {block_size}."
        )
    if isinstance(sparsity, tuple):
        check_pattern(*sparsity, columns)
        block_size = max(block_size // sparsity[1], 1) * sparsity[1]
    else:
        count_dropped(sparsity, columns)
    factor = inverse_factor(gram, damping)
    scale = factor.diagonal().masked_fill(gram.diagonal() == 0, torch.inf)  # what never fires costs nothing
    result = weight.detach().double().clone()
    mask = torch.ones_like(result, dtype=torch.bool)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        if not isinstance(sparsity, tuple):
            costs = (result[:, start:end] / scale[start:end]).square()
            going = count_dropped(sparsity, rows * end) - count_dropped(sparsity, rows * start)
            mask[:, start:end] = drop_smallest(costs.reshape(1, -1), going).view(costs.shape)
        groups = (scale[start:end], *sparsity) if isinstance(sparsity, tuple) else None
        errors = _settle(result[:, start:end], mask[:, start:end], factor[start:end, start:end], groups)
        result[:, end:] -= errors @ factor[start:end, end:]
    return result, mask


def _settle(block: Tensor, mask: Tensor, factor: Tensor, groups: tuple[Tensor, int, int] | None) -> Tensor:
    """Zero a block's dropped weights and update its later ones in place; the errors (out, columns) for the rest.

    With `groups`, (scale, n, m), the mask of each group is chosen when its first column is reached.
    """
    errors = torch.zeros_like(block)
    for column in range(block.shape[1]):
        if groups is not None and column % groups[2] == 0:
            scale, n, m = groups
            group = slice(column, column + m)
            mask[:, group] = n_of_m_mask((block[:, group] / scale[group]).square(), n, m)
        error = block[:, column].masked_fill(mask[:, column], 0) / factor[column, column]
        block[:, column:] -= torch.outer(error, factor[column, column:])
        block[:, column].masked_fill_(~mask[:, column], 0)  # the update gives zero but for rounding
        errors[:, column] = error
    return errors
