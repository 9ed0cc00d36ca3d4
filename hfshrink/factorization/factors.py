"""Low-rank factors of a weight matrix: plain, with weighted rows, whitened by the inputs, or both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfshrink.errors import SettingError

JITTER = 1e-12
"""Least that a direction weighs: this part of the Gram matrix's mean diagonal, of the largest squared row weight."""

ROUNDING = 1e-5
"""Asymmetry as a part of the trace, and negative eigenvalues as a part of the largest, that a Gram matrix summed in
float32 may have."""

RANDOMIZED_SIDE, RANDOMIZED_SHARE = 1024, 1 / 16
"""Where "auto" takes the randomized solver: the least shorter side, and the largest rank as a part of it. There it
took 1/1.6 to 1/2.9 of the full solver's time on one CPU thread, at an error up to 0.06 % above the best."""

BLOCK = 2**20
"""Numbers of a weight that are in float64 at once (8 MB), besides what is computed from them."""

OVERSAMPLING, TOLERANCE, MAX_ITERATIONS = 32, 1e-4, 40
"""Of the randomized solver: vectors beyond the rank; the gain in an iteration, as a part of the error left, at which
it stops; and a bound on the iterations."""


@dataclass(frozen=True)
class Decomposition:
    """The best factors of one weight at every rank, and the error that each leaves.

    Attributes:
        tails: Squared weighted error left at rank 0, 1, …; float64 on the CPU. All ranks 0..k with k = min(out, in)
            for the full solver, however few factors were kept; 0..max_rank for the randomized one.
        up: Shape (out, max_rank), float64, beside the weight.
        down: Shape (max_rank, in).
    """

    tails: Tensor
    up: Tensor
    down: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors up (out, rank) and down (rank, in), float64: the first components of the largest ones.

        Each component is split evenly: its column of `up` and its row of `down` have the same norm. Without weighting
        that is the root of the singular value on both sides. Of a component of norm 0 one side is 0.

        Raises:
            SettingError: `rank` is not in 1..max_rank.

        Example:
            >>> up, down = decompose(torch.tensor([[0.0, 4.0], [1.0, 0.0]])).factors(1)
            >>> (up @ down).abs().tolist(), float(up.norm()), float(down.norm())
            ([[0.0, 4.0], [0.0, 0.0]], 2.0, 2.0)
        """
        check_rank(rank, len(self.down), (len(self.up), self.down.shape[1]))
        return self.up[:, :rank], self.down[:rank]


def low_rank_factors(
    weight: Tensor, rank: int, *, row_weight: Tensor | None = None, input_gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The minimiser A, B of ‖D (W − A B) S‖_F² with D = diag(row_weight) and S Sᵀ = input_gram; see `decompose`.

    Args:
        weight: W, shape (out, in), any floating dtype.
        rank: Columns of A, rows of B; in 1..min(out, in).
        row_weight: Shape (out,), not negative; None weighs all rows alike.
        input_gram: Σ x xᵀ over the inputs x, shape (in, in); None takes all directions alike.

    Returns:
        up (out, rank) and down (rank, in), computed in float64, in the weight's dtype and on its device.

    Raises:
        SettingError: See `decompose`.

    Example:
        >>> up, down = low_rank_factors(torch.tensor([[0.0, 4.0], [1.0, 0.0]]), 1)
        >>> (up @ down).abs().tolist()
        [[0.0, 4.0], [0.0, 0.0]]
        >>> never_second = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the Gram matrix of inputs (x, 0)
        >>> up, down = low_rank_factors(torch.tensor([[0.0, 4.0], [1.0, 0.0]]), 1, input_gram=never_second)
        >>> (up @ down)[:, 0].tolist()
        [0.0, 1.0]
    """
    found = decompose(weight, rank, row_weight=row_weight, input_gram=input_gram)
    up, down = found.factors(rank)
    return up.to(weight.dtype), down.to(weight.dtype)


