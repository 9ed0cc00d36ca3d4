"""The masks of a model in training: hidden weights are zeros in the model, and their values are kept aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import head_names, select_modules
from hfshrink.pruning.units import UnitGroup, weight_axis


@dataclass
class MaskedWeight:
    """A weight some of which is hidden: zero in the model, so that whoever saves the model saves the pruned one.

    Attributes:
        name: Of the parameter.
        weight: The parameter.
        hidden: True where the weight is zero, of a shape that broadcasts to the weight's.
        aside: The values that the zeros stand for, of the weight's shape; zero elsewhere.
    """

    name: str
    weight: nn.Parameter
    hidden: Tensor
    aside: Tensor

    def full(self) -> Tensor:
        """The weight with its hidden values, a new tensor."""
        return self.weight.detach() + self.aside

    def hide(self, hidden: Tensor) -> None:
        """Hide these entries from now on, and bring back all others."""
        with torch.no_grad():
            full = self.full()
            self.hidden = hidden
            self.weight.copy_(full.masked_fill(hidden, 0))
            self.aside = full.masked_fill_(~hidden, 0)

    def reapply(self) -> None:
        """Make the hidden entries zero again, which an optimizer's decay and momentum move."""
        with torch.no_grad():
            self.weight.masked_fill_(self.hidden, 0)


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


def prunable(
    model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The modules whose single weights are pruned: Linear, Conv1D and Conv2d inside the base model.

    Task heads, embeddings, norms, biases and tied weights are left alone; a wildcard in `include` other than "*" that
    names a head takes it all the same.

    Raises:
        SettingError: A wildcard without match, NaN weights, or nothing that can be pruned.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> modules = prunable(BertForSequenceClassification(BertConfig(**sizes)))
        >>> len(modules), "classifier" in modules
        (7, False)
    """
    found = select_modules(model, (nn.Linear, nn.Conv2d, Conv1D), include, exclude)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    heads = head_names(model) if include == "*" else []
    chosen = {n: m for n, m in found.items() if n not in heads and f"{n}.weight" not in tied_names}
    if not chosen:
        raise SettingError(
            f"{type(model).__name__} has no weights to prune: {len(found)} modules match, all are heads or tied."
        )
    check_weights(chosen)
    return chosen


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """Raise `SettingError` for NaN or infinite weights, `UnsupportedModelError` for quantized ones."""
    for name, module in modules.items():
        weight: Any = module.weight
        if not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name}.weight is of type {weight.dtype}: quantized weights can't be pruned. Prune the float model, "
                "then quantize it."
            )
        if not bool(torch.isfinite(weight).all()):
            raise SettingError(f"{name}.weight has NaN or infinite values. Load another checkpoint, or in float32.")


def matrix(module: nn.Module, values: Tensor) -> Tensor:
    """Values of a weight's shape as (out, inputs): convolutions flattened, Conv1D transposed; a view."""
    return values.T if isinstance(module, Conv1D) else values.flatten(1)


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
