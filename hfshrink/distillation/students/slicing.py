"""Slicing: which axes of which weights count channels, heads or neurons, and the weights of the kept ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.blocks import input_axis, layer_blocks
from hfshrink.distillation.students.width import block_boxes, widths_of
from hfshrink.errors import UnsupportedModelError
from hfshrink.modules import layer_stack

HIDDEN = "hidden"
"""The unit of the residual stream's channels, the same in every layer."""


@dataclass(frozen=True)
class Axis:
    """An axis of a weight that is cut: it holds `parts` times all units (three where q, k and v are one weight)."""

    weight: str
    dim: int
    unit: str
    parts: int = 1


def unit_counts(model: Any) -> dict[str, int]:
    """Unit -> how many of it a model has: channels, and per layer neurons and heads (groups of heads in GQA)."""
    stack, layers = layer_stack(model)
    widths = widths_of(model)
    counts = {HIDDEN: widths.hidden_size}
    for number in range(len(layers)):
        counts[f"{stack}.{number}.neurons"] = widths.intermediate_size
        counts[f"{stack}.{number}.heads"] = widths.num_key_value_heads
    return counts


def cut_axes(state: Mapping[str, Tensor], student: Any, counts: Mapping[str, int]) -> list[Axis]:
    """The axes at which the teacher's weights are longer than the student's, each with the unit that it counts.

    Args:
        state: The teacher's weights under the student's names.
        student: The narrower model.
        counts: Unit -> how many the teacher has.

    Raises:
        UnsupportedModelError: Other weights, or an axis that is no number of units.
    """
    target, known, boxes = student.state_dict(), _block_axes(student), block_boxes(student)
    new_counts = unit_counts(student)
    family = student.config.model_type
    if set(state) != set(target):
        names = ", ".join(sorted(set(state) ^ set(target))[:4])
        raise UnsupportedModelError(
            f"A {family!r} of these widths has other weights than its teacher ({names}). Keep hidden_size apart from "
            "embedding_size, or start fresh with architecture=."
        )
    found = []
    for name, weight in state.items():
        for dim, (old, new) in enumerate(zip(weight.shape, target[name].shape, strict=True)):
            if old == new:
                continue
            if name.startswith(boxes) and (name, dim) not in known:
                raise UnsupportedModelError(
                    f"These widths of the family {family!r} can't be cut: {name} lies inside a block, and it is not "
                    f"known what its {old} values on axis {dim} count. Drop layers (num_layers=), or start fresh with "
                    "architecture=."
                )
            # elsewhere channels are counted, in a head that reads two pooled states side by side twice
            axis = known.get((name, dim), Axis(name, dim, HIDDEN, max(1, old // counts[HIDDEN])))
            per_unit, rest = divmod(old, axis.parts * counts[axis.unit])
            if rest or new != per_unit * axis.parts * new_counts[axis.unit]:
                raise UnsupportedModelError(
                    f"The widths of the family {family!r} can't be cut: {name} has {old} on axis {dim}, and {new} in "
                    f"the student, which is no number of {axis.unit} ({counts[axis.unit]} -> "
                    f"{new_counts[axis.unit]}). Start fresh with architecture=."
                )
            found.append(axis)
    return found


def _block_axes(model: Any) -> dict[tuple[str, int], Axis]:
    """(weight, axis) -> what is cut there, for all axes of the blocks' own weights."""
    stack, layers = layer_stack(model)
    attention, feed_forward = layer_blocks(model)
    parts = 3 if attention.q == attention.k == attention.v else 1
    found: list[Axis] = []
    for number, layer in enumerate(layers):
        prefix = f"{stack}.{number}"
        heads, neurons = f"{prefix}.heads", f"{prefix}.neurons"
        for name in {attention.q: 0, attention.k: 0, attention.v: 0}:
            found += _axes(layer, prefix, name, reads=HIDDEN, writes=heads, parts=parts)
        for name in feed_forward.ups:
            found += _axes(layer, prefix, name, reads=HIDDEN, writes=neurons)
        found += _axes(layer, prefix, attention.o, reads=heads, writes=HIDDEN)
        found += _axes(layer, prefix, feed_forward.down, reads=neurons, writes=HIDDEN)
    return {(axis.weight, axis.dim): axis for axis in found}


def _axes(layer: nn.Module, prefix: str, name: str, *, reads: str, writes: str, parts: int = 1) -> list[Axis]:
    """The axes of one weight and its bias; `parts` of what it writes lie side by side."""
    inner, weight = input_axis(layer.get_submodule(name)), f"{prefix}.{name}.weight"
    outer = [Axis(weight, 1 - inner, writes, parts), Axis(f"{prefix}.{name}.bias", 0, writes, parts)]
    return [Axis(weight, inner, reads), *outer]


def block_indices(kept: Tensor, units: int, size: int, parts: int = 1) -> Tensor:
    """Positions on an axis of `size` that holds `parts` times `units` blocks of neighbours, of the kept units.

    Example:
        >>> block_indices(torch.tensor([0, 2]), units=3, size=6).tolist()
        [0, 1, 4, 5]
        >>> block_indices(torch.tensor([1]), units=2, size=6, parts=3).tolist()
        [1, 3, 5]
    """
    return torch.arange(size).view(parts, units, -1)[:, kept].flatten()


def keep_units(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], new_counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Unit -> the numbers of the highest-scored ones, in rising order; units that lose nothing need no score.

    Example:
        >>> keep_units({"hidden": torch.tensor([3.0, 1.0, 2.0])}, {"hidden": 3}, {"hidden": 2})
        {'hidden': tensor([0, 2])}
    """
    kept = {}
    for unit, new in new_counts.items():
        if new != counts[unit]:
            order = torch.sort(scores[unit].cpu(), descending=True, stable=True).indices
            kept[unit] = order[:new].sort().values
    return kept


def slice_state(
    state: Mapping[str, Tensor], axes: Sequence[Axis], kept: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """The weights with only the kept units on the given axes."""
    sliced = dict(state)
    for axis in axes:
        weight = sliced[axis.weight]
        index = block_indices(kept[axis.unit], counts[axis.unit], weight.shape[axis.dim], axis.parts)
        sliced[axis.weight] = weight.index_select(axis.dim, index.to(weight.device))
    return sliced