def decompose(
    weight: Tensor,
    max_rank: int | None = None,
    *,
    row_weight: Tensor | None = None,
    input_gram: Tensor | None = None,
    solver: str = "auto",
) -> Decomposition:
    """Minimise ‖D (W − A B) S‖_F² over A (out, r), B (r, in) for every r, by one eigen-decomposition in float64.

    D = diag(row_weight) and S Sᵀ = G = Σ x xᵀ. With M = D W S = U Σ Vᵀ, Eckart and Young give M_r = U_r U_rᵀ M as the
    best M of rank r, and M_r = D A B S is solved by A B = D⁻¹ U_r U_rᵀ D W = W S V_r V_rᵀ S⁻¹, whose error is
    Σ_{i>r} σ_i². D multiplies from the left and S from the right, so both together are no harder than each alone; an
    error with a weight for each entry of W would have no such form.
    - Neither: truncated SVD. `row_weight` = √Σ_j F_ij: FWSVD (arXiv:2207.00112). `input_gram`: the outputs' error
      Σ ‖W x − A B x‖², SVD-LLM (arXiv:2403.07378) and DRONE (NeurIPS 2021).
    - U and Σ² come from M Mᵀ = D W G Wᵀ D where W is wide or square, which needs no root of G; V and Σ² from
      Mᵀ M = Sᵀ Wᵀ D² W S where it is tall, with S the Cholesky factor of G, or from G's eigen-decomposition where that
      fails. Squaring leaves an error of about 1e-15 · σ_1² in each tail, and the factors project with orthonormal
      vectors: at full rank A B = W.
    - Weightings have a floor: G + JITTER · mean(diag G) · I stands for G, and row weights below √JITTER of the largest
      count as that. So features that never fire, and rows of weight 0, take part only where nothing else is at stake:
      they get what the r components, chosen for the others, give of them (columns of D⁻¹ U_r U_rᵀ D W), not zeros.
    - "randomized": subspace iteration from a fixed seed (arXiv:0909.4061). Its tails are the errors of its own
      factors, slightly above the optimum.

    Args:
        weight: W, shape (out, in), any floating dtype.
        max_rank: Largest rank that factors will be asked for; None: min(out, in).
        row_weight: Shape (out,), not negative.
        input_gram: Shape (in, in), positive semi-definite.
        solver: `"full"`, `"randomized"`, or `"auto"`: randomized where `max_rank` is far below a large weight's full
            rank.

    Raises:
        SettingError: A rank or solver that does not exist, NaN values, a shape that does not fit, a row weight below
            0, or a Gram matrix that is not symmetric or has negative eigenvalues.

    Example:
        >>> decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).tails.tolist()
        [14.0, 5.0, 1.0, 0.0]
        >>> decompose(torch.eye(2), row_weight=torch.tensor([1.0, 3.0])).tails.round(decimals=9).tolist()
        [10.0, 1.0, 0.0]
    """
    check_weight(weight, 2)
    weight = weight.detach()
    out, features = weight.shape
    full = min(out, features)
    max_rank = full if max_rank is None else max_rank
    check_rank(max_rank, full, weight.shape)
    if solver not in ("auto", "full", "randomized"):
        raise SettingError(f'solver must be "auto", "full" or "randomized", got {solver!r}.')
    rows = None if row_weight is None else _floored_rows(row_weight, weight)
    gram = None if input_gram is None else _floored_gram(input_gram, weight)
    if solver == "auto":
        far_below = full >= RANDOMIZED_SIDE and max_rank <= RANDOMIZED_SHARE * full
        solver = "randomized" if far_below else "full"
    root = gram if gram is None or not is_tall(weight) else _lower_root(gram)
    tails, vectors = _leading(_small_side(weight, rows, gram, root), max_rank, solver)
    return Decomposition(tails, *_balanced_factors(weight, vectors, rows, root))


