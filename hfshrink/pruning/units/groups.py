"""Units: heads, neurons and channels, each with the modules that write it and the modules that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.blocks import AttentionBlock, FeedForwardBlock, head_size, layer_blocks
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import layer_stack
from hfshrink.pruning.units.slicing import check_has_units, has_units

STRUCTURES = ("heads", "neurons", "heads+neurons", "channels")
"""Kinds of units that can be found in a model."""


@dataclass(frozen=True)
class UnitAxis:
    """The features of a module's output or input that belong to each unit.

    Attributes:
        module: Dotted name of a Linear, Conv1D, Conv2d or batch norm.
        side: "out" for what the module writes, "in" for what it reads.
        positions: Feature numbers of each unit, shape (units, k), int64.
    """

    module: str
    side: Literal["out", "in"]
    positions: Tensor


@dataclass(frozen=True)
class UnitGroup:
    """Units that compete for the same places, such as the heads of one layer.

    Attributes:
        name: Of the group, such as "bert.encoder.layer.0.heads".
        structure: "heads", "neurons" or "channels".
        writes: What produces the units: q, k and v, the first feed-forward Linear, filters and their batch norms.
        reads: What takes them up. Zeros there mask a unit exactly: nothing else reads it.
    """

    name: str
    structure: str
    writes: tuple[UnitAxis, ...]
    reads: tuple[UnitAxis, ...]

    @property
    def units(self) -> int:
        """How many units the group has."""
        return len(self.reads[0].positions)


def find_units(
    model: nn.Module,
    structure: str,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    inputs: Any = None,
) -> list[UnitGroup]:
    """The groups of units of a model, in forward order.

    Args:
        model: A transformers model; for channels any convolutional net.
        structure: "heads", "neurons", "heads+neurons" or "channels". Query heads that share a key-value head are one
            unit.
        include: Wildcards of group names.
        exclude: Wildcards of names to leave out.
        inputs: For channels of a model without a transformers config: one batch as the model takes it.

    Raises:
        SettingError: Unknown structure, a wildcard that matches no group, or a module of one lies in factors or codes.
        UnsupportedModelError: A family whose blocks are not known; the message names it and what works.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> [(group.name, group.units) for group in find_units(BertModel(BertConfig(**sizes)), "heads+neurons")]
        [('encoder.layer.0.heads', 2), ('encoder.layer.0.neurons', 6)]
    """
    if structure not in STRUCTURES:
        raise SettingError(f"The structure of units must be one of {', '.join(STRUCTURES)}, got {structure!r}.")
    if structure == "channels":
        from hfshrink.pruning.units.channels import channel_groups

        return channel_groups(model, include=include, exclude=exclude, inputs=inputs)
    wanted = structure.split("+")
    groups = [group for group in _block_groups(model) if group.structure in wanted]
    groups = named_groups(groups, [include] if isinstance(include, str) else include, exclude)
    for axis in (axis for group in groups for axis in (*group.writes, *group.reads)):
        check_has_units(model.get_submodule(axis.module), axis.module)
    return groups


def named_groups(groups: list[UnitGroup], include: Sequence[str], exclude: str | Sequence[str]) -> list[UnitGroup]:
    """The groups whose names match the wildcards.

    Raises:
        SettingError: A wildcard without match, or no group is left.
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    for pattern in (*include, *exclude):
        if pattern != "*" and not any(fnmatchcase(group.name, pattern) for group in groups):
            names = ", ".join(group.name for group in groups[:6])
            raise SettingError(f"The wildcard {pattern!r} matches none of {len(groups)} groups of units: {names}, …")
    found = [
        group
        for group in groups
        if any(fnmatchcase(group.name, p) for p in include) and not any(fnmatchcase(group.name, p) for p in exclude)
    ]
    if groups and not found:
        raise SettingError(f"include={include!r} and exclude={exclude!r} leave none of {len(groups)} groups of units.")
    return found


def _block_groups(model: Any) -> list[UnitGroup]:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"The encoder-decoder {model.config.model_type!r} can't lose heads or neurons here: its layers share "
            "position biases and cross-attention. Its single weights can be pruned (structure='unstructured')."
        )
    try:
        stack, layers = layer_stack(model)
        attention, feed_forward = layer_blocks(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} Try structure='unstructured', or 'channels' for a conv net.") from None
    size, groups = head_size(model), []
    for number, layer in enumerate(layers):
        prefix = f"{stack}.{number}"
        groups.append(_heads(prefix, layer, attention, size))
        groups.append(_neurons(prefix, layer, feed_forward))
    return groups


