"""How much a weight or a unit matters: the scores of the literature as pure functions on tensors.

The higher, the more important; only the order counts. Weights are seen as (out, in): a Conv2d flattened to
(out, in·height·width), GPT-2's Conv1D transposed. A unit (a head, a neuron, a channel) is several slices of several
weights, each brought into the shape (units, n); the functions called `unit_…` take a list of them.
Halves are computed in float32, and no score carries a gradient but `soft_movement_penalty`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfshrink.errors import SettingError


def magnitude(weight: Tensor) -> Tensor:
    """|w|, elementwise: what a small weight multiplies is lost the least (Han et al., arXiv:1506.02626).

    Args:
        weight: Any shape.

    Returns:
        Scores of the weight's shape.

    Example:
        >>> magnitude(torch.tensor([[-2.0, 1.0]])).tolist()
        [[2.0, 1.0]]
    """
    return _wide(weight).abs()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w·g|, elementwise: the first-order change of the loss when w goes to 0 (Molchanov et al., arXiv:1906.10771).

    Args:
        weight: Any shape.
        gradient: Mean gradient of the loss, the weight's shape.

    Returns:
        Scores of the weight's shape.

    Raises:
        SettingError: The shapes differ.

    Example:
        >>> taylor(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.0])).tolist()
        [2.0, 0.0]
    """
    return movement_gradient(weight, gradient).abs()


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """½ w²·E[g²], elementwise: the second-order change of the loss at a minimum, with the Hessian's diagonal.

    Optimal Brain Damage with the empirical Fisher information for the Hessian (Theis et al., arXiv:1801.05787; its
    block form is oBERT, arXiv:2203.07259).

    Args:
        weight: Any shape.
        squared_gradient: Mean over examples of the squared gradient of one example's loss, the weight's shape. Larger
            batches give less than the mean of squares, about 1 / batch size of it where the gradient is noise.

    Returns:
        Scores of the weight's shape, in units of the loss.

    Raises:
        SettingError: The shapes differ.

    Example:
        >>> fisher(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 4.0])).tolist()
        [2.0, 18.0]
    """
    _check_shapes(weight, squared_gradient, "squared_gradient")
    return 0.5 * _wide(weight).square() * _wide(squared_gradient)


def movement_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂S = (∂L/∂W′)·W, the straight-through gradient of movement scores (Sanh et al., arXiv:2005.07683).

    W′ = W ⊙ top(S) is the masked weight that the forward pass uses; the step function top is passed over as if it
    were the identity. Gradient descent on S lifts the scores of weights that move away from 0.

    Args:
        weight: The dense weight W, any shape.
        gradient: Gradient of the loss at the masked weight W′, the same shape.

    Returns:
        Signed gradients of the weight's shape.

    Raises:
        SettingError: The shapes differ.

    Example:
        >>> movement_gradient(torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 1.0])).tolist()
        [-2.0, -3.0]
    """
    _check_shapes(weight, gradient, "gradient")
    return _wide(weight) * _wide(gradient)


def soft_movement_penalty(scores: Tensor) -> Tensor:
    """The mean of σ(S), the penalty of soft movement pruning, which draws scores below its fixed threshold.

    Sanh et al., arXiv:2005.07683, section 4: σ(S) > τ is the mask, and λ times the mean over all masked modules is
    added to the loss.

    Args:
        scores: Any shape.

    Returns:
        A scalar in (0, 1) through which gradients flow.

    Example:
        >>> float(soft_movement_penalty(torch.zeros(2, 2)))
        0.5
    """
    return scores.float().sigmoid().mean()


def soft_movement_gradient(scores: Tensor) -> Tensor:
    """σ(S)·(1 − σ(S)) / n, the gradient of `soft_movement_penalty`, for updates made by hand.

    Args:
        scores: n scores of any shape.

    Returns:
        Gradients of the same shape.

    Example:
        >>> soft_movement_gradient(torch.zeros(2)).tolist()
        [0.125, 0.125]
    """
    open_share = _wide(scores).sigmoid()
    return open_share * (1 - open_share) / scores.numel()


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij|·‖x_j‖₂, to be compared within each row i (Sun et al., arXiv:2306.11695).

    Args:
        weight: Shape (out, in).
        input_norm: The norm of each input feature over all calibration tokens, shape (in,): the root of
            `ModuleStatistics.input_square`.

    Returns:
        Scores of shape (out, in).

    Raises:
        SettingError: The shapes do not fit.

    Example:
        >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0])).tolist()
        [[2.0, 3.0]]
    """
    if weight.ndim != 2 or input_norm.shape != weight.shape[1:]:
        raise SettingError(
            f"Wanda needs a weight (out, in) and norms (in,), got shapes {tuple(weight.shape)} and "
            f"{tuple(input_norm.shape)}."
        )
    return _wide(weight).abs() * _wide(input_norm)


