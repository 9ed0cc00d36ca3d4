"""Low-rank factors of a convolution's weight (out, in, height, width): by channels, separable in space, and Tucker-2.

What follows one another replaces one convolution without a bias; the bias goes to the last stage.

| form | stages | strides, zero padding and dilation |
|---|---|---|
| channel | down (rank, in, h, w), then up (out, rank) as 1×1 | all with down |
| separable | vertical (rank, in, h, 1), then horizontal (out, rank, 1, w) | each stage those of its direction |
| tucker | first (in_rank, in, 1, 1), core (out_rank, in_rank, h, w), last (out, out_rank, 1, 1) | all with core |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.factorization.factors import check_weight

SWEEPS = 4
"""HOOI sweeps after HOSVD: within 0.5 % of the error after 30 on random weights, 1e-6 where the energy decays."""

EXACT = 1 + 1e-12
"""Keeps a product that is a whole number in decimals from falling below it in binary."""


def channel_kernels(up: Tensor, down: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W[o, i, y, x] ≈ Σ_r up[o, r] down[r, i, y, x], from factors of the matrix (out, in · h · w).

    Denton et al., arXiv:1404.0736, and Zhang et al., arXiv:1505.06798 (there with the responses' Gram matrix).

    Args:
        up: Shape (out, rank).
        down: Shape (rank, in · h · w).
        shape: (out, in, h, w) of the convolution.

    Returns:
        `up` as it is, and `down` as (rank, in, h, w).
    """
    return up, down.reshape(-1, *shape[1:])


