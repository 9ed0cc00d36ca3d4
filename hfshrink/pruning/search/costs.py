"""What units cost: multiply-accumulate operations, or milliseconds measured per shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.pruning.units.groups import UnitGroup, weight_axis

ACTIVATIONS = ("hidden_act", "activation", "activation_function", "hidden_activation")
"""How the families' configs spell the activation of the feed-forward."""


@dataclass(frozen=True)
class BlockShape:
    """What the time of a block depends on. Blocks of one shape are timed once.

    Attributes:
        structure: "heads" or "neurons".
        units: Of the dense block.
        writes: Per writing module (its input features, output features per unit).
        reads: Of the reading module (input features per unit, its output features).
    """

    structure: str
    units: int
    writes: tuple[tuple[int, int], ...]
    reads: tuple[int, int]


def block_shape(model: nn.Module, group: UnitGroup) -> BlockShape:
    """The shape of the block that a group's units make up."""

    def other(name: str, side: str) -> int:
        module: Any = model.get_submodule(name)
        return int(module.weight.shape[1 - weight_axis(module, side)])

    writes = tuple((other(axis.module, "out"), axis.positions.shape[1]) for axis in group.writes)
    read = group.reads[0]
    return BlockShape(group.structure, group.units, writes, (read.positions.shape[1], other(read.module, "in")))


def unit_macs(shape: BlockShape, sequence_length: int) -> int:
    """Multiply-accumulate operations of one unit and one example of S tokens (Kwon et al. 2022, arXiv:2204.09656).

    A neuron: S · (Σ d_in + d_out). A head of size h: the same with h columns each, and 2 · S² · h for scores and
    values. A causal mask saves nothing here. Of grouped queries a unit is a key-value head with all of its queries.

    Example:
        >>> unit_macs(BlockShape("neurons", 6, ((8, 1),), (1, 8)), sequence_length=10)
        160
        >>> unit_macs(BlockShape("heads", 2, ((8, 4), (8, 4), (8, 4)), (4, 8)), sequence_length=10)
        2080
    """
    per_unit, outputs = shape.reads
    per_token = sum(inputs * k for inputs, k in shape.writes) + per_unit * outputs
    attention = 2 * sequence_length**2 * per_unit if shape.structure == "heads" else 0
    return sequence_length * per_token + attention


def mac_costs(model: nn.Module, groups: Sequence[UnitGroup], sequence_length: int) -> dict[str, Tensor]:
    """MACs of each group by the number of units that it keeps, for one example.

    Args:
        model: The model, not yet cut.
        groups: Heads and neurons of it.
        sequence_length: Tokens of the example.

    Returns:
        Group name -> costs (units + 1,), float64: entry n is the cost of n units.

    Raises:
        SettingError: `sequence_length` is below 1.
    """
    _check_length(sequence_length)
    found = {}
    for group in groups:
        shape = block_shape(model, group)
        found[group.name] = unit_macs(shape, sequence_length) * torch.arange(shape.units + 1).double()
    return found


def measure_block_latencies(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    sequence_length: int,
    *,
    batch_size: int = 1,
    levels: int = 13,
    repeats: int = 9,
) -> dict[str, Tensor]:
    """Milliseconds of each block by the number of units that it keeps, on this machine (ZipLM, arXiv:2302.04089).

    One table per shape of block: the Linears, the attention or activation between them, with random float32 weights
    on the CPU, one thread. Sizes take turns, so that a busy moment hits all of them; the median of the thread's
    processor time counts, made monotone, and sizes between the timed ones are interpolated. Norms, residuals and
    embeddings are in no table.

    Args:
        model: The model, not yet cut.
        groups: Heads and neurons of it.
        sequence_length: Tokens per row.
        batch_size: Rows.
        levels: How many sizes are timed per shape, evenly spread from one unit to all of them.
        repeats: How often each is timed.

    Returns:
        Group name -> milliseconds (units + 1,), float64; entry n for n units, entry 0 is 0.

    Raises:
        SettingError: A number that is too small.
    """
    _check_length(sequence_length)
    for name, number, least in (("batch_size", batch_size, 1), ("levels", levels, 2), ("repeats", repeats, 1)):
        if number < least:
            raise SettingError(f"{name} must be at least {least}, got {number}.")
    activation = _activation(model)
    shapes = {group.name: block_shape(model, group) for group in groups}
    tables = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in dict.fromkeys(shapes.values()):
            sizes = sorted({round(size) for size in np.linspace(1, shape.units, min(levels, shape.units))})
            blocks = block_calls(shape, sizes, (batch_size, sequence_length), activation)
            times = monotone(torch.tensor(_median_times(blocks, repeats), dtype=torch.float64))
            known = np.interp(np.arange(shape.units + 1), [0, *sizes], [0.0, *times.tolist()])
            tables[shape] = torch.from_numpy(known)
    finally:
        torch.set_num_threads(threads)
    return {name: tables[shape].clone() for name, shape in shapes.items()}


