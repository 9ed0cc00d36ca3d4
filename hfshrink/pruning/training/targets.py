"""What competes for its place while a model trains: single weights of a module, or the units of a group."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria import scores
from hfshrink.pruning.criteria.ranking import kept_units
from hfshrink.pruning.criteria.thresholds import check_pattern
from hfshrink.pruning.training.masks import MaskedWeight, hidden_features, masked_weight, reading_weights
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.units.groups import UnitGroup, find_units, unit_slices
from hfshrink.pruning.units.weights import check_weights, matrix, prunable

DECAY = 0.9
"""Of the running means of the scores that gradients give."""


@dataclass
class Target:
    """One competitor: its masked weights, and what is known about its scores.

    Attributes:
        name: Of the module or group.
        kind: "weights", "heads", "neurons" or "channels": only the same kinds compete with each other.
        places: (masked weight, axis of the units, positions (units, k)); axis and positions are None for weights.
        module: That holds the weights; None for units.
        group: Of units; None for weights.
        learned: Trained scores, of the weight's shape or (units,); None for other methods.
        gathered: Running mean of the gradients' scores, of the same shape; None before the first.
    """

    name: str
    kind: str
    places: list[tuple[MaskedWeight, int | None, Tensor | None]]
    module: nn.Module | None = None
    group: UnitGroup | None = None
    learned: nn.Parameter | None = None
    gathered: Tensor | None = None

    @property
    def masks(self) -> list[MaskedWeight]:
        return [mask for mask, _, _ in self.places]


def make_targets(model: nn.Module, pruning: Pruning) -> list[Target]:
    """Everything that the settings select, with nothing hidden yet.

    Raises:
        SettingError: Nothing to prune, NaN weights, frozen weights, N:M that does not divide a module's inputs, or a
            sparsity that leaves a group of units empty.
        UnsupportedModelError: A family without such units.
    """
    found = _unit_targets(model, pruning) if pruning.is_structured else _weight_targets(model, pruning)
    for rivals in competitors(found):  # what would fail at the last update is told before the first step
        zeros = {target.name: torch.zeros(target.group.units) for target in rivals if target.group is not None}
        if zeros:
            kept_units(zeros, pruning.final, scope=pruning.ranked, max_sparsity=pruning.max_sparsity)
    for target in found:
        for mask in target.masks:
            if not mask.weight.requires_grad:
                raise SettingError(f"{mask.name} is frozen, so its mask can't be trained. Unfreeze or exclude it.")
        if pruning.is_learned:
            first = target.places[0]
            shape = first[0].weight.shape if first[2] is None else (len(first[2]),)
            target.learned = nn.Parameter(torch.zeros(shape, device=first[0].weight.device))
    if pruning.is_learned and pruning.initial_scores == "magnitude":
        _start_from_magnitudes(found, model)
    return found


def _start_from_magnitudes(targets: Sequence[Target], model: nn.Module) -> None:
    """Set learned scores to magnitudes, in units of the mean of all that compete: they rank as magnitudes do."""
    for rivals in competitors(targets):
        found = {target.name: _magnitude(target, model) for target in rivals}
        mean = sum(float(values.sum()) for values in found.values()) / sum(map(torch.numel, found.values()))
        for target in rivals:
            if target.learned is not None and mean > 0:
                target.learned.data.copy_(found[target.name] / mean)


def competitors(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets of each kind, which are ranked together."""
    kinds = dict.fromkeys(target.kind for target in targets)
    return [[target for target in targets if target.kind == kind] for kind in kinds]


def _weight_targets(model: nn.Module, pruning: Pruning) -> list[Target]:
    found = []
    for name, module in prunable(model, pruning.include, pruning.exclude).items():
        weight: Any = module.weight
        if pruning.pattern is not None:
            try:
                check_pattern(*pruning.pattern, matrix(module, weight).shape[1])
            except SettingError as error:
                raise SettingError(f"{error} ({name})") from None
        found.append(Target(name, "weights", [(masked_weight(f"{name}.weight", weight), None, None)], module=module))
    return found


