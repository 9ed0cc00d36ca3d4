"""Factors of each module, and how many of their ranks it keeps: by a given rank, by energy, by a budget, by a drop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import BudgetError, SettingError
from hfshrink.evaluation import evaluate
from hfshrink.factorization.allocation import LEAST_SHARE, Allocation, Size, budget_ranks
from hfshrink.factorization.drops import ranks_for_drop
from hfshrink.factorization.factors import decompose
from hfshrink.factorization.sites import factored, matrix, takes_rows
from hfshrink.factorization.statistics import row_weights
from hfshrink.factorization.tails import comparable_tails
from hfshrink.layers import CompressedLayer
from hfshrink.measurement import is_lower_better
from hfshrink.modules import replace_module

LEAST_SHARE_OF_LOSS = 0.5
"""`least_share` of `budget_ranks` where errors are in units of the loss."""
HIGHEST = 0.95
"""Largest share of the modules' parameters that is tried where a metric may drop."""


@dataclass(frozen=True)
class Factors:
    """One module's factors at the largest rank that may be asked for, in its weight's dtype, and all errors.

    Attributes:
        up: Shape (m, rank) of the module's matrix (m, n).
        down: Shape (rank, n). The first columns and rows are the factors of each smaller rank.
        tails: Squared weighted error left at rank 0, 1, …; float64.
        input_energy: tr(G) of the Gram matrix that it was weighted by, n without one.
    """

    up: Tensor
    down: Tensor
    tails: Tensor
    input_energy: float

    def layer(self, module: nn.Module, rank: int, form: str) -> CompressedLayer:
        """The layer of a rank in the place of the module."""
        return factored(module, self.up[:, :rank], self.down[:rank], form)

    def relative_error(self, rank: int) -> float:
        """Share of the (weighted) energy that is lost."""
        whole = float(self.tails[0])
        return max(float(self.tails[rank]), 0.0) / whole if whole > 0 else 0.0


def factor(name: str, module: nn.Module, rank: int, stats: ModuleStatistics, form: str = "channel") -> Factors:
    """Decompose a module once.

    Args:
        name: For errors.
        module: As `factorable` gives it.
        rank: The largest that will be asked for.
        stats: Its Gram matrix and squared gradients, as far as the weighting has them.
        form: Of convolutions: "channel" or "separable".

    Raises:
        SettingError: What `decompose` says, with the module's name.
    """
    view = matrix(module, form=form)
    rows = row_weights(module, stats) if takes_rows(module, form) else None
    gram = stats.input_gram
    try:
        found = decompose(view, rank, row_weight=rows, input_gram=gram)
    except SettingError as error:
        raise SettingError(f"{error} ({name})") from None
    up, down = found.factors(rank)
    energy = view.shape[1] if gram is None else float(gram.diagonal().sum())
    return Factors(up.to(view.dtype), down.to(view.dtype), found.tails.cpu(), energy)


def whole_budget(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sizes: Mapping[str, Size],
    limit: int,
    multiple: int,
    *,
    in_bytes: bool,
) -> tuple[dict[str, Size], int]:
    """What a limit for the whole model leaves to the modules that are factored.

    Args:
        model: All of it counts: parameters, or the bytes of all tensors that are saved, tied ones once.
        modules: Name -> module.
        sizes: Name -> its size in parameters.
        limit: Parameters or bytes.
        multiple: Of ranks.
        in_bytes: Whether the limit is in bytes.

    Returns:
        The sizes in the limit's unit, and the modules' part of it.

    Raises:
        BudgetError: Not even the smallest ranks fit; the message tells the least that is possible.
    """
    if in_bytes:
        sizes = sizes_in_bytes(sizes, {name: matrix(module).element_size() for name, module in modules.items()})
        total = sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())
    else:
        total = sum(parameter.numel() for parameter in model.parameters())
    return dict(sizes), budget_left(total, sizes, limit, multiple, in_bytes=in_bytes)


def sizes_in_bytes(sizes: Mapping[str, Size], widths: Mapping[str, int]) -> dict[str, Size]:
    """The sizes of modules in bytes, from those in parameters and the bytes of one."""
    return {
        n: Size(s.dense_parameters * widths[n], s.parameters_per_rank * widths[n], s.full_rank)
        for n, s in sizes.items()
    }


