"""What factoring would do to one place of a model, on trial: for `hfshrink.measure_sensitivity`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.calibration import ModuleStatistics
from hfshrink.factorization.factors import Decomposition
from hfshrink.factorization.sites import size_of
from hfshrink.factorization.tails import (
    LEVELS,
    check_weighting,
    checked_levels,
    decompose_module,
    factor_places,
    trial_rank,
)
from hfshrink.sensitivity import Perturbation, restored


def perturbation(
    weighting: str = "none",
    levels: Sequence[float] = LEVELS,
    *,
    statistics: Mapping[str, ModuleStatistics] | None = None,
) -> Perturbation:
    """Factoring on trial: the weight of one module at a time as up · down, with a rank ratio as level.

    A place is a Linear, Conv1D or Conv2d (in the form "channel") that could be factored: not tied, not grouped, and
    large enough that some rank saves parameters; task heads too. The rank of a ratio ρ is ⌊ρ · mn/(m+n)⌋, at least 1;
    at 1 the module stays as it is. The spectrum of a place is computed once for all its levels.

    Args:
        weighting: "none", "fisher", "activation" or "fisher+activation".
        levels: Rank ratios (kept / dense parameters) in (0, 1].
        statistics: Module -> what `collect_statistics` found; needed by all weightings but "none". Modules without are
            no places.

    Raises:
        SettingError: An unknown weighting, a level out of range, or no statistics.

    Example:
        >>> trial = perturbation(levels=(0.5, 0.25))
        >>> trial.title, trial.levels
        ('factorize, weighting none', (0.5, 0.25))
    """
    check_weighting(weighting, statistics)
    return _Factoring(weighting, tuple(checked_levels(levels)), statistics)


class _Factoring:
    """The weight of one module as the product of its factors."""

    def __init__(
        self, weighting: str, levels: Sequence[float], statistics: Mapping[str, ModuleStatistics] | None
    ) -> None:
        self.weighting, self.statistics = weighting, statistics
        self.title = f"factorize, weighting {weighting}"
        self.levels = levels
        self._last: tuple[str, Tensor, Decomposition] | None = None

    def places(self, model: nn.Module) -> list[str]:
        """Names of the modules that can be factored."""
        return list(factor_places(model, self.weighting, self.statistics))

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        """Put up · down in the place of a weight while the block runs."""
        checked_levels((level,))
        module: Any = model.get_submodule(place)
        rank, weight = trial_rank(place, size_of(module), level), module.weight.detach()
        with restored(weight):
            if rank is not None:
                up, down = self._decomposition(place, module).factors(rank)
                product = up @ down
                weight.copy_(product.T if isinstance(module, Conv1D) else product.reshape(weight.shape))
            yield

    def _decomposition(self, place: str, module: Any) -> Decomposition:
        """That of the last call, if place and weight are the same: one place comes at all levels in turn."""
        if self._last is not None and self._last[0] == place and _is_same(self._last[1], module.weight):
            return self._last[2]
        self._last = None  # frees the memory first
        found = decompose_module(place, module, self.weighting, self.statistics)
        self._last = (place, module.weight.detach().clone(), found)
        return found


def _is_same(kept: Tensor, weight: Tensor) -> bool:
    return kept.device == weight.device and kept.dtype == weight.dtype and torch.equal(kept, weight)
