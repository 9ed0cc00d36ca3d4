"""Which cuts a model's own config can express, so that plain transformers loads the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfshrink.blocks import SPELLINGS, AttentionBlock, FeedForwardBlock, layer_blocks
from hfshrink.checkpoint import compressed_layers
from hfshrink.errors import UnsupportedModelError
from hfshrink.modules import layer_stack
from hfshrink.pruning.units.slicing import width_of


def uniform_widths(model: Any, sizes: Mapping[str, Mapping[str, int]]) -> tuple[dict[str, int], set[str]]:
    """The config entries for a cut that is the same in all layers, and the modules that they describe.

    Neurons and heads are looked at apart. Heads need a config that states their size (`head_dim`, as in Llama), since
    others divide the hidden size by their number. What a config really says is tried out on the meta device.

    Args:
        model: The model before the cut.
        sizes: Module name -> side ("out", "in") -> features left.

    Returns:
        (config entry -> value, module names); both empty where each layer must say its own size.
    """
    try:
        stack, layers = layer_stack(model)
        attention, feed_forward = layer_blocks(model)
    except UnsupportedModelError:
        return {}, set()
    resized = compressed_layers(model)
    entries: dict[str, int] = {}
    native: set[str] = set()
    for block in (feed_forward, attention):
        inner = (
            (*block.ups, block.down) if isinstance(block, FeedForwardBlock) else (block.q, block.k, block.v, block.o)
        )
        names = {f"{stack}.{number}.{name}" for number in range(len(layers)) for name in inner}
        if names.isdisjoint(sizes) or not names.isdisjoint(resized):
            continue
        prefixes = [f"{stack}.{number}." for number in range(len(layers))]
        found = _entries(model, block, prefixes, sizes)
        planned = native | (names & set(sizes))
        if found and _builds(model, {**entries, **found}, {name: sizes[name] for name in planned}, {*resized, *sizes}):
            entries, native = {**entries, **found}, planned
    return entries, native


def _entries(
    model: Any,
    block: AttentionBlock | FeedForwardBlock,
    prefixes: Iterable[str],
    sizes: Mapping[str, Mapping[str, int]],
) -> dict[str, int]:
    """Config entry -> value where all layers agree; empty where they don't, or the config has no such entry."""

    def left(name: str, side: str) -> int:
        """Features that one module has in all layers after the cut; 0 where the layers differ."""
        found = {sizes.get(p + name, {}).get(side) or width_of(model.get_submodule(p + name), side) for p in prefixes}
        return found.pop() if len(found) == 1 else 0

    config = model.config
    written = config.to_dict()
    own = {width: next((name for name in names if name in written), "") for width, names in SPELLINGS.items()}
    if isinstance(block, FeedForwardBlock):
        values = {own["intermediate_size"]: left(block.down, "in")}
    else:
        size = written.get("head_dim")
        if not isinstance(size, int) or block.q == block.k:
            return {}
        values = {own["num_attention_heads"]: left(block.q, "out") // size}
        if own["num_key_value_heads"]:
            values[own["num_key_value_heads"]] = left(block.k, "out") // size
    return values if all(name and value for name, value in values.items()) else {}


def _builds(
    model: Any, entries: Mapping[str, int], cut: Mapping[str, Mapping[str, int]], others: Iterable[str]
) -> bool:
    """Whether the config with these entries builds a model of the shapes that this one has after the cut.

    Args:
        model: The model before the cut.
        entries: Config entry -> value.
        cut: Module name -> side -> features left, of the modules that the entries must describe.
        others: Names of modules whose own shapes the layer map describes.
    """
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(model.config)
    for name, value in entries.items():
        setattr(config, name, value)
    vars(config).pop("quantization_config", None)
    try:
        config = type(config).from_dict(config.to_dict())
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            sketch = type(model)(config).state_dict()
    except (ValueError, TypeError, RuntimeError, StrictDataclassError):
        # Llama's config wants a hidden size that the heads divide; somebody's own class may want more than a config
        return False
    described = set(others) - set(cut)
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner in described:
            continue
        shape = _shape_left(model.get_submodule(owner), leaf, cut[owner]) if owner in cut else tensor.shape
        if key not in sketch or sketch[key].shape != shape:
            return False
    return True


def _shape_left(module: nn.Module, leaf: str, left: Mapping[str, int]) -> torch.Size:
    """Shape of a module's weight or bias when it has `left` features on some sides."""
    shape = list(getattr(module, leaf).shape)
    for side, size in left.items():
        if leaf == "weight":
            shape[(side == "in") != isinstance(module, Conv1D)] = size
        elif side == "out":
            shape[0] = size
    return torch.Size(shape)
