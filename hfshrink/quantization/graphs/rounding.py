"""Block-wise rounding of weights to a few bits: to the nearest code, or with the error of the layer's output in mind.

Every function takes a weight W of shape (out, in) and cuts its rows into groups of `group_size` neighbours, the last
one shorter where the width does not divide. A group has one scale s and one zero point z, and w ≈ s · (code − z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfshrink.errors import SettingError

BLOCK_COLUMNS = 128  # columns that GPTQ rounds before it passes their error on to all the rest


class Rounded(NamedTuple):
    """A weight in codes.

    Attributes:
        codes: Shape (out, in), uint8, in 0..2^bits − 1.
        scales: Shape (out, groups), float32; symmetric ones may be negative (see `round_to_nearest`).
        zero_points: Shape (out, groups), uint8; None where it is 2^(bits − 1) everywhere (symmetric).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None, symmetric: bool = True) -> Rounded:
    """Round each weight to the nearest code of its group: code = round(w / s) + z.

    Symmetric: s = m / −2^(bits−1), m the entry of largest size with its sign, which so gets the lowest code and is met
    exactly. Asymmetric: the range from min(w, 0) to max(w, 0) in 2^bits − 1 steps, z the code of 0. Both are ONNX
    Runtime's own choices.

    Args:
        weight: Shape (out, in).
        bits: 2..8.
        group_size: Neighbours in a row that share a scale; None takes the whole row.
        symmetric: Whether 0 is the middle code.

    Returns:
        Codes, scales and zero points.

    Raises:
        SettingError: Not a matrix, NaN or infinite weights, bits or group size out of range.

    Example:
        >>> codes, scales, zero_points = round_to_nearest(torch.tensor([[-8.0, 3.2, 7.0, 0.0]]), 4, None)
        >>> codes.tolist(), scales.tolist(), zero_points
        ([[0, 11, 15, 8]], [[1.0]], None)
    """
    groups = _grouped(weight, bits, group_size)
    scales, zero_points = _grid(groups, bits, symmetric)
    return _finish(_encode(groups, scales, zero_points, bits), scales, zero_points, weight.shape[1], symmetric)


def round_clipped(weight: Tensor, bits: int, group_size: int | None, symmetric: bool = True) -> Rounded:
    """Rounding to the nearest code with the range of least squared error, of 100, 97.5, … 50 % of the widest.

    A few clipped weights cost less than a coarser step for all. No data is needed.

    Args:
        weight: Shape (out, in).
        bits: 2..8.
        group_size: Neighbours in a row that share a scale; None takes the whole row.
        symmetric: Whether 0 is the middle code.

    Raises:
        SettingError: As in `round_to_nearest`.

    Example:
        >>> weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        >>> clipped, near = (dequantized(*f(weight, 2, 16), 16, 2) for f in (round_clipped, round_to_nearest))
        >>> bool((clipped - weight).square().sum() < (near - weight).square().sum())
        True
    """
    groups = _grouped(weight, bits, group_size)
    scales, zero_points = _searched_grid(groups, torch.ones(groups.shape[1:], device=groups.device), bits, symmetric)
    return _finish(_encode(groups, scales, zero_points, bits), scales, zero_points, weight.shape[1], symmetric)