def _unit_targets(model: nn.Module, pruning: Pruning) -> list[Target]:
    groups = find_units(model, pruning.structure, pruning.include, pruning.exclude)
    names = {axis.module for group in groups for axis in (*group.writes, *group.reads)}
    check_weights({name: model.get_submodule(name) for name in sorted(names)})
    return [Target(g.name, g.structure, list(reading_weights(model, g)), group=g) for g in groups]


def gather_gradients(target: Target, pruning: Pruning, scale: float = 1.0, modules: int = 1) -> None:
    """Turn the gradients of a step into those of the learned scores, or into a running mean; then hide them too.

    The gradient of a weight that is hidden is that of its place: straight through the mask.

    Args:
        target: Whose weights have gradients.
        pruning: The settings.
        scale: Of the loss, in mixed precision; the running means take the gradients without it, and leave out steps
            whose scaled gradients overflow, as the optimizer does.
        modules: How many targets there are: the penalty of soft movement is a mean over them.
    """
    if target.learned is not None:
        gradient = _first_order(target)
        if gradient is not None and pruning.method == "soft-movement":
            penalty = scores.soft_movement_gradient(target.learned.detach())
            gradient += pruning.penalty * scale / modules * penalty
        target.learned.grad = None if gradient is None else gradient.to(target.learned.dtype)
    elif pruning.method in ("taylor", "fisher"):
        found = _first_order(target) if pruning.method == "taylor" or target.group is not None else _squares(target)
        if found is not None and bool(torch.isfinite(found).all()):
            found = (found / scale).abs() if pruning.method == "taylor" else found.square() / scale**2
            target.gathered = found if target.gathered is None else target.gathered.lerp_(found, 1 - DECAY)
    for mask in target.masks:
        if mask.weight.grad is not None:
            mask.weight.grad.mul_(mask.kept)


def _first_order(target: Target) -> Tensor | None:
    """w·∂L/∂w of every weight, or summed over what reads a unit."""
    total = None
    for mask, dim, positions in target.places:
        if mask.weight.grad is None:
            continue
        found = mask.full().mul_(mask.weight.grad).float()  # scores.movement_gradient, without a third tensor
        if dim is not None and positions is not None:
            found = found.movedim(dim, 0).flatten(1).sum(1)[positions].sum(1)
        total = found if total is None else total + found
    return total


def _squares(target: Target) -> Tensor | None:
    gradient = target.masks[0].weight.grad
    return None if gradient is None else gradient.detach().float()


def scores_of(target: Target, model: nn.Module, pruning: Pruning) -> Tensor:
    """What ranks the weights (in the weight's shape) or the units (units,) of a target; more is kept."""
    if target.learned is not None:
        return target.learned.detach()
    mask = target.masks[0]
    if pruning.method == "random":
        size = mask.weight.shape if target.group is None else (target.group.units,)
        seed = pruning.seed + zlib.crc32(target.name.encode())  # masks of equal shapes must not be the same
        return scores.random_scores(size, seed).to(mask.weight.device)
    if pruning.method in ("taylor", "fisher"):
        if target.gathered is None:  # no gradient came here: the loss does not depend on it
            return torch.zeros(mask.weight.shape if target.group is None else (target.group.units,)).to(mask.weight)
        is_weights = pruning.method == "fisher" and target.group is None
        return scores.fisher(mask.full(), target.gathered) if is_weights else target.gathered
    return _magnitude(target, model)


def _magnitude(target: Target, model: nn.Module) -> Tensor:
    if target.group is None:
        return target.masks[0].full().abs_()
    return scores.unit_magnitude([*unit_slices(model, target.group.writes), *_reads(target)])


def _reads(target: Target) -> list[Tensor]:
    """The weights that read each unit, hidden ones included: (units, values) per reading module."""
    found = []
    for mask, dim, positions in target.places:
        if dim is not None and positions is not None:
            found.append(mask.full().movedim(dim, 0).flatten(1)[positions].flatten(1))
    return found


def hide_units(target: Target, kept: Tensor) -> None:
    """Hide units: whatever reads them."""
    for mask, dim, positions in target.places:
        if dim is not None and positions is not None:
            hidden = hidden_features(kept, positions, mask.weight.shape[dim])
            mask.hide(hidden.view(mask.hidden.shape))