def check_rank(rank: int, largest: int, shape: Sequence[int]) -> None:
    """Raise SettingError unless `rank` is an integer in 1..largest; `shape` names the weight."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        raise SettingError(f"rank must be in 1..{largest} for a weight of shape {tuple(shape)}, got {rank}.")


def check_weight(weight: Tensor, dimensions: int) -> None:
    """Raise SettingError unless `weight` has that many dimensions, none of them 0, and finite floating values."""
    shape = tuple(weight.shape)
    if weight.ndim != dimensions or not weight.is_floating_point() or not weight.numel():
        raise SettingError(f"Expected a floating weight of {dimensions} dimensions, got {weight.dtype} {shape}.")
    if not math.isfinite(float(weight.detach().sum(dtype=torch.float64))):  # one pass; NaN and infinity stay in a sum
        bad = int((~weight.detach().isfinite()).sum())
        raise SettingError(f"The weight of shape {shape} has {bad} NaN or infinite values; it has no factors.")


def is_tall(weight: Tensor) -> bool:
    """Whether out > in, so that the eigen-decomposition is of the input side."""
    return weight.shape[0] > weight.shape[1]


def _floored_rows(row_weight: Tensor, weight: Tensor) -> Tensor:
    """`row_weight` (out,) in float64 beside the weight, none below √JITTER of the largest."""
    rows = row_weight.detach().to(weight.device, torch.float64)
    if rows.shape != weight.shape[:1]:
        raise SettingError(
            f"row_weight must have shape ({weight.shape[0]},) for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(rows.shape)}."
        )
    if not bool(rows.isfinite().all()) or bool((rows < 0).any()):
        low, high = float(rows.min()), float(rows.max())
        raise SettingError(f"row_weight must be finite and not negative, got values from {low:.3g} to {high:.3g}.")
    return rows.clamp(min=math.sqrt(JITTER) * (float(rows.max()) or 1.0))  # all 0: every row counts as little


def _floored_gram(input_gram: Tensor, weight: Tensor) -> Tensor:
    """`input_gram` (in, in) in float64 beside the weight, plus JITTER of its mean diagonal."""
    features = weight.shape[1]
    gram = input_gram.detach().to(weight.device, torch.float64, copy=True)
    if gram.shape != (features, features):
        raise SettingError(
            f"input_gram must have shape ({features}, {features}) for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(gram.shape)}."
        )
    diagonal = gram.diagonal()
    trace = float(diagonal.sum())
    # G v = Gᵀ v for a v without pattern: a large matrix is read twice, not copied; NaN and infinity come through
    v = torch.arange(1, features + 1, dtype=torch.float64, device=gram.device).square().cos()
    asymmetry = float((gram @ v - gram.T @ v).norm())
    if not math.isfinite(asymmetry) or not math.isfinite(trace):
        raise SettingError("input_gram has NaN or infinite values.")
    if float(diagonal.min()) < 0:
        raise _negative(f"{float(diagonal.min()):.3g} on its diagonal")
    if asymmetry > ROUNDING * trace:
        raise SettingError("input_gram must be symmetric, Σ x xᵀ over the inputs x; G and Gᵀ differ.")
    diagonal.add_(JITTER * (trace / features or 1.0))  # no input at all: all features alike
    return gram


def _negative(found: str) -> SettingError:
    return SettingError(f"input_gram must be positive semi-definite, Σ x xᵀ over the inputs x; it has {found}.")


def _lower_root(gram: Tensor) -> Tensor:
    """S lower triangular with S Sᵀ = G (in, in)."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if not int(failed):
        return root
    # singular but for rounding: eigenvalues below the jitter that was added are noise
    values, vectors = torch.linalg.eigh(gram)
    _check_positive(values)
    floor = JITTER * float(gram.diagonal().mean())
    return torch.linalg.qr(values.clamp(min=floor).sqrt()[:, None] * vectors.T, mode="r").R.T


def _check_positive(values: Tensor) -> None:
    """`values` (k,) are eigenvalues in rising order."""
    if float(values[0]) < -ROUNDING * abs(float(values[-1])):
        raise _negative(f"the eigenvalue {float(values[0]):.3g} beside {float(values[-1]):.3g}, or its product with W")