def random_scores(shape: Sequence[int], seed: int) -> Tensor:
    """Uniform in [0, 1): the baseline that every criterion must beat.

    Args:
        shape: Of the scores.
        seed: The caller's random state stays as it was.

    Returns:
        float32 scores on the CPU.

    Example:
        >>> bool((random_scores((2, 3), seed=1) == random_scores((2, 3), seed=1)).all())
        True
    """
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def filter_norms(weight: Tensor) -> Tensor:
    """Σ |w| over each filter of a convolution (Li et al., arXiv:1608.08710).

    Args:
        weight: Shape (out, in, height, width), or flattened to (out, in·height·width).

    Returns:
        One score per filter, shape (out,).

    Example:
        >>> filter_norms(torch.tensor([[[[1.0, -2.0]]], [[[0.0, 0.5]]]])).tolist()
        [3.0, 0.5]
    """
    return unit_magnitude([weight.flatten(start_dim=1)], order=1)


def activation_mean(x: Tensor, positions: Tensor) -> Tensor:
    """E_x ‖x_u‖₂ over tokens, x_u the activations of unit u (Minitron: Muralidharan et al., arXiv:2407.14679).

    For neurons, units of one feature each, this is the mean of |x|; for heads the mean norm of the head's output.

    Args:
        x: The input of the module that reads the units (attention output, FFN down), shape (…, features); padding left
            out by the caller.
        positions: Which features belong to each unit, shape (units, k), integers.

    Returns:
        One score per unit, shape (units,).

    Raises:
        SettingError: `x` holds no token.

    Example:
        >>> heads = torch.tensor([[0, 1], [2, 3]])
        >>> activation_mean(torch.tensor([[3.0, 4.0, 0.0, 1.0]]), heads).tolist()
        [5.0, 1.0]
    """
    if not x.numel():
        raise SettingError(f"activation_mean needs at least one token, got activations of shape {tuple(x.shape)}.")
    return _wide(x)[..., positions].norm(dim=-1).reshape(-1, len(positions)).mean(dim=0)


def unit_magnitude(slices: Sequence[Tensor], order: int = 2) -> Tensor:
    """(Σ |w|^p)^(1/p) over all weights of a unit, p = 1 or 2 (Li et al., arXiv:1608.08710, for filters).

    Args:
        slices: The parts of the units, each of shape (units, n).
        order: p.

    Returns:
        One score per unit, shape (units,).

    Raises:
        SettingError: Another order, no slices, or slices of different numbers of units.

    Example:
        >>> unit_magnitude([torch.tensor([[3.0], [0.0]]), torch.tensor([[-4.0], [1.0]])]).tolist()
        [5.0, 1.0]
    """
    if order not in (1, 2):
        raise SettingError(f"order must be 1 or 2, got {order!r}.")
    _check_slices(slices)
    total = sum((_wide(part).abs().pow(order).sum(dim=1) for part in slices), torch.zeros(()))
    return total if order == 1 else total.sqrt()


def unit_taylor(slices: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """|Σ w·g| over all weights of a unit, the absolute value *after* the sum (Molchanov et al., arXiv:1906.10771).

    It is the first-order change of the loss when the whole unit goes to 0, and equals |∂L/∂m| for a factor m = 1 on
    the unit. Over several batches, take the mean of the squares of each batch's scores, as the paper does.

    Args:
        slices: The parts of the units, each of shape (units, n): what writes the unit *or* what reads it. Both sides
            say the same, so giving both counts twice.
        gradients: Gradients of the loss at the slices, the same shapes.

    Returns:
        One score per unit, shape (units,).

    Raises:
        SettingError: Different shapes, no slices, or slices of different numbers of units.

    Example:
        >>> unit_taylor([torch.tensor([[1.0, 2.0]])], [torch.tensor([[4.0, -1.0]])]).tolist()
        [2.0]
    """
    _check_slices(slices)
    if len(slices) != len(gradients):
        raise SettingError(f"Expected a gradient for each of {len(slices)} slices, got {len(gradients)}.")
    products = (movement_gradient(part, gradient) for part, gradient in zip(slices, gradients, strict=True))
    return sum((product.sum(dim=1) for product in products), torch.zeros(())).abs()


def _wide(tensor: Tensor) -> Tensor:
    """Without gradient, halves as float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_shapes(weight: Tensor, other: Tensor, name: str) -> None:
    if weight.shape != other.shape:  # torch would broadcast
        raise SettingError(f"{name} must have the weight's shape {tuple(weight.shape)}, got {tuple(other.shape)}.")


def _check_slices(slices: Sequence[Tensor]) -> None:
    if not slices or any(part.ndim != 2 for part in slices) or len({len(part) for part in slices}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in slices) or "none"
        raise SettingError(f"Expected slices of shape (units, n) with the same number of units, got {shapes}.")
