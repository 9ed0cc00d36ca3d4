"""Pruning of heads and neurons without retraining: search, rearrange, rescale."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.fisher import diagonal_fisher, unit_gradients
from hfshrink.pruning.search.allocation import search_masks
from hfshrink.pruning.search.costs import kept_cost, mac_costs, measure_block_latencies
from hfshrink.pruning.search.rearrangement import lost_energy, rearrange_units
from hfshrink.pruning.search.rescaling import rescale_units
from hfshrink.pruning.units.groups import UnitGroup, mask_units

RESCALE_TOKENS = 8192
"""Tokens, padding excluded, that least squares sees; each gives as many equations as the model has channels."""


def search_and_tune(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    sparsity: float,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    cost: str = "macs",
    sequence_length: int,
    rearrange: bool = True,
    rescale: bool = True,
    halfway: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Choose units under a budget, mask the others, and tune the kept ones (Kwon et al. 2022, arXiv:2204.09656).

    Importance is the diagonal Fisher information of unit masks, `search_masks` chooses, `rearrange_units` swaps within
    each group, `rescale_units` folds least squares multipliers into the reading weights. Nothing is drawn at random.

    Args:
        model: Masked and rescaled in place, not cut.
        groups: Heads and neurons of it, as `find_units` returns them.
        sparsity: Share of the cost of these blocks to take off, in [0, 1).
        batches: Inputs with labels on the model's device; 2,048 rows serve the paper. About `RESCALE_TOKENS`
            of their tokens serve least squares.
        cost: "macs", or "latency" measured per shape of block on this machine.
        sequence_length: Tokens per example that costs are counted at.
        rearrange: Whether to swap units by the off-diagonal Fisher information.
        rescale: Whether to solve for multipliers.
        halfway: Whether least squares aims at the model under half the sparsity, as the paper does, and not at the
            dense one.

    Returns:
        Group name -> booleans (units,); and JSON-safe results: MACs of these blocks for one example before and after,
        predicted milliseconds (None where not measured), per group the units kept, the lost energy before and after
        rearrangement and what rescaling did, and wall-clock seconds per stage.

    Raises:
        SettingError: A setting out of range, no labels, or a sparsity that would empty a group.
        UnsupportedModelError: Units or layers that the method does not serve.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfshrink.pruning.units.groups import find_units
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}
        >>> kept, results = search_and_tune(model, find_units(model, "neurons"), 0.5, [batch], sequence_length=4)
        >>> results["macs_before"], results["macs_after"], results["groups"]["bert.encoder.layer.0.neurons"]["kept"]
        (384, 192, 3)
    """
    _check(groups, sparsity, cost)
    seconds: dict[str, float] = {}
    report: dict[str, dict[str, Any]] = {group.name: {"units": group.units} for group in groups}
    with _timed(seconds, "costs"):
        macs = mac_costs(model, groups, sequence_length)
        latencies = measure_block_latencies(model, groups, sequence_length) if cost == "latency" else None
    with _timed(seconds, "gradients"):
        gradients = unit_gradients(model, groups, batches)
    with _timed(seconds, "search"):
        importance = {name: diagonal_fisher(found) for name, found in gradients.items()}
        kept = search_masks(importance, latencies or macs, 1 - sparsity)
        target = search_masks(importance, latencies or macs, 1 - sparsity / 2) if halfway else None
    if rearrange:
        with _timed(seconds, "rearrange"):
            for name, found in gradients.items():
                before = lost_energy(found, kept[name])
                kept[name] = rearrange_units(found, kept[name])
                report[name]["lost_energy"] = [before, lost_energy(found, kept[name])]
    if rescale:
        with _timed(seconds, "rescale"):
            some = _some_tokens(batches, sequence_length)
            for name, done in rescale_units(model, groups, kept, some, target=target).items():
                report[name]["rescaling"] = asdict(done)
    for group in groups:
        report[group.name]["kept"] = int(kept[group.name].sum())
        mask_units(model, group, kept[group.name])  # where it is not rescaled; a second time it changes nothing
    return kept, {"cost": cost, **_totals(macs, latencies, kept), "groups": report, "seconds": seconds}


def _check(groups: Sequence[UnitGroup], sparsity: float, cost: str) -> None:
    if not 0 <= sparsity < 1:
        raise SettingError(f"sparsity must lie in [0, 1), got {sparsity}.")
    if cost not in ("macs", "latency"):
        raise SettingError(f"cost must be 'macs' or 'latency', got {cost!r}.")
    wrong = [group.name for group in groups if group.structure not in ("heads", "neurons")]
    if wrong or not groups:
        raise SettingError(
            f"This method needs groups of heads or neurons, got {len(groups)} groups"
            + (f", among them {wrong[0]}." if wrong else ".")
        )


def _some_tokens(batches: Sequence[Mapping[str, Tensor]], sequence_length: int) -> list[Mapping[str, Tensor]]:
    """Batches spread evenly over all, long and short ones, that hold about `RESCALE_TOKENS` together.

    Without a mask each row counts as `sequence_length`.
    """
    masks = [batch.get("attention_mask") for batch in batches]
    tokens = [
        len(next(iter(batch.values()))) * sequence_length if mask is None else int((mask != 0).sum())
        for batch, mask in zip(batches, masks, strict=True)
    ]
    taken = max(1, min(len(batches), round(len(batches) * RESCALE_TOKENS / max(1, sum(tokens)))))
    return [batches[number * len(batches) // taken] for number in range(taken)]


def _totals(
    macs: Mapping[str, Tensor], latencies: Mapping[str, Tensor] | None, kept: Mapping[str, Tensor]
) -> dict[str, Any]:
    before, after = kept_cost(macs), kept_cost(macs, kept)
    found: dict[str, Any] = {"macs_before": int(before), "macs_after": int(after), "macs_ratio": after / before}
    dense = None if latencies is None else kept_cost(latencies)
    rest = None if latencies is None else kept_cost(latencies, kept)
    found |= {"latency_ms_before": dense, "latency_ms_after": rest}
    return found | {"latency_ratio": None if dense is None or rest is None else rest / dense}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
