"""How far synthetic rows are from real ones: by the means of random features, or by the gradients that they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mean_gap(real: Tensor, synthetic: Tensor) -> Tensor:
    """Distribution matching of one class: ‖mean_i ψ(x_i) − mean_j ψ(s_j)‖² (Zhao & Bilen, arXiv:2110.04181).

    Averaged over random ψ it is a maximum mean discrepancy: 0 only where all those means agree.

    Args:
        real: (m, features) ψ of real rows.
        synthetic: (k, features) ψ of synthetic ones.

    Returns:
        One number, 0 or above.

    Example:
        >>> mean_gap(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0]]))
        tensor(4.)
    """
    return ((real.mean(dim=0) - synthetic.mean(dim=0)) ** 2).sum()


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Gradient matching: Σ_layers Σ_units (1 − cos(g, h)) (Zhao, Mopuri & Bilen, arXiv:2006.05929, eq. 10).

    Each unit's weights, a row of its layer's weight, give one angle. Biases have no such rows and are left out. A unit
    without gradient on one side counts 1, on both sides nothing can be matched and it counts 0.

    Args:
        real: Gradient of each parameter on real rows, (units, …) of weights.
        synthetic: The same on synthetic rows.

    Returns:
        One number in 0..2 for each unit, summed.

    Example:
        >>> gradient_distance([torch.tensor([[1.0, 0.0], [0.0, 2.0]])], [torch.tensor([[3.0, 0.0], [0.0, -1.0]])])
        tensor(2.)
    """
    total = real[0].new_zeros(())
    for g, h in zip(real, synthetic, strict=True):
        if g.ndim > 1:
            ours, theirs = g.flatten(1), h.flatten(1)
            counts = ((ours != 0).any(dim=1) | (theirs != 0).any(dim=1)).to(ours.dtype)
            total = total + (counts * (1 - nn.functional.cosine_similarity(ours, theirs, dim=1))).sum()
    return total


def loss_gradients(network: nn.Module, rows: Tensor, label: int, differentiable: bool = False) -> tuple[Tensor, ...]:
    """∇_θ mean cross-entropy(network(x), y) over rows of one class, parameter by parameter.

    Of a linear layer W it is mean_i (softmax(W x_i) − onehot(y)) x_iᵀ.

    Args:
        network: Gives logits (m, classes).
        rows: (m, …) rows of one class.
        label: Its number.
        differentiable: Whether the gradients can themselves be differentiated by the rows.

    Example:
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> loss_gradients(layer, torch.tensor([[4.0]]), 0)
        (tensor([[-2.],
                [ 2.]]),)
    """
    targets = torch.full((len(rows),), label, device=rows.device)
    loss = nn.functional.cross_entropy(network(rows), targets)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=differentiable)


def nearest_distinct(distances: Tensor) -> Tensor:
    """A row of its own for each point, shortest distances first.

    The closest pair of all is joined, then the closest of what is left, and so on; of equal distances the first point
    and the first row win.

    Args:
        distances: (points, rows), with at least as many rows as points.

    Returns:
        (points,) row numbers, all different.

    Example:
        >>> nearest_distinct(torch.tensor([[1.0, 5.0, 9.0], [0.5, 2.0, 9.0]]))
        tensor([1, 0])
    """
    chosen = torch.full((len(distances),), -1)
    left = distances.clone()
    for _ in range(len(left)):
        point, row = divmod(int(left.argmin()), left.shape[1])
        chosen[point] = row
        left[point, :] = torch.inf
        left[:, row] = torch.inf
    return chosen


def exchange(features: Tensor, target: Tensor, chosen: Tensor, rounds: int = 10) -> Tensor:
    """Exchange chosen rows, one at a time, for those that bring the mean of the features nearer to a target.

    Lowers ‖mean_j ψ(x_j) − t‖², the matching loss of rows that can only be picked: each of k places in turn takes the
    row with the least ‖ψ(x) − (k t − Σ_others ψ)‖², until none changes.

    Args:
        features: (rows, features) ψ of what may be chosen.
        target: (features,) t.
        chosen: (k,) different row numbers to start from.
        rounds: At most so many turns of all places.

    Returns:
        (k,) different row numbers, place by place.

    Example:
        >>> exchange(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([2.0]), torch.tensor([0, 1]))
        tensor([2, 1])
    """
    chosen, lengths = chosen.clone(), (features**2).sum(dim=1)
    for _ in range(rounds):
        before = chosen.clone()
        for place in range(len(chosen)):
            others = torch.cat([chosen[:place], chosen[place + 1 :]])
            wanted = len(chosen) * target - features[others].sum(dim=0)
            distances = lengths - 2 * (features @ wanted)  # less ‖wanted‖², the same for all
            distances[others] = torch.inf
            best = distances.argmin()
            if distances[best] < distances[chosen[place]]:  # equal ones stay, so that it ends
                chosen[place] = best
        if torch.equal(before, chosen):
            break
    return chosen
