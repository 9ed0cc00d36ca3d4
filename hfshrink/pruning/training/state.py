"""The masks of one training run: updated on schedule, applied after every step, saved and restored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError
from hfshrink.pruning.criteria.ranking import hidden_in_pattern, hidden_weights, kept_units
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.targets import (
    Target,
    competitors,
    gather_gradients,
    hide_units,
    make_targets,
    scores_of,
)
from hfshrink.pruning.units.weights import matrix

UPDATES = 25
"""Updates of the masks in a run, where the settings don't say how often."""


class TrainingMasks:
    """The masks of a model while it trains; nothing of it stays on the model but zeros.

    Hidden weights are zeros in the model itself, so every checkpoint holds the pruned weights under their plain names.

    Attributes:
        targets: What competes.
        sparsity: What the schedule asked for at the last update.
    """

    def __init__(self, model: nn.Module, pruning: Pruning) -> None:
        """Select what can be pruned; nothing is hidden yet."""
        self.model, self.pruning = model, pruning
        self.targets: list[Target] = make_targets(model, pruning)
        self.sparsity = 0.0

    def learned(self) -> list[nn.Parameter]:
        """The trained scores."""
        return [target.learned for target in self.targets if target.learned is not None]

    def before_step(self, scale: float = 1.0) -> None:
        """Take what the scores need from the gradients, and hide those of hidden weights."""
        for target in self.targets:
            gather_gradients(target, self.pruning, scale, len(self.targets))

    def after_step(self) -> None:
        """Zeros again where the optimizer moved hidden weights."""
        for target in self.targets:
            for mask in target.masks:
                mask.reapply()

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether the masks change after this optimizer step, counted from 1; in the cool-down they stay."""
        progress = step / max_steps
        asked = self.pruning.at(progress)
        if progress >= 1 - self.pruning.cooldown:
            return asked != self.sparsity
        if self.sparsity < self.pruning.initial_sparsity:
            return True
        return bool(asked) and step % (self.pruning.update_steps or max(1, max_steps // UPDATES)) == 0

    def update(self, sparsity: float) -> None:
        """Choose anew what is hidden; what was hidden may come back."""
        self.sparsity = sparsity
        ranked = {target.name: scores_of(target, self.model, self.pruning) for target in self.targets}
        if self.pruning.is_structured:
            self._update_units(ranked, sparsity)
        else:
            self._update_weights(ranked, sparsity)

    def _update_units(self, ranked: Mapping[str, Tensor], sparsity: float) -> None:
        for rivals in competitors(self.targets):
            found = {target.name: ranked[target.name] for target in rivals}
            kept = kept_units(found, sparsity, scope=self.pruning.ranked, max_sparsity=self.pruning.max_sparsity)
            for target in rivals:
                hide_units(target, kept[target.name])

    def _update_weights(self, ranked: Mapping[str, Tensor], sparsity: float) -> None:
        if self.pruning.pattern is None:
            hidden = hidden_weights(
                ranked,
                sparsity,
                scope=self.pruning.ranked,
                max_sparsity=self.pruning.max_sparsity,
                signed=self.pruning.is_learned,
            )
        else:
            lowest = min(float(values.min()) for values in ranked.values())
            modules = {target.name: target.module for target in self.targets if target.module is not None}
            views = {name: matrix(module, ranked[name]) - min(lowest, 0.0) for name, module in modules.items()}
            hidden = hidden_in_pattern(views, self.pruning.pattern, sparsity / self.pruning.final)
            # transposed where the view was, then the kernels of convolutions back in their shape
            hidden = {name: matrix(modules[name], mask).reshape(ranked[name].shape) for name, mask in hidden.items()}
        for target in self.targets:
            target.masks[0].hide(hidden[target.name])

    def reveal(self) -> None:
        """Bring back everything that is hidden."""
        for target in self.targets:
            for mask in target.masks:
                mask.hide(torch.zeros_like(mask.hidden))
        self.sparsity = 0.0

    def measured(self) -> float:
        """Share of the weights, or of the units, that is hidden now."""
        masks = self.kept() or {t.name: ~t.masks[0].hidden for t in self.targets}
        kept, total = (
            sum(int(count(mask)) for mask in masks.values()) for count in (torch.count_nonzero, torch.numel)
        )
        return 1 - kept / total

    def kept(self) -> dict[str, Tensor]:
        """Group name -> booleans (units,) of the units that are in use now; empty for single weights."""
        found = {}
        for target in self.targets:
            if target.group is not None:
                mask, _, positions = target.places[0]
                found[target.name] = ~mask.hidden.flatten()[positions].all(dim=1).cpu()
        return found

    # -- interrupted runs

    def state(self) -> dict[str, Tensor]:
        """Everything that the model itself does not hold, by name."""
        found: dict[str, Tensor] = {"sparsity": torch.tensor(self.sparsity, dtype=torch.float64)}
        for target in self.targets:
            for mask in target.masks:
                found |= {f"hidden.{mask.name}": mask.hidden, f"aside.{mask.name}": mask.aside}
            for name in ("learned", "gathered"):
                value = getattr(target, name)
                if value is not None:
                    found[f"{name}.{target.name}"] = value.detach()
        return found

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take up a saved state.

        Raises:
            CheckpointError: It is of another model or of other settings.
        """
        own = self.state()
        optional = {f"gathered.{target.name}" for target in self.targets}
        odd = sorted((set(own) ^ set(saved)) - optional)
        odd += [name for name in own if name in saved and own[name].shape != saved[name].shape]
        if odd:
            raise CheckpointError(
                f"The saved masks don't fit this run: {', '.join(odd[:3])}. Resume with the same model and pruning=."
            )
        self.sparsity = float(saved["sparsity"])
        for target in self.targets:
            _restore(target, saved)


def _restore(target: Target, saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for mask in target.masks:
            mask.set_hidden(saved[f"hidden.{mask.name}"].to(mask.weight.device))
            mask.aside = saved[f"aside.{mask.name}"].to(mask.weight.device, mask.weight.dtype)
            mask.reapply()
        if target.learned is not None:
            target.learned.copy_(saved[f"learned.{target.name}"])
        if f"gathered.{target.name}" in saved:
            target.gathered = saved[f"gathered.{target.name}"].to(target.masks[0].weight.device)
