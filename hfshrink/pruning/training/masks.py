"""The masks of a model in training: hidden weights are zeros in the model, and their values are kept aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.pruning.units.groups import UnitGroup, weight_axis


@dataclass
class MaskedWeight:
    """A weight some of which is hidden: zero in the model, so that whoever saves the model saves the pruned one.

    Attributes:
        name: Of the parameter.
        weight: The parameter.
        hidden: True where the weight is zero, of a shape that broadcasts to the weight's.
        aside: The values that the zeros stand for, of the weight's shape; zero elsewhere.
        kept: 0 where hidden and 1 elsewhere, in the weight's dtype, for products.
    """

    name: str
    weight: nn.Parameter
    hidden: Tensor
    aside: Tensor
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.set_hidden(self.hidden)

    def set_hidden(self, hidden: Tensor) -> None:
        """Say what is hidden, without a change of the weight."""
        self.hidden, self.kept = hidden, (~hidden).to(self.weight.dtype)

    def full(self) -> Tensor:
        """The weight with its hidden values, a new tensor."""
        return self.weight.detach() + self.aside

    def hide(self, hidden: Tensor) -> None:
        """Hide these entries from now on, and bring back all others."""
        with torch.no_grad():
            full = self.full()
            self.set_hidden(hidden)
            self.weight.copy_(full).mul_(self.kept)
            self.aside = full.sub_(self.weight)

    def reapply(self) -> None:
        """Make the hidden entries zero again, which an optimizer's decay and momentum move."""
        with torch.no_grad():
            self.weight.mul_(self.kept)


def masked_weight(name: str, weight: nn.Parameter, shape: Sequence[int] | None = None) -> MaskedWeight:
    """A weight of which nothing is hidden yet; `shape` is that of its mask.

    Example:
        >>> mask = masked_weight("w", nn.Parameter(torch.tensor([1.0, 2.0])))
        >>> mask.hide(torch.tensor([True, False]))
        >>> mask.weight.tolist(), mask.full().tolist()
        ([0.0, 2.0], [1.0, 2.0])
    """
    hidden = torch.zeros(weight.shape if shape is None else tuple(shape), dtype=torch.bool, device=weight.device)
    return MaskedWeight(name, weight, hidden, torch.zeros_like(weight.detach()))


def reading_weights(model: nn.Module, group: UnitGroup) -> list[tuple[MaskedWeight, int, Tensor]]:
    """Masked weight, axis and positions (units, k) of all that reads a group."""
    found = []
    for axis in group.reads:
        module: Any = model.get_submodule(axis.module)
        dim = weight_axis(module, axis.side)
        shape = [1] * module.weight.ndim
        shape[dim] = module.weight.shape[dim]
        weight = masked_weight(f"{axis.module}.weight", module.weight, shape)
        found.append((weight, dim, axis.positions.to(module.weight.device)))
    return found


def hidden_features(kept: Tensor, positions: Tensor, size: int) -> Tensor:
    """Booleans (size,): True for features of units that are not kept.

    Example:
        >>> hidden_features(torch.tensor([True, False]), torch.tensor([[0, 1], [2, 3]]), 4).tolist()
        [False, False, True, True]
    """
    hidden = torch.zeros(size, dtype=torch.bool, device=positions.device)
    hidden[positions[~kept.to(positions.device)].flatten()] = True
    return hidden