def budget_left(total: int, sizes: Mapping[str, Size], limit: int, multiple: int, *, in_bytes: bool) -> int:
    """The modules' part of a limit for a model that takes `total`, all in one unit; see `whole_budget`."""
    dense = sum(size.dense_parameters for size in sizes.values())
    least = total - dense + sum(_fewest(size, multiple) for size in sizes.values())
    if limit < least:
        key, unit = ("max_size_bytes", "bytes") if in_bytes else ("max_parameters", "parameters")
        raise BudgetError(
            f"{key}={limit:,} can't be reached: the nearest is {least:,} of {total:,} {unit}, with ranks of "
            f"{multiple} everywhere; {total - dense:,} {unit} are of modules that are not factored. Allow as many, "
            "take a smaller rank_multiple, or include more modules."
        )
    return limit - (total - dense)


def budgeted(
    kept: Mapping[str, Factors],
    sizes: Mapping[str, Size],
    budget: int,
    multiple: int,
    weighting: str,
    row_energy: Mapping[str, float] | None = None,
) -> Allocation:
    """The ranks that lose least within a budget, in the unit of the sizes.

    With gradients (`row_energy`, or a Fisher weighting) errors are in units of the loss, and a module may lose half of
    what one ratio for all would give it; without, little may be moved.
    """
    energy = {name: found.input_energy for name, found in kept.items()}
    tails = comparable_tails({name: found.tails for name, found in kept.items()}, weighting, energy, row_energy)
    share = LEAST_SHARE if row_energy is None and "fisher" not in weighting else LEAST_SHARE_OF_LOSS
    return budget_ranks(tails, sizes, budget, multiple, least_share=share)


def _fewest(size: Size, multiple: int) -> int:
    ranks = size.ranks(multiple)
    return size.parameters(ranks[0]) if ranks else size.dense_parameters


@dataclass
class DropTrial:
    """Measures how far a metric falls at a budget, on a copy of the model that is made once.

    Args:
        model: The dense model.
        kept: Name -> factors of each module.
        sizes: Name -> size.
        form: Of convolutions.
        allocate: Budget in parameters of these modules -> ranks.
    """

    model: Any
    kept: Mapping[str, Factors]
    sizes: Mapping[str, Size]
    form: str
    allocate: Callable[[int], Allocation]

    def search(
        self, rows: Any, metric: Any, processor: Any, max_drop: float, multiple: int
    ) -> tuple[Allocation, dict[str, Any]]:
        """The ranks of the smallest budget that holds the bound, and what was measured, for the record.

        Raises:
            SettingError: No labels, an unknown metric, or one that is undefined for the dense model.
            BudgetError: No budget holds it.
        """
        score = evaluate(self.model, rows, metric, processor=processor).main
        if score.value is None:
            raise SettingError(f"The metric {score.metric} is undefined for the dense model on these rows.")
        falls = is_lower_better(score.metric)
        trial = copy.deepcopy(self.model)
        dense = {name: trial.get_submodule(name) for name in self.kept}
        total = sum(size.dense_parameters for size in self.sizes.values())
        values: dict[float, float | None] = {}

        def drop_at(ratio: float) -> float | None:
            ranks = self.allocate(math.ceil(ratio * total))
            for name, rank in ranks.items():
                layer = dense[name] if rank is None else self.kept[name].layer(dense[name], rank, self.form)
                replace_module(trial, name, layer)
            value = evaluate(trial, rows, metric, processor=processor).main.value
            values[ratio] = value
            if value is None or score.value is None:
                return None
            return value - score.value if falls else score.value - value

        low = min(sum(_fewest(size, multiple) for size in self.sizes.values()) / total, HIGHEST)
        found = ranks_for_drop(drop_at, low, HIGHEST, max_drop)
        tries = [{"rank_ratio": ratio, "drop": drop, "value": values[ratio]} for ratio, drop in found.tries]
        facts = {"metric": score.metric, "dense": score.value, "max_drop": max_drop, "tries": tries}
        return self.allocate(math.ceil(found.budget * total)), {"drops": facts}