def separable_kernels(up: Tensor, down: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W[o, i, y, x] ≈ Σ_r vertical[r, i, y] horizontal[o, r, x], from factors of M[(i, y), (o, x)] = W[o, i, y, x].

    Jaderberg et al., arXiv:1405.3866 (scheme 2), in the closed form of Tai et al., arXiv:1511.06067: the error of the
    convolution's weight is that of the matrix.

    Args:
        up: Shape (in · h, rank).
        down: Shape (rank, out · w).
        shape: (out, in, h, w) of the convolution.

    Returns:
        vertical (rank, in, h, 1) and horizontal (out, rank, 1, w).
    """
    out, channels, height, width = shape
    vertical = up.T.reshape(-1, channels, height, 1)
    horizontal = down.reshape(-1, out, width).transpose(0, 1).unsqueeze(2)
    return vertical.contiguous(), horizontal.contiguous()


def tucker_factors(weight: Tensor, ranks: tuple[int, int], sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """W[o, i, y, x] ≈ Σ_pq last[o, p] core[p, q, y, x] first[q, i]: Tucker-2 (Kim et al., arXiv:1511.06530).

    HOSVD: `last` (out, out_rank) and `first`ᵀ (in, in_rank) hold the leading eigenvectors of W_(out) W_(out)ᵀ and
    W_(in) W_(in)ᵀ, of the unfoldings by output and input channel. HOOI (De Lathauwer et al., 2000): each in turn is
    chosen anew for the weight projected by the other, which never raises the error
    ‖W‖² − ‖core‖². There is no closed form for the best pair, so this is a local minimum.

    Args:
        weight: Shape (out, in, h, w).
        ranks: (out_rank, in_rank).
        sweeps: Of HOOI; 0 is HOSVD.

    Returns:
        first (in_rank, in, 1, 1), core (out_rank, in_rank, h, w) and last (out, out_rank, 1, 1), in the weight's
        dtype. The rows of `first` and the columns of `last` are orthonormal.

    Raises:
        SettingError: A rank above its number of channels or below 1, sweeps below 0, or NaN values.

    Example:
        >>> first, core, last = tucker_factors(torch.ones(4, 3, 3, 3), (2, 1))
        >>> [tuple(stage.shape) for stage in (first, core, last)]
        [(1, 3, 1, 1), (2, 1, 3, 3), (4, 2, 1, 1)]
    """
    check_weight(weight, 4)
    _check_pair(ranks, weight.shape)
    if sweeps < 0:
        raise SettingError(f"sweeps must be at least 0, got {sweeps}.")
    dense, (out_rank, in_rank) = weight.detach().double(), ranks
    last, first = _leading(dense, out_rank), _leading(dense.transpose(0, 1), in_rank)
    for _ in range(sweeps):
        last = _leading(torch.einsum("oiyx,iq->oqyx", dense, first), out_rank)
        first = _leading(torch.einsum("oiyx,op->ipyx", dense, last), in_rank)
    core = torch.einsum("oiyx,op,iq->pqyx", dense, last, first)
    stages = first.T[:, :, None, None], core, last[:, :, None, None]
    first, core, last = (stage.to(weight.dtype).contiguous() for stage in stages)
    return first, core, last


def tucker_parameters(shape: Sequence[int], ranks: tuple[int, int]) -> int:
    """Parameters of the three stages, in_rank · in + out_rank · in_rank · h · w + out · out_rank, without the bias.

    Example:
        >>> tucker_parameters((64, 32, 3, 3), (16, 8))
        2432
    """
    out, channels, height, width = shape
    out_rank, in_rank = ranks
    return in_rank * channels + out_rank * in_rank * height * width + out * out_rank


def tucker_ranks(weight: Tensor, rank_ratio: float, multiple: int = 1) -> tuple[int, int]:
    """The pair (out_rank, in_rank) within the parameters of a ratio that leaves the least error.

    The error is taken as HOSVD's bound, the sum of the energies that each of the two unfoldings leaves behind its
    rank; `tucker_factors` stays below it. For each in_rank the largest out_rank that the ratio affords is looked at.

    Args:
        weight: Shape (out, in, h, w).
        rank_ratio: Kept parameters / dense parameters, at most.
        multiple: Both ranks are multiples of it, or all channels.

    Raises:
        SettingError: `rank_ratio` is not above 0 and at most 1, or no pair fits into it.

    Example:
        >>> weight = torch.randn(16, 8, 3, 3)
        >>> tucker_parameters(weight.shape, tucker_ranks(weight, 0.5)) <= 0.5 * weight.numel()
        True
    """
    check_weight(weight, 4)
    if not 0 < rank_ratio <= 1:
        raise SettingError(
            f"rank_ratio (kept parameters / dense parameters) must be above 0 and at most 1, got {rank_ratio}."
        )
    if multiple < 1:
        raise SettingError(f"multiple must be at least 1, got {multiple}.")
    shape, dense = tuple(weight.shape), weight.detach().double()
    out_tails, in_tails = (_tails(view).tolist() for view in (dense, dense.transpose(0, 1)))
    found: list[tuple[float, tuple[int, int]]] = []
    for in_rank in [*range(multiple, shape[1], multiple), shape[1]]:
        without_out, per_out = (tucker_parameters(shape, (out_rank, in_rank)) for out_rank in (0, 1))
        out_rank = math.floor((rank_ratio * weight.numel() * EXACT - without_out) / (per_out - without_out))
        out_rank = shape[0] if out_rank >= shape[0] else out_rank // multiple * multiple
        if out_rank > 0:
            found.append((out_tails[out_rank] + in_tails[in_rank], (out_rank, in_rank)))
    if not found:
        out_rank, in_rank = (min(multiple, channels) for channels in shape[:2])
        least = tucker_parameters(shape, (out_rank, in_rank)) / weight.numel()
        raise SettingError(
            f"No pair of ranks keeps {rank_ratio} of a weight of shape {shape}: ranks ({out_rank}, {in_rank}) already "
            f"keep {least:.3g}. Raise rank_ratio, or leave it dense."
        )
    return min(found)[1]


def _check_pair(ranks: tuple[int, int], shape: Sequence[int]) -> None:
    for name, rank, channels in zip(("out_rank", "in_rank"), ranks, shape[:2], strict=True):
        if not isinstance(rank, int) or not 1 <= rank <= channels:
            raise SettingError(
                f"{name} must be in 1..{channels} for a weight of shape {tuple(shape)}, got {rank} "
                f"in the ranks (out_rank, in_rank) = {tuple(ranks)}."
            )


def _unfolding_gram(dense: Tensor) -> Tensor:
    """Of the unfolding by the first axis, (n, n) for a tensor (n, …)."""
    return dense.flatten(1) @ dense.flatten(1).T


def _leading(dense: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors (n, rank) of the unfolding by the first axis."""
    return torch.linalg.eigh(_unfolding_gram(dense)).eigenvectors[:, -rank:].flip(1)


def _tails(dense: Tensor) -> Tensor:
    """The squared error that 0..n leading vectors of the unfolding by the first axis leave; shape (n + 1,)."""
    left = torch.linalg.eigvalsh(_unfolding_gram(dense)).clamp(min=0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])
