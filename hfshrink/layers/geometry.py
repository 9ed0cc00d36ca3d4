"""Where a convolution's kernel looks: its size, stride, padding and dilation, as a spec holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfshrink.errors import CheckpointError
from hfshrink.layers.common import MAX_ELEMENTS, read_spec

PAIRS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
"""Entries of a spec that are two integers, for height and width -> the least that each may be."""
PADDINGS = ("same", "valid")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
MAX_PAIR = 1024  # no kernel, stride, padding or dilation of a real model comes near


def geometry_of(conv: Any) -> dict[str, Any]:
    """The geometry of a convolution, as nn.Conv2d takes it."""
    return {name: getattr(conv, name) for name in (*PAIRS, "padding_mode")}


def geometry_spec(conv: Any) -> dict[str, Any]:
    """The geometry of a convolution, JSON-safe."""
    found = geometry_of(conv)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def read_geometry(
    spec: Mapping[str, Any], kind: str, sizes: tuple[str, ...], others: tuple[str, ...] = ()
) -> tuple[list[int], dict[str, Any]]:
    """The sizes and the geometry of a convolution's spec that somebody else may have written.

    Args:
        spec: What should have just `kind`, `bias`, the sizes, the geometry and `others`.
        kind: The kind that it should name.
        sizes: Names of its numbers of channels and ranks.
        others: Entries that the caller checks.

    Returns:
        The sizes in the order of `sizes`, and the geometry as nn.Conv2d takes it.

    Raises:
        CheckpointError: Other entries, impossible sizes, or a kernel beyond any real model.
    """
    own = {*PAIRS, "padding_mode", *others}
    expected = {"kind", "bias", *sizes, *own}
    if set(spec) != expected:
        raise CheckpointError(
            f"A layer of kind {kind!r} needs the entries {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(map(str, spec)))[:300]}."
        )
    found = read_spec({name: value for name, value in spec.items() if name not in own}, kind, sizes)
    if spec["padding_mode"] not in PADDING_MODES:
        raise CheckpointError(
            f"Expected a padding_mode of {', '.join(PADDING_MODES)}, got {str(spec['padding_mode'])[:40]!r}."
        )
    geometry = {name: _read_pair(name, spec[name], least) for name, least in PAIRS.items()}
    elements = math.prod((*sorted(found)[-2:], *geometry["kernel_size"]))
    if elements > MAX_ELEMENTS:
        raise CheckpointError(f"A convolution of {elements:,} weights is beyond any real model (2**40 at most).")
    return found, {**geometry, "padding_mode": spec["padding_mode"]}


def _read_pair(name: str, value: Any, least: int) -> Any:
    """Two integers for height and width as a tuple, or the padding's word."""
    if name == "padding" and isinstance(value, str) and value in PADDINGS:
        return value
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or any(type(part) is not int or not least <= part <= MAX_PAIR for part in value):
        words = f", or one of {', '.join(PADDINGS)}" if name == "padding" else ""
        raise CheckpointError(
            f"{name} must be two integers in {least}..{MAX_PAIR}{words}, got {str(value)[:60]} in a convolution."
        )
    return tuple(value)
