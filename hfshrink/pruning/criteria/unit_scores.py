"""Scores of heads, neurons and channels: by their weights, or by what calibration data makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import without_cache
from hfshrink.pruning.criteria.fisher import diagonal_fisher, reader, unit_gradients
from hfshrink.pruning.criteria.scores import activation_mean, random_scores, unit_magnitude
from hfshrink.pruning.units.groups import UnitGroup, unit_slices

ON_WEIGHTS = ("magnitude", "random")
ON_DATA = ("activation", "taylor", "fisher")


def unit_scores(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    method: str,
    batches: Sequence[Mapping[str, Tensor]] = (),
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How much each unit matters.

    * "magnitude": L2 norm of all weights that write and read a unit; of channels the L1 norm of their filters
      (Li et al., arXiv:1608.08710)
    * "activation": mean norm of a unit's activations (Minitron, arXiv:2407.14679)
    * "taylor": mean over samples of |∂ℒ/∂m|, m the unit's mask, divided by the L2 norm of these means over the group,
      so that layers with large gradients do not outrank the others (Michel et al., arXiv:1905.10650)
    * "fisher": mean over samples of (∂ℒ/∂m)² (Kwon et al., arXiv:2204.09656)
    * "random": the baseline

    Args:
        model: It runs in eval mode.
        groups: Of its units.
        method: One of `ON_WEIGHTS` or `ON_DATA`.
        batches: Model inputs for `ON_DATA`, with labels for "taylor" and "fisher".
        seed: Of "random".

    Returns:
        Group name -> scores (units,), on the CPU.

    Raises:
        SettingError: No batches or labels where they are needed.
        UnsupportedModelError: Channels with a method that needs data.

    Example:
        >>> from hfshrink.pruning.units.groups import find_units
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> [scores] = unit_scores(model, find_units(model, "neurons"), "magnitude").values()
        >>> scores.shape
        torch.Size([6])
    """
    if method == "random":
        return {group.name: random_scores((group.units,), seed + number) for number, group in enumerate(groups)}
    if method == "magnitude":
        return {group.name: _magnitude(model, group).cpu() for group in groups}
    if method == "activation":
        return _activations(model, groups, batches)
    gradients = unit_gradients(model, groups, batches)
    score = diagonal_fisher if method == "fisher" else _mean_absolute
    return {name: score(found) for name, found in gradients.items()}


def _magnitude(model: nn.Module, group: UnitGroup) -> Tensor:
    if group.structure == "channels":
        return unit_magnitude(unit_slices(model, group.writes), order=1)
    return unit_magnitude(unit_slices(model, (*group.writes, *group.reads)))


def _mean_absolute(gradients: Tensor) -> Tensor:
    scores = gradients.double().abs().mean(dim=0)
    return scores / scores.norm().clamp(min=torch.finfo(torch.float64).tiny)


def _activations(
    model: nn.Module, groups: Sequence[UnitGroup], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Means over tokens, padding left out, of the norms of what the reading modules are given."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys((group.name for group in groups), 0)
    padding: list[Tensor | None] = [None]

    def see(_: nn.Module, args: tuple[Any, ...], *, name: str, positions: Tensor) -> None:
        x, mask = args[0].flatten(end_dim=-2), padding[0]
        x = x if mask is None or mask.numel() != len(x) else x[mask.flatten() != 0]
        if not bool(torch.isfinite(x).all()):
            raise SettingError(f"The activations of {name} are NaN or infinite. Check the data, or load in float32.")
        sums[name] = sums.get(name, torch.zeros(len(positions))) + len(x) * activation_mean(x, positions).cpu()
        tokens[name] += len(x)

    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for group in groups:
            module, axis = reader(model, group)
            hook = _with(see, group.name, axis.positions.to(module.weight.device))
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            mask = batch.get("attention_mask")
            padding[0] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            model(**batch, **without_cache(model))
    if not sums:
        raise SettingError("The method 'activation' needs calibration data, got no batch.")
    return {name: total / tokens[name] for name, total in sums.items()}


def _with(see: Any, name: str, positions: Tensor) -> Any:
    return lambda module, args: see(module, args, name=name, positions=positions)