def _small_side(weight: Tensor, rows: Tensor | None, gram: Tensor | None, root: Tensor | None) -> Tensor:
    """M Mᵀ (out, out), or Mᵀ M (in, in) where W is tall, with S in `root`."""
    if gram is not None and not is_tall(weight):
        scaled = weight.double() if rows is None else weight.double() * rows[:, None]
        return (scaled @ gram) @ scaled.T
    side = min(weight.shape)
    square = torch.zeros(side, side, dtype=torch.float64, device=weight.device)
    for where, block in _blocks(weight):
        if is_tall(weight):
            scaled = block if rows is None else block * rows[where, None]
            square.addmm_(scaled.T, scaled)
        else:
            scaled = block if rows is None else block * rows[:, None]
            square.addmm_(scaled, scaled.T)
    return square if root is None else root.T @ square @ root


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time of a tall weight, some columns of others, in float64."""
    dim = 0 if is_tall(weight) else 1
    step = max(1, BLOCK // weight.shape[1 - dim])
    for start in range(0, weight.shape[dim], step):
        where = slice(start, start + step)
        yield where, (weight[where] if dim == 0 else weight[:, where]).double()


def _balanced_factors(
    weight: Tensor, vectors: Tensor, rows: Tensor | None, root: Tensor | None
) -> tuple[Tensor, Tensor]:
    """D⁻¹ U and Uᵀ D W, or W S V and Vᵀ S⁻¹ where W is tall, each component with the same norm on both sides."""
    if is_tall(weight):
        right = vectors if root is None else root @ vectors
        up = vectors.new_empty(len(weight), vectors.shape[1])
        for where, block in _blocks(weight):
            torch.mm(block, right, out=up[where])
        down = vectors.T if root is None else torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
    else:
        left = vectors.T if rows is None else vectors.T * rows
        down = vectors.new_empty(vectors.shape[1], weight.shape[1])
        for where, block in _blocks(weight):
            down[:, where] = left @ block
        up = vectors if rows is None else vectors / rows[:, None]
    ratio = down.norm(dim=1) / up.norm(dim=0)
    scale = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).sqrt()
    return up.mul_(scale).contiguous(), down.div_(scale[:, None]).contiguous()


def _leading(square: Tensor, rank: int, solver: str) -> tuple[Tensor, Tensor]:
    """Tails on the CPU, and the first `rank` eigenvectors (k, rank) of a matrix (k, k) by falling eigenvalue."""
    if solver == "randomized" and rank + OVERSAMPLING < len(square):
        return _subspace_iteration(square, rank)
    vectors = square.mT  # symmetric, and column after column as LAPACK writes: overwritten in place, not copied
    values = torch.empty(len(square), dtype=square.dtype, device=square.device)
    torch.linalg.eigh(vectors, out=(values, vectors))
    _check_positive(values)
    left_over = values.clamp(min=0).cumsum(0).flip(0)  # the small ones first, so that none drowns in the large ones
    tails = torch.cat([left_over, left_over.new_zeros(1)])
    return tails.cpu(), vectors[:, len(square) - rank :].flip(1)


def _subspace_iteration(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for the best `rank` vectors of a subspace that grows towards the leading one, tails 0..rank.

    Q ← orthonormal(A Q) until the energy that `rank` vectors of Q keep, the sum of the leading eigenvalues of Qᵀ A Q,
    hardly grows.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(square), rank + OVERSAMPLING, generator=generator, dtype=torch.float64).to(square.device)
    total, before = float(square.diagonal().sum()), 0.0
    basis = torch.linalg.qr(square @ basis).Q
    for _ in range(MAX_ITERATIONS):
        product = square @ basis
        values, mixing = torch.linalg.eigh(basis.T @ product)
        kept = float(values[-rank:].sum())
        if kept - before <= TOLERANCE * (total - kept):
            break
        before, basis = kept, torch.linalg.qr(product).Q
    values, mixing = values.flip(0)[:rank].clamp(min=0), mixing.flip(1)[:, :rank]
    tails = total - torch.cat([values.new_zeros(1), values.cumsum(0)])
    return tails.clamp(min=0).cpu(), basis @ mixing