def _heads(prefix: str, layer: nn.Module, block: AttentionBlock, size: int) -> UnitGroup:
    """One unit per key-value head, with all query heads that read it."""
    is_fused = block.q == block.k
    rows, columns = features(layer, block.k, "out"), features(layer, block.o, "in")
    units = (columns if is_fused else rows) // size
    queries = unit_positions(columns, units)
    names = {"q": block.q} if is_fused else {"q": block.q, "k": block.k, "v": block.v}
    writes = []
    for role, name in names.items():
        positions = queries if role == "q" and not is_fused else unit_positions(rows, units, 3 if is_fused else 1)
        writes.append(UnitAxis(f"{prefix}.{name}", "out", positions))
    return UnitGroup(f"{prefix}.heads", "heads", tuple(writes), (UnitAxis(f"{prefix}.{block.o}", "in", queries),))


def _neurons(prefix: str, layer: nn.Module, block: FeedForwardBlock) -> UnitGroup:
    positions = unit_positions(features(layer, block.down, "in"), features(layer, block.down, "in"))
    writes = tuple(UnitAxis(f"{prefix}.{name}", "out", positions) for name in block.ups)
    return UnitGroup(f"{prefix}.neurons", "neurons", writes, (UnitAxis(f"{prefix}.{block.down}", "in", positions),))


def unit_positions(size: int, units: int, parts: int = 1) -> Tensor:
    """Positions (units, k) of units that are blocks of neighbours in each of `parts` equal parts of `size` features.

    Example:
        >>> unit_positions(6, units=3).tolist(), unit_positions(6, units=1, parts=3).tolist()
        ([[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3, 4, 5]])
        >>> unit_positions(6, units=2, parts=3).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """
    return torch.arange(size).view(parts, units, -1).transpose(0, 1).reshape(units, -1)


def features(model: nn.Module, name: str, side: str) -> int:
    """Number of features that a module called `name` reads ("in") or writes ("out")."""
    module: Any = model.get_submodule(name)
    shape = module.weight.shape if has_units(module) else module.dense_shape
    return int(shape[weight_axis(module, side)])


def weight_axis(module: Any, side: str) -> int:
    """The axis of a module's weight that counts its outputs or inputs; in Conv1D they are swapped.

    Example:
        >>> weight_axis(nn.Linear(2, 3), "in"), weight_axis(nn.Conv2d(2, 3, 1), "out")
        (1, 0)
    """
    if issubclass(getattr(module, "replaces", type(module)), Conv1D):
        return 0 if side == "in" else 1
    return 0 if side == "out" or module.weight.ndim == 1 else 1


def mask_units(model: nn.Module, group: UnitGroup, kept: Tensor) -> None:
    """Zero what the reading modules take from the dropped units; whatever writes them stays.

    Args:
        model: Changed in place.
        group: Of units.
        kept: Booleans (units,).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> [heads] = find_units(model, "heads")
        >>> mask_units(model, heads, torch.tensor([True, False]))
        >>> model.encoder.layer[0].attention.output.dense.weight[:, 4:].any().item()
        False
    """
    for axis in group.reads:
        module: Any = model.get_submodule(axis.module)
        dropped = axis.positions[~kept.cpu()].flatten().to(module.weight.device)
        with torch.no_grad():
            module.weight.index_fill_(weight_axis(module, axis.side), dropped, 0)


def used_units(model: nn.Module, group: UnitGroup) -> Tensor:
    """Booleans (units,): True for units that something reads, False where all reading weights are exactly zero.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> [heads] = find_units(model, "heads")
        >>> mask_units(model, heads, torch.tensor([True, False]))
        >>> used_units(model, heads).tolist()
        [True, False]
    """
    alive = torch.zeros(group.units, dtype=torch.bool)
    for axis in group.reads:
        module: Any = model.get_submodule(axis.module)
        other = [dim for dim in range(module.weight.ndim) if dim != weight_axis(module, axis.side)]
        used = module.weight.detach().abs().amax(dim=other).cpu() != 0
        alive |= used[axis.positions].any(dim=1)
    return alive


def unit_slices(model: nn.Module, axes: Sequence[UnitAxis]) -> list[Tensor]:
    """The weights of each unit along some axes: one tensor (units, values) per axis, without biases and norms."""
    found = []
    for axis in axes:
        module: Any = model.get_submodule(axis.module)
        if module.weight.ndim == 1:
            continue
        weight = module.weight.detach().movedim(weight_axis(module, axis.side), 0).flatten(1)
        found.append(weight[axis.positions.to(weight.device)].flatten(1))
    return found
