"""From statistics to factored layers: each module is decomposed once, then its rank is decided."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError
from hfshrink.factorization.allocation import Allocation, Size, energy_ranks, fixed_ranks, uniform_ranks
from hfshrink.factorization.convolutions import tucker_factors, tucker_ranks
from hfshrink.factorization.deciding import DropTrial, Factors, budgeted, factor, whole_budget
from hfshrink.factorization.request import Request
from hfshrink.factorization.sites import matrix, size_of
from hfshrink.factorization.statistics import layer_statistics, read_rows, row_energies
from hfshrink.layers import CompressedLayer, TuckerConv2d
from hfshrink.modules import replace_module
from hfshrink.terminal import progress

SOURCES = {
    "none": "Eckart and Young 1936, doi:10.1007/BF02288367",
    "fisher": "Hsu et al. 2022, arXiv:2207.00112",
    "activation": "Wang et al. 2024, arXiv:2403.07378",
    "fisher+activation": "Hsu et al. 2022, arXiv:2207.00112; Wang et al. 2024, arXiv:2403.07378",
}
LARGE_ERROR = 0.5
"""Share of a module's energy whose loss is worth a warning."""

logger = logging.getLogger(__name__)


@dataclass
class Made:
    """The layers that shall stand in the model, and what there is to say about them.

    Attributes:
        layers: Module -> its factored layer.
        reasons: Module that stays dense -> why.
        errors: Module -> share of its (weighted) energy that is lost.
        tokens: Most that a module saw.
        facts: What was measured on the way.
    """

    layers: dict[str, CompressedLayer] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, module: nn.Module, found: Factors, rank: int, form: str) -> None:
        """Keep the layer of a rank."""
        self.layers[name], self.errors[name] = found.layer(module, rank, form), found.relative_error(rank)

    def results(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """For the record: rank, kept ratio and relative error of each module that was factored."""
        dense = {name: module.weight.numel() for name, module in modules.items()}
        kept = {name: _weights(layer) for name, layer in self.layers.items()}
        total = sum(dense.values())
        return {
            "kept_ratio": round(1 - sum(dense[name] - kept[name] for name in kept) / total, 6),
            "ranks": {name: _rank(layer) for name, layer in self.layers.items()},
            "kept_ratios": {name: round(kept[name] / dense[name], 6) for name in kept},
            "relative_errors": {name: float(f"{self.errors[name]:.6g}") for name in self.layers},
            **({"tokens": self.tokens} if self.tokens else {}),
            **self.facts,
        }


def make(request: Request, modules: Mapping[str, nn.Module]) -> Made:
    """The factored layers of a request; the model is left as it is.

    Raises:
        SettingError: See `factorize`. With `update_inputs` the modules that came before are factored then.
        BudgetError: The budget can't be met.
    """
    if request.form == "tucker":
        return _with_tucker(request, modules)
    sizes = {name: size_of(module, request.form) for name, module in modules.items()}
    if request.size in ("rank", "rank_ratio"):
        ranks = _known_ranks(request, sizes)
        return _layer_by_layer(request, modules, ranks, lambda name, _: ranks[name])
    if request.size == "energy":
        return _by_energy(request, modules, sizes)
    return _by_budget(request, modules, sizes)


def warn(made: Made, modules: int) -> None:
    """Log what a user of `modules` modules will not expect: nothing gained, or much lost."""
    if not made.layers:
        name, reason = next(iter(made.reasons.items()))
        logger.warning("factorize: all %d modules stay dense; %s: %s.", modules, name, reason)
    lossy = [name for name, error in made.errors.items() if error > LARGE_ERROR]
    if lossy:
        names = ", ".join(lossy[:6])
        logger.warning("factorize: %d modules lose more than half of their energy: %s", len(lossy), names)


def _by_energy(request: Request, modules: Mapping[str, nn.Module], sizes: Mapping[str, Size]) -> Made:
    largest, reasons = _largest_ranks(sizes)

    def decide(name: str, found: Factors) -> int | None:
        ranks = energy_ranks(
            {name: found.tails}, {name: sizes[name]}, float(request.energy or 0), request.rank_multiple
        )
        reasons.update(ranks.reasons)
        return ranks[name]

    made = _layer_by_layer(request, modules, largest, decide)
    made.reasons |= reasons
    return made


def _by_budget(request: Request, modules: Mapping[str, nn.Module], sizes: Mapping[str, Size]) -> Made:
    """All modules are decomposed, then ranks are spread; with `update_inputs` the factors are fitted anew to those."""
    limit, multiple = request.max_parameters or request.max_size_bytes, request.rank_multiple
    costs, budget = dict(sizes), 0
    if limit is not None:
        is_bytes = request.max_parameters is None
        costs, budget = whole_budget(request.model, modules, sizes, limit, multiple, in_bytes=is_bytes)
    largest, reasons = _largest_ranks(sizes)
    budget -= sum(costs.pop(name).dense_parameters for name in reasons)
    made = Made(reasons=reasons)
    if not largest:
        return made
    kept: dict[str, Factors] = {}
    for name, stats in _statistics(request, {name: modules[name] for name in largest}, made, update_inputs=False):
        kept[name] = factor(name, modules[name], largest[name], stats, request.form)
    budget -= sum(costs.pop(name).dense_parameters for name in largest if name not in kept)
    if not kept:
        return made
    energies = _energies(request, {name: modules[name] for name in kept})

    def allocate(budget: int) -> Allocation:
        return budgeted(kept, costs, max(budget, 1), multiple, request.weighting, energies)

    if limit is None:
        trial = DropTrial(request.model, kept, costs, request.form, allocate)
        ranks, made.facts = trial.search(
            request.calibration, request.metric, request.processor, float(request.max_drop or 0), multiple
        )
    else:
        ranks = allocate(budget)
    if request.update_inputs:
        again = _layer_by_layer(request, modules, ranks, lambda name, _: ranks[name])
        again.reasons |= made.reasons
        return again
    for name, rank in ranks.items():
        if rank is not None:
            made.put(name, modules[name], kept[name], rank, request.form)
    made.reasons |= ranks.reasons
    return made


def _energies(request: Request, modules: Mapping[str, nn.Module]) -> dict[str, float] | None:
    """What the gradients of the loss say of whole modules, where there are rows and the factors do not know it yet."""
    if request.calibration is None or "fisher" in request.weighting:
        return None
    return row_energies(request.model, modules, request.data(), request.form)


def _layer_by_layer(
    request: Request,
    modules: Mapping[str, nn.Module],
    ranks: Mapping[str, int | None],
    decide: Callable[[str, Factors], int | None],
) -> Made:
    """Decompose each module up to its rank in `ranks`, decide how much of it to keep, and forget the rest."""
    made = Made(reasons=dict(ranks.reasons) if isinstance(ranks, Allocation) else {})
    chosen = {name: modules[name] for name, rank in ranks.items() if rank is not None}
    for name, stats in _statistics(request, chosen, made, update_inputs=request.update_inputs) if chosen else ():
        found = factor(name, modules[name], ranks[name] or 0, stats, request.form)
        rank = decide(name, found)
        if rank is None:
            continue
        made.put(name, modules[name], found, rank, request.form)
        if request.update_inputs:
            replace_module(request.model, name, made.layers[name])
    if request.update_inputs:
        for name in made.layers:
            replace_module(request.model, name, modules[name])
    made.layers = {name: made.layers[name] for name in modules if name in made.layers}
    return made


def _largest_ranks(sizes: Mapping[str, Size]) -> tuple[dict[str, int], dict[str, str]]:
    """Modules that some rank makes smaller -> the largest such; and the others -> the reason."""
    largest = {name: size.largest_rank for name, size in sizes.items() if size.largest_rank}
    reasons = {
        name: f"no rank saves parameters: break-even rank is {size.break_even:.3g}"
        for name, size in sizes.items()
        if not size.largest_rank
    }
    return largest, reasons


def _rank(layer: Any) -> Any:
    """The rank of a factored layer, or both of Tucker's."""
    return layer.rank if hasattr(layer, "rank") else [layer.in_rank, layer.out_rank]


def _weights(layer: nn.Module) -> int:
    """Parameters of a layer without its bias."""
    return sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")


def _with_tucker(request: Request, modules: Mapping[str, nn.Module]) -> Made:
    """Tucker-2 of the convolutions, which has a pair of ranks and no tails; the others as ever."""
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    others = {name: module for name, module in modules.items() if name not in convs}
    made, ratio = Made(), float(request.rank_ratio or 0)
    if others:
        ranks = _known_ranks(request, {name: size_of(module) for name, module in others.items()})
        made = _layer_by_layer(request, others, ranks, lambda name, _: ranks[name])
    for name, conv in progress(convs.items(), "factorize"):
        pair = _tucker_pair(conv, ratio, request.rank_multiple)
        if pair is None:
            made.reasons[name] = f"no pair of Tucker ranks keeps {ratio:g} of its parameters"
            continue
        layer = TuckerConv2d.from_dense(conv, *tucker_factors(conv.weight, pair))
        lost, whole = (layer.to_dense().weight - conv.weight).detach().double().norm(), conv.weight.detach().norm()
        made.layers[name], made.errors[name] = layer, float(lost / whole) ** 2 if whole else 0.0
    made.layers = {name: made.layers[name] for name in modules if name in made.layers}
    return made


def _tucker_pair(conv: nn.Conv2d, ratio: float, multiple: int) -> tuple[int, int] | None:
    """The ranks within a ratio: multiples, single ones where none fits, None where those don't either."""
    for step in dict.fromkeys((multiple, 1)):
        with suppress(SettingError):
            return tucker_ranks(conv.weight, ratio, step)
    return None


def _known_ranks(request: Request, sizes: Mapping[str, Size]) -> Allocation:
    """One ratio or one rank for all modules."""
    if request.rank_ratio is not None:
        return uniform_ranks(sizes, request.rank_ratio, request.rank_multiple)
    ranks = fixed_ranks(sizes, request.rank or 0)
    if not any(ranks.values()):
        widest = max(sizes, key=lambda name: sizes[name].largest_rank)
        raise SettingError(
            f"rank must be in 1..{sizes[widest].largest_rank} to make any of {len(sizes)} modules smaller, got "
            f"{request.rank} ({widest} has the highest break-even rank, {sizes[widest].break_even:.4g})."
        )
    return ranks


def _statistics(
    request: Request, modules: Mapping[str, nn.Module], made: Made, *, update_inputs: bool
) -> Iterator[tuple[str, ModuleStatistics]]:
    """The statistics of one module after the other; those that saw too little stay dense."""
    batches = read_rows(request.data(), request.weighting)
    how: dict[str, Any] = {"form": request.form, "update_inputs": update_inputs}
    layers = layer_statistics(request.model, modules, request.weighting, batches, **how)
    for stats in progress(layers, "factorize"):
        for name in list(stats):  # taken out, so that each Gram matrix goes when its module is done
            found = stats.pop(name)
            made.tokens = max(made.tokens, found.tokens)
            if found.tokens and found.input_gram is None:
                made.reasons[name] = (
                    f"it saw {found.tokens:,} tokens, fewer than its {matrix(modules[name]).shape[1]:,} input features"
                )
            else:
                yield name, found
