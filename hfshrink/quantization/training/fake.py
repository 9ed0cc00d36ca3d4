"""Fake quantization: float numbers on an integer grid, with gradients. Pure functions on tensors.

Symmetric weights: ŵ = s · clip(round(w / s), low, high); int8 leaves out −128, fewer bits use every code, with a scale
whose sign gives the largest weight the lowest code, as ONNX Runtime's block-wise weights have it.
Affine activations: x̂ = s · (clip(round(x / s) + z, 0, 255) − z), the same as s · clip(round(x / s), −z, 255 − z).
Halves go to the even neighbour and what is out of range saturates, as ONNX `QuantizeLinear` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

INT8 = 8
UNSIGNED = 255
"""Largest code of an activation in 8 bits."""
SLACK = 1e-4
"""Of a code: m / (m / Q) is Q only up to rounding, and must count as inside."""


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code of a symmetric weight.

    Example:
        >>> code_range(8), code_range(4), code_range(2)
        ((-127, 127), (-8, 7), (-2, 1))
    """
    high = 2 ** (bits - 1) - 1
    return (-high if bits == INT8 else -high - 1), high


def as_rows(weight: Tensor, group_size: int | None = None, transposed: bool = False) -> Tensor:
    """A weight as (outputs, groups, numbers that share a scale), a view where it can be one.

    Args:
        weight: (out, in, …), or (in, out) where `transposed` (Conv1D, tables with a scale per column).
        group_size: Numbers in a group; None makes one group of each output channel.
        transposed: Whether the second axis has scales of its own.
    """
    rows = (weight.T if transposed else weight).flatten(1)
    return rows.unflatten(1, (-1, group_size or rows.shape[1]))


def from_rows(rows: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """The inverse of `as_rows`, in the shape of `weight`."""
    return rows.flatten(1).T if transposed else rows.reshape(weight.shape)


def weight_scale(rows: Tensor, bits: int) -> Tensor:
    """The scale that gives the weight m of largest size the outermost code: |m| / 127, or m / −2^(bits−1) below int8.

    Args:
        rows: (outputs, groups, numbers that share a scale).
        bits: 2..8.

    Returns:
        (outputs, groups, 1), negative where m is above 0 and bits below 8; 1 for rows of zeros.

    Example:
        >>> weight_scale(torch.tensor([[[0.5, 8.0], [0.0, 0.0]]]), 4).flatten().tolist()
        [-1.0, 1.0]
    """
    rows, low = rows.detach(), code_range(bits)[0]
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).float()
    scale = largest.abs() / -low if bits == INT8 else largest / low
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def first_scale(rows: Tensor, bits: int) -> Tensor:
    """Where the size of a learned scale starts: s₀ = 2 · mean|w| / √Q, Q the highest code (arXiv:1902.08153).

    Never above that of `weight_scale`, beyond which the outer codes would lie idle. Shape (outputs, groups, 1).
    """
    wanted = 2 * rows.detach().abs().float().mean(-1, keepdim=True) / math.sqrt(code_range(bits)[1])
    return torch.where(wanted > 0, torch.minimum(wanted, weight_scale(rows, bits).abs()), torch.ones_like(wanted))


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of unsigned 8-bit codes between two numbers; zero itself has a code.

    s = (high − low) / 255 and z = round(−low / s), with low ≤ 0 ≤ high; s is 1 for an empty range.

    Example:
        >>> scale, zero_point = affine(torch.tensor(-1.0), torch.tensor(4.1))
        >>> round(float(scale), 6), float(zero_point)
        (0.02, 50.0)
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    scale = (high - low) / UNSIGNED
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale).clamp(0, UNSIGNED)


def gradient_scale(count: int, largest: float) -> float:
    """The factor g = 1 / √(N · Q), by which LSQ multiplies the gradient of a scale that N numbers share.

    Example:
        >>> gradient_scale(100, 1)
        0.1
    """
    return 1 / math.sqrt(max(count * largest, 1))


def fake_quantize(
    values: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, factor: float = 1.0
) -> Tensor:
    """The numbers s · clip(round(v / s), low, high), with straight-through and LSQ gradients (arXiv:1902.08153).

    ∂v̂/∂v = 1 inside, 0 where it saturates; ∂v̂/∂s = round(v/s) − v/s inside, low below and high above, times `factor`
    (g of `gradient_scale`), summed over the numbers that share s.

    Args:
        values: Any shape, any float dtype; computed in float32, returned in its own.
        scale: Not 0, broadcast over `values`; its gradient is computed where it asks for one.
        low: Smallest code, a number or a tensor of one.
        high: Largest code.
        factor: g.

    Returns:
        Numbers on the grid, of the shape and dtype of `values`.

    Example:
        >>> fake_quantize(torch.tensor([0.5, 1.5, 9.0]), torch.tensor(1.0), -7, 7)
        tensor([0., 2., 7.])
    """
    return _FakeQuantize.apply(values, scale, low, high, factor)


class _FakeQuantize(torch.autograd.Function):
    """Keeps only what it was given; the codes are computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: Any, high: Any, factor: float) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.bounds, ctx.factor = (low, high), factor
        return _codes(values.float() / scale, low, high).mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (values, scale), (low, high), gradient = ctx.saved_tensors, ctx.bounds, gradients[0]
        scaled = values.float() / scale
        inside = (scaled >= low - SLACK) & (scaled <= high + SLACK)
        of_scale = None
        if ctx.needs_input_grad[1]:
            slope = _codes(scaled, low, high).sub_(scaled * inside).mul_(gradient)
            of_scale = slope.sum_to_size(scale.shape).mul_(ctx.factor)
        return gradient * inside, of_scale, None, None, None


def _codes(scaled: Tensor, low: Any, high: Any) -> Tensor:
    return torch.round(scaled).clamp_(low, high)
