"""Cutting units out of a model for real: smaller weights, not zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfshrink.checkpoint import check_free_slot, set_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers.attention import QUERIES, scale_heads
from hfshrink.modules import replace_module
from hfshrink.pruning.units.groups import UnitGroup, find_units, used_units
from hfshrink.pruning.units.slicing import check_sliceable, sliced, width_of
from hfshrink.pruning.units.uniform import uniform_widths

Masks = dict[str, dict[str, Tensor]]
"""Module name -> side ("out", "in") -> booleans (features,): those that stay."""


def cut_units(model: nn.Module, groups: Iterable[UnitGroup], kept: Mapping[str, Tensor]) -> list[str]:
    """Remove units from the modules that write and read them.

    Removing what nobody reads changes nothing: the cut model computes what the masked one does. Where all layers keep
    equally many and the config can say so, plain layers of the new size stand there afterwards and the config says it
    (`intermediate_size`, or the heads of a family whose config states `head_dim`); any transformers loads the saved
    model. Elsewhere resized layers stand there, and the layer map in the config describes them. A plain `nn.Module`
    gets smaller plain layers.

    Args:
        model: Changed in place; its parameters are new ones, see `check_optimizer`. Nothing is changed when it raises.
        groups: From `find_units` on this model as it is now.
        kept: Group name -> booleans (units,). A group that is not named keeps all.

    Returns:
        Names of the modules that were cut, in the model's order.

    Raises:
        SettingError: Masks that do not fit, a group that would lose all its units, tied, NaN or parametrized weights,
            or a model that other means have quantized.
        UnsupportedModelError: A module in the way that can't be cut, such as a norm over all heads (OLMo 2).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> cut_units(model, find_units(model, "neurons"), {"encoder.layer.0.neurons": torch.arange(6) < 4})
        ['encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense']
        >>> model.config.intermediate_size
        4
    """
    groups = list(groups)
    is_saved = isinstance(getattr(model, "config", None), PreTrainedConfig)
    if is_saved:
        check_free_slot(model)
    masks = _kept_features(model, groups, kept)
    _check_untied(model, masks)
    _check_head_norms(model, [group for group in groups if group.reads[0].module in masks])
    if not is_saved:
        _place_plain(model, {name: sliced(model.get_submodule(name), sides) for name, sides in masks.items()})
        return [name for name, _ in model.named_modules() if name in masks]
    sizes = {name: {side: int(mask.sum()) for side, mask in sides.items()} for name, sides in masks.items()}
    entries, native = uniform_widths(model, sizes) if masks else ({}, set())
    made = {n: sliced(model.get_submodule(n), sides, plain=n in native) for n, sides in masks.items()}
    resized: dict[str, Any] = {name: layer for name, layer in made.items() if name not in native}
    if resized:
        set_layers(model, resized)
    _place_plain(model, {name: layer for name, layer in made.items() if name in native})
    for entry, value in entries.items():
        setattr(model.config, entry, value)
    return [name for name, _ in model.named_modules() if name in masks]


def check_cut(model: nn.Module, groups: Iterable[UnitGroup]) -> None:
    """Raise what `cut_units` would for any of these groups, before the work that leads to a cut.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> check_cut(model, find_units(model, "neurons"))
    """
    groups = [group for group in groups if group.units > 1]
    masks = _kept_features(model, groups, {group.name: torch.arange(group.units) > 0 for group in groups})
    _check_untied(model, masks)
    _check_head_norms(model, groups)
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        check_free_slot(model)


def cut_masked(model: nn.Module, structure: str = "heads+neurons", **wildcards: Any) -> list[str]:
    """Remove all units of a masked model that nothing reads, because every weight that would read them is exactly 0.

    Of a group without any use one unit stays: no module can be empty.

    Args:
        model: Changed in place.
        structure: As `find_units` takes it.
        **wildcards: `include` and `exclude`, as `find_units` takes them.

    Returns:
        Names of the modules that were cut; none where every unit is in use.

    Example:
        >>> from hfshrink.pruning.units.groups import mask_units
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> [neurons] = find_units(model, "neurons")
        >>> mask_units(model, neurons, torch.arange(6) < 4)
        >>> cut_masked(model)
        ['encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense']
    """
    groups = find_units(model, structure, **wildcards)
    kept = {group.name: used_units(model, group) for group in groups}
    for mask in kept.values():
        mask[0] |= not mask.any()
    return cut_units(model, groups, kept)


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise `SettingError` where an optimizer holds parameters that a cut took out of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    """
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lost = sum(id(parameter) not in own for parameter in held)
    if lost:
        raise SettingError(
            f"{lost} of {len(held)} parameters of the {type(optimizer).__name__} are not the model's any more: it was "
            "cut after the optimizer was made, which would train what nobody reads. Make a new optimizer from "
            "model.parameters() after the cut."
        )


