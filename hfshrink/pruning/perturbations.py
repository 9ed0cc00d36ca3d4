"""What pruning would do to one place of a model, on trial: for `hfshrink.measure_sensitivity`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.modules import layer_stack
from hfshrink.pruning.criteria.ranking import hidden_in_pattern
from hfshrink.pruning.criteria.scores import magnitude, random_scores, unit_magnitude
from hfshrink.pruning.criteria.thresholds import check_pattern, keep_largest
from hfshrink.pruning.training.settings import check_share, read_pattern
from hfshrink.pruning.units.groups import STRUCTURES, UnitGroup, find_units, mask_units, unit_slices
from hfshrink.pruning.units.weights import matrix, prunable
from hfshrink.sensitivity import Perturbation, restored

TRIAL_METHODS = ("magnitude", "random")
TRIAL_LEVELS = (0.3, 0.5, 0.7, 0.9)


def perturbation(
    structure: str = "unstructured",
    method: str = "magnitude",
    levels: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> Perturbation:
    """Pruning on trial, one place at a time.

    A place is a module for single weights and N:M, a group of units (the heads or neurons of a layer, the channels
    that go together) for units, and a layer for layers. A level is the share of it that goes; N:M has one level,
    1 − n/m, and a layer goes as a whole, level 1.

    Args:
        structure: "unstructured", N:M such as "2:4", "heads", "neurons", "heads+neurons", "channels" or "layers".
        method: "magnitude", of units that of the weights that read them, or "random".
        levels: Shares in [0, 1); None takes 0.3, 0.5, 0.7 and 0.9, or the only one. At 0 nothing changes.
        seed: Of "random"; the caller's random state stays as it was.

    Raises:
        SettingError: An unknown structure or method, or a level out of range.

    Example:
        >>> trial = perturbation("2:4")
        >>> trial.title, trial.levels
        ('prune 2:4 by magnitude', (0.5,))
    """
    if method not in TRIAL_METHODS:
        raise SettingError(f"method must be one of {', '.join(TRIAL_METHODS)} for a perturbation, got {method!r}.")
    known = ("unstructured", *STRUCTURES, "layers")
    pattern = read_pattern(structure) if isinstance(structure, str) else None
    if structure not in known and pattern is None:
        raise SettingError(f"structure must be one of {', '.join(known)}, N:M such as 2:4, got {structure!r}.")
    if structure == "layers":
        kind: type[_Trial] = _Layers
        only: float | None = 1.0
    elif structure in STRUCTURES:
        kind, only = _Units, None
    else:
        kind, only = _Weights, None if pattern is None else 1 - pattern[0] / pattern[1]
    if levels is not None and not isinstance(levels, Iterable):
        raise SettingError(f"levels must be a list of shares in [0, 1), got {levels!r}.")
    trial = kind(structure, method, seed, only)
    trial.levels = trial.default_levels() if levels is None else tuple(levels)
    for level in trial.levels:
        trial.check(level)
    return trial


class _Trial(ABC):
    """What all trials share: their settings, and the check of a level."""

    def __init__(self, structure: str, method: str, seed: int, only: float | None) -> None:
        self.structure, self.method, self.seed, self.only = structure, method, seed, only
        self.title = f"prune {structure}" + ("" if structure == "layers" else f" by {method}")
        self.levels: Sequence[float] = ()

    def default_levels(self) -> tuple[float, ...]:
        return TRIAL_LEVELS if self.only is None else (self.only,)

    def check(self, level: Any) -> None:
        if self.only is None:
            check_share("A level", level)
        elif level not in (0, self.only):
            raise SettingError(
                f"{self.structure} has the level {self.only:g} only (0 changes nothing), got {level!r}."
            )

    @abstractmethod
    def places(self, model: nn.Module) -> list[str]:
        """Names of what can be damaged."""

    @abstractmethod
    def apply(self, model: nn.Module, place: str, level: float) -> Any:
        """A context in which the model is damaged there."""


class _Weights(_Trial):
    """Single weights of one module, in an N:M pattern or without."""

    def places(self, model: nn.Module) -> list[str]:
        modules = prunable(model)
        pattern = read_pattern(self.structure)
        if pattern is None:
            return list(modules)
        inputs = {name: matrix(module, _weight(module)).shape[1] for name, module in modules.items()}
        fitting = [name for name, number in inputs.items() if number % pattern[1] == 0]
        if not fitting:
            check_pattern(*pattern, max(inputs.values()))
        return fitting

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        self.check(level)
        module = model.get_submodule(place)
        weight = _weight(module)
        with restored(weight):
            if level:
                matrix(module, weight).masked_fill_(self._hidden(module, level), 0)
            yield

    def _hidden(self, module: nn.Module, level: float) -> Tensor:
        weight = matrix(module, _weight(module))
        scores = magnitude(weight) if self.method == "magnitude" else random_scores(weight.shape, self.seed)
        scores, pattern = scores.to(weight.device), read_pattern(self.structure)
        if pattern is not None:
            return hidden_in_pattern({"": scores}, pattern)[""]
        return ~keep_largest(scores, level)


class _Units(_Trial):
    """Units of one group; a unit goes when nothing reads it."""

    groups: dict[str, UnitGroup]

    def places(self, model: nn.Module) -> list[str]:
        self.groups = {group.name: group for group in find_units(model, self.structure)}
        return list(self.groups)

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        self.check(level)
        group = self.groups[place]
        with restored(*(_weight(model.get_submodule(axis.module)) for axis in group.reads)):
            if level:
                mask_units(model, group, keep_largest(self._scores(model, group), level))
            yield

    def _scores(self, model: nn.Module, group: UnitGroup) -> Tensor:
        if self.method == "random":
            return random_scores((group.units,), self.seed)
        return unit_magnitude(unit_slices(model, group.reads)).cpu()


class _Layers(_Trial):
    """One layer that hands on what it gets."""

    def places(self, model: nn.Module) -> list[str]:
        stack, layers = layer_stack(model)
        return [f"{stack}.{number}" for number in range(len(layers))]

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        self.check(level)
        if not level:
            yield
            return
        handle = model.get_submodule(place).register_forward_hook(_skip, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else next(iter(kwargs.values()))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _weight(module: Any) -> Tensor:
    weight: nn.Parameter = module.weight
    return weight.detach()
