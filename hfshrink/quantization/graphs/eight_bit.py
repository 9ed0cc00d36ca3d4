"""8-bit weights and activations in groups, for decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfshrink.quantization.graphs.four_bit import FourBitWriter, Grid, head_name
from hfshrink.quantization.graphs.rounding import round_to_nearest


def write_eight_bits(exported: Any, model: Any, kept_float: Sequence[str]) -> list[str]:
    """Store the weights of a decoder's graph in 8 bits and groups of 64; inputs are rounded to 8 bits group by group.

    The inputs of a language model's layers hold a few values that are hundreds of times larger than the rest (Dettmers
    et al. 2022, arXiv:2208.07339): one range for a whole input, as dynamic int8 takes it, leaves the rest no codes.

    Args:
        exported: The float export, changed in place.
        model: What it was made from; a table that is tied to its head is stored once.
        kept_float: Names of modules that stay float.

    Returns:
        The names of the changed modules.
    """
    grid, head = Grid(8, 64, True, 4), head_name(model)
    writer = FourBitWriter(exported.program, kept_float)
    writer.write_matrices(grid, round_to_nearest, {}, {head: 8} if head else {})
    writer.write_tables(grid)
    return writer.finish()