def monotone(times: Tensor) -> Tensor:
    """Times that never fall: the mean of the running maximum and of the running minimum from behind.

    Example:
        >>> monotone(torch.tensor([1.0, 3.0, 2.0, 4.0])).tolist()
        [1.0, 2.5, 2.5, 4.0]
    """
    return (times.cummax(dim=0).values + times.flip(0).cummin(dim=0).values.flip(0)) / 2


def kept_cost(costs: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None) -> float:
    """The sum of what the kept units of all groups cost; None keeps all."""
    if kept is None:
        return float(sum(table[-1] for table in costs.values()))
    return float(sum(table[int(kept[name].sum())] for name, table in costs.items()))


def block_calls(
    shape: BlockShape, sizes: Sequence[int], rows: tuple[int, int], activation: Callable[[Tensor], Tensor]
) -> list[Callable[[], Tensor]]:
    """One call per size, that runs a block of so many units on a random input (batch, sequence)."""
    generator = torch.Generator().manual_seed(0)

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator) / dims[-1] ** 0.5

    per_unit, outputs = shape.reads
    ups = [random(shape.units * k, inputs) for inputs, k in shape.writes]
    down = random(outputs * shape.units * per_unit)  # cut as memory, so that every size reads contiguous weights
    x = random(*rows, shape.writes[0][0])

    def block(size: int) -> Callable[[], Tensor]:
        weights = [up[: size * k] for up, (_, k) in zip(ups, shape.writes, strict=True)]
        last = down[: outputs * size * per_unit].view(outputs, -1)
        if shape.structure == "heads":
            return lambda: F.linear(_attend(x, weights, min(per_unit, *(k for _, k in shape.writes))), last)
        return lambda: F.linear(_gated(x, weights, activation), last)

    return [block(size) for size in sizes]


def _attend(x: Tensor, weights: Sequence[Tensor], head_size: int) -> Tensor:
    """Attention (batch, sequence, heads · size) by q, k and v apart, or as one weight."""
    parts = F.linear(x, weights[0]).chunk(3, dim=-1) if len(weights) == 1 else [F.linear(x, w) for w in weights]
    q, k, v = (part.unflatten(-1, (-1, head_size)).transpose(1, 2) for part in parts)
    queries = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(queries, dim=1) if queries > 1 else part for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _gated(x: Tensor, weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = activation(F.linear(x, weights[0]))
    return hidden * F.linear(x, weights[1]) if len(weights) > 1 else hidden


def _activation(model: Any) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    config = getattr(model, "config", None)
    name = next(
        (getattr(config, name) for name in ACTIVATIONS if isinstance(getattr(config, name, None), str)), "gelu"
    )
    return ACT2FN[name]


@torch.no_grad()
def _median_times(blocks: Sequence[Callable[[], Tensor]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in blocks]
    for block in blocks:
        block()
    for _ in range(repeats):
        for block, found in zip(blocks, times, strict=True):
            start = time.thread_time()
            block()
            found.append(1000 * (time.thread_time() - start))
    return [median(found) for found in times]


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise SettingError(f"sequence_length must be at least 1 token, got {sequence_length}.")