def _kept_features(model: nn.Module, groups: Iterable[UnitGroup], kept: Mapping[str, Tensor]) -> Masks:
    """The masks of all modules that lose something."""
    groups = list(groups)
    unknown = sorted(set(kept) - {group.name for group in groups})
    if unknown:
        raise SettingError(f"No group of units is called {unknown[0]!r}; there are {len(groups)}.")
    found: Masks = {}
    for group in groups:
        mask = kept.get(group.name)
        if mask is None or _checked_mask(group, mask).all():
            continue
        for axis in (*group.writes, *group.reads):
            if axis.module not in found:
                check_sliceable(model.get_submodule(axis.module), axis.module)
            size = width_of(model.get_submodule(axis.module), axis.side)
            if int(axis.positions.max()) >= size:
                raise SettingError(
                    f"{axis.module} has {size} features ({axis.side}), and {group.name} names number "
                    f"{int(axis.positions.max())}: the model was cut after find_units. Call it again."
                )
            sides = found.setdefault(axis.module, {})
            stays = sides.setdefault(axis.side, torch.ones(size, dtype=torch.bool))
            stays[axis.positions[~mask.cpu()].flatten()] = False
    return found


def _checked_mask(group: UnitGroup, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (group.units,):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SettingError(f"kept[{group.name!r}] must be booleans of shape ({group.units},), got {got}.")
    if not mask.any():
        raise SettingError(
            f"{group.name} would lose all of its {group.units} units, and {group.reads[0].module} would be left "
            "empty. Keep one at least: take a lower sparsity, or a cap for each module."
        )
    return mask


def _check_untied(model: Any, names: Iterable[str]) -> None:
    """Raise `SettingError` for a module whose weight another one shares."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    tied = {*keys, *keys.values(), *(key for shared in owners.values() if len(shared) > 1 for key in shared)}
    for name in names:
        if f"{name}.weight" in tied:
            raise SettingError(
                f"The weight of {name} is tied to another one and must keep its shape. Exclude its units."
            )


def _check_head_norms(model: Any, groups: Iterable[UnitGroup]) -> None:
    """Refuse attention with a norm over all its heads: it would see fewer of them."""
    for group in groups:
        if group.structure != "heads" or group.units < 2:
            continue
        parent = group.writes[0].module.rpartition(".")[0]
        widths = {width_of(model.get_submodule(axis.module), "out") for axis in group.writes}
        for name, module in model.get_submodule(parent).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1 and len(weight) in widths:
                raise UnsupportedModelError(
                    f"{parent}.{name} of the family {model.config.model_type!r} is a norm over all heads, which gives "
                    "other values for fewer: its heads can't be cut. structure='neurons' and 'unstructured' work."
                )


def _place_plain(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put plain layers of other sizes in place, and correct what their parents remember of the sizes."""
    for name, layer in layers.items():
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        old = replace_module(model, name, layer)
        before, after = width_of(old, "out"), width_of(layer, "out")
        if child in QUERIES and before != after:
            scale_heads(parent, after, before)
        if vars(parent).get("intermediate_size") == before != after:
            vars(parent)["intermediate_size"] = after