def hqq(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    *,
    norm: float = 0.7,
    iterations: int = 20,
) -> Rounded:
    """Half-quadratic quantization: min Σ |W − s(Q − z)|^p over the grid, p < 1, so that a few outliers may be far off.

    The error is split off as E = shrink(W − s(Q − z)), shrink(x) = sign(x) · max(|x| − |x|^(p−1) / β, 0), and the grid
    solves min ‖s(Q − z) − (W − E)‖², in turns, with β growing: z = mean(Q − (W − E) / s) as published, rounded here,
    since the runtime's fast kernels take whole zero points, and then s = Σ(Q − z)(W − E) / Σ(Q − z)²; symmetric codes
    keep their z. The best round of each group, by Σ |W − s(Q − z)|^p, is kept; the first is rounding to the nearest.
    No data is needed. Badri and Shaji 2023 (mobiusml/hqq).

    Args:
        weight: Shape (out, in).
        bits: 2..8.
        group_size: Neighbours in a row that share a scale; None takes the whole row.
        symmetric: Whether 0 is the middle code.
        norm: p, in (0, 1].
        iterations: Rounds of both steps.

    Raises:
        SettingError: As in `round_to_nearest`, and p out of range.

    Example:
        >>> weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        >>> fine, near = (dequantized(*f(weight, 2, 16), 16, 2) for f in (hqq, round_to_nearest))
        >>> bool((fine - weight).abs().pow(0.7).sum() < (near - weight).abs().pow(0.7).sum())
        True
    """
    if not 0 < norm <= 1:
        raise SettingError(f"norm must lie in (0, 1], got {norm}.")
    groups = _grouped(weight, bits, group_size)
    scales, zero_points = _grid(groups, bits, symmetric)
    best, lowest = (scales, zero_points), _lp_error(groups, scales, zero_points, bits, norm)
    # the step is measured in typical errors, which makes the result independent of the unit of the weights
    unit = (groups - _decode(groups, scales, zero_points, bits)).abs().mean(-1, keepdim=True).clamp_min(1e-12)
    beta = 1.0
    for _ in range(iterations):
        codes = _encode(groups, scales, zero_points, bits)
        error = (groups - scales * (codes - zero_points)) / unit
        size = error.abs().clamp_min(1e-8)
        kept = error.sign() * (size - size.pow(norm - 1) / beta).clamp_min(0)
        target = groups - kept * unit
        if not symmetric:
            moved = (codes - target * _reciprocal(scales)).mean(-1, keepdim=True).round().clamp(0, 2**bits - 1)
            zero_points = torch.where(scales == 0, zero_points, moved)
        steps = codes - zero_points
        energy = steps.square().sum(-1, keepdim=True)
        scales = torch.where(energy > 0, (steps * target).sum(-1, keepdim=True) / energy.clamp_min(1), scales)
        loss = _lp_error(groups, scales, zero_points, bits, norm)
        better = loss < lowest
        best = torch.where(better, scales, best[0]), torch.where(better, zero_points, best[1])
        lowest = torch.minimum(loss, lowest)
        beta *= 1.1
    return _finish(_encode(groups, *best, bits), *best, weight.shape[1], symmetric)


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    *,
    damping: float = 0.01,
    reorder: bool = True,
) -> Rounded:
    """Round column by column, and let the columns that are left make up for each error (Frantar et al., 2210.17323).

    With H = 2XXᵀ + λI and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), column i is rounded to q, its error is
    e = (w_i − q) / U_ii, and every later column j moves by −e · U_ij. H's factor 2 cancels. λ is `damping` times the
    mean of H's diagonal. Scales are chosen before the first column, per group, from a few that clip its largest
    weights, by the error weighted with H's diagonal: so columns may come in any order, and each keeps its group.

    Args:
        weight: Shape (out, in).
        gram: XXᵀ = Σ x xᵀ over the layer's inputs, shape (in, in): `collect(model, "input_gram")`.
        bits: 2..8.
        group_size: Neighbours in a row that share a scale; None takes the whole row.
        symmetric: Whether 0 is the middle code.
        damping: λ in units of the mean of H's diagonal.
        reorder: Round columns of large H_ii first, while many others can still make up for them ("act-order").

    Raises:
        SettingError: As in `round_to_nearest`; a Gram matrix of another shape, or one that has no Cholesky factor.

    Example:
        >>> x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> weight, gram = torch.randn(8, 32), x.T @ x
        >>> near = dequantized(*round_to_nearest(weight, 3, 16), 16, 3)
        >>> aware = dequantized(*gptq(weight, gram, 3, 16), 16, 3)
        >>> bool(output_error(weight - aware, gram) < output_error(weight - near, gram))
        True
    """
    groups, width = _grouped(weight, bits, group_size), weight.shape[1]
    if gram.shape != (width, width) or not bool(torch.isfinite(gram).all()):
        raise SettingError(f"gram must be finite and of shape {(width, width)}, got {tuple(gram.shape)}.")
    diagonal = gram.diagonal().double()
    scales, zero_points = _searched_grid(groups, _importance(diagonal, groups), bits, symmetric)
    order = torch.argsort(diagonal, descending=True) if reorder else torch.arange(width, device=weight.device)
    factor = _inverse_factor(gram.double()[order][:, order], damping)
    group_of = (torch.arange(width, device=weight.device) // groups.shape[2])[order]
    column_scales, column_zeros = scales[:, group_of, 0], zero_points[:, group_of, 0]
    codes = _round_columns(weight.detach().float()[:, order], factor, column_scales, column_zeros, bits)
    placed = torch.empty_like(codes)
    placed[:, order] = codes
    return Rounded(placed.to(torch.uint8), scales[..., 0], None if symmetric else zero_points[..., 0].to(torch.uint8))


def dequantized(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int | None, bits: int = 4
) -> Tensor:
    """The weight that codes stand for, s · (code − z), float32.

    Args:
        codes: Shape (out, in).
        scales: Shape (out, groups).
        zero_points: Shape (out, groups); None means 2^(bits − 1).
        group_size: Neighbours in a row that share a scale; None for the whole row.
        bits: Of the codes; read only where `zero_points` is None.

    Example:
        >>> dequantized(torch.tensor([[0, 9, 8, 7]]), torch.tensor([[1.0, 0.5]]), None, 2).tolist()
        [[-8.0, 1.0, 0.0, -0.5]]
    """
    size = group_size or codes.shape[1]
    spread = [
        torch.repeat_interleave(t, size, dim=1)[:, : codes.shape[1]] for t in (scales, zero_points) if t is not None
    ]
    middle = spread[1].float() if zero_points is not None else 2.0 ** (bits - 1)
    return spread[0] * (codes.float() - middle)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """‖DX‖² = tr(D XXᵀ Dᵀ): the squared error of a layer's outputs, summed over inputs, for a weight error D.

    Args:
        difference: Shape (out, in).
        gram: XXᵀ, shape (in, in).

    Example:
        >>> float(output_error(torch.tensor([[1.0, 2.0]]), torch.eye(2)))
        5.0
    """
    difference = difference.double()
    return ((difference @ gram.double()) * difference).sum()


def _grouped(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """W as (out, groups, size), float32, zeros behind the last column; after the checks."""
    if weight.ndim != 2 or not weight.numel():
        raise SettingError(f"Expected a weight of shape (out, in), got {tuple(weight.shape)}.")
    if not 2 <= bits <= 8:
        raise SettingError(f"bits must lie in 2..8, got {bits}.")
    if group_size is not None and group_size < 1:
        raise SettingError(f"group_size must be at least 1, or None for whole rows, got {group_size}.")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise SettingError("The weight holds NaN or infinite values.")
    size = group_size or weight.shape[1]
    padding = -weight.shape[1] % size
    return torch.nn.functional.pad(weight, (0, padding)).unflatten(1, (-1, size))


def _grid(groups: Tensor, bits: int, symmetric: bool, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups, 1) whose range covers `shrink` of each group's."""
    low, high = (bound * shrink for bound in torch.aminmax(groups, dim=-1, keepdim=True))
    if symmetric:
        scales = torch.where(high.abs() > low.abs(), high, low) / -(2 ** (bits - 1))
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = (high - low) / (2**bits - 1)
    middle = torch.full_like(scales, 2 ** (bits - 1))
    nearest = (-low * _reciprocal(scales) + 0.5).floor().clamp(0, 2**bits - 1)
    return scales, torch.where(scales == 0, middle, nearest)


def _searched_grid(groups: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Of the ranges that cover all to half of a group's, the one with the least error Σ h (w − q)²."""
    best = _grid(groups, bits, symmetric)
    lowest = (importance * (groups - _decode(groups, *best, bits)).square()).sum(-1, keepdim=True)
    for step in range(1, 21):
        grid = _grid(groups, bits, symmetric, 1 - step / 40)
        loss = (importance * (groups - _decode(groups, *grid, bits)).square()).sum(-1, keepdim=True)
        best = torch.where(loss < lowest, grid[0], best[0]), torch.where(loss < lowest, grid[1], best[1])
        lowest = torch.minimum(loss, lowest)
    return best


def _importance(diagonal: Tensor, groups: Tensor) -> Tensor:
    """H's diagonal as (groups, size), with a floor for columns that the data left at 0."""
    floor = diagonal.mean() * 1e-3 + 1e-12
    padded = torch.nn.functional.pad(diagonal.clamp_min(floor), (0, groups.shape[1] * groups.shape[2] - len(diagonal)))
    return padded.reshape(groups.shape[1:]).float()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U of H⁻¹ = UᵀU, float32: with the order of columns reversed H = RRᵀ, R upper, and U = R⁻¹."""
    mean = float(hessian.diagonal().mean())
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    lower, failed = torch.linalg.cholesky_ex((hessian + unit * (damping * mean if mean > 0 else 1.0)).flip(0, 1))
    if bool(failed):
        raise SettingError(f"gram is not positive definite; check the data, or raise damping (now {damping}).")
    return torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True).float()


def _round_columns(weight: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """GPTQ's loop over columns; blocks of them, so that most updates are one matrix product."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, weight.shape[1])
        block, errors = weight[:, start:stop], torch.empty_like(weight[:, start:stop])
        for i in range(stop - start):
            column = start + i
            scale, zero = scales[:, column], zero_points[:, column]
            code = _encode(block[:, i], scale, zero, bits)
            codes[:, column] = code
            errors[:, i] = (block[:, i] - scale * (code - zero)) / factor[column, column]
            block[:, i + 1 :] -= errors[:, i, None] * factor[column, column + 1 : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _encode(values: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    return (values * _reciprocal(scales) + zero_points + 0.5).floor().clamp(0, 2**bits - 1)


def _decode(values: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    return scales * (_encode(values, scales, zero_points, bits) - zero_points)


def _reciprocal(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / torch.where(scales == 0, 1, scales))


def _lp_error(groups: Tensor, scales: Tensor, zero_points: Tensor, bits: int, norm: float) -> Tensor:
    return (groups - _decode(groups, scales, zero_points, bits)).abs().pow(norm).sum(-1, keepdim=True)


def _finish(codes: Tensor, scales: Tensor, zero_points: Tensor, width: int, symmetric: bool) -> Rounded:
    zeros = None if symmetric else zero_points[..., 0].to(torch.uint8)
    return Rounded(codes.flatten(1)[:, :width].to(torch.uint8), scales[..., 0], zeros)
