"""Narrower students: the blocks of a layer, and the widths that fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfshrink.blocks import SPELLINGS, input_axis, layer_blocks
from hfshrink.errors import SettingError
from hfshrink.modules import layer_stack

FOLLOWERS = ("embedding_size", "pooler_hidden_size", "pooler_output_size", "word_embed_proj_dim")
"""Config entries that go along with `hidden_size` where they equal it."""


@dataclass(frozen=True)
class Widths:
    """How wide a model is. A head's size never changes."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    def to_dict(self) -> dict[str, int]:
        """Without the key-value heads where each head has its own."""
        named = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        named["num_attention_heads"] = self.num_attention_heads
        if self.num_key_value_heads != self.num_attention_heads:
            named["num_key_value_heads"] = self.num_key_value_heads
        return named


def block_boxes(model: Any) -> tuple[str, ...]:
    """Prefixes of the names inside the attention and the feed-forward of each layer.

    What lies in there counts heads and neurons: a channel of the residual stream is never assumed by its size. Blocks
    without a module of their own (OPT's `fc1`) have none.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> block_boxes(BertModel(BertConfig(**sizes)))
        ('encoder.layer.0.attention.self.', 'encoder.layer.0.intermediate.')
    """
    stack, layers = layer_stack(model)
    attention, feed_forward = layer_blocks(model)
    inner = [name.rpartition(".")[0] for name in (attention.q, feed_forward.ups[0])]
    return tuple(f"{stack}.{number}.{box}." for number in range(len(layers)) for box in inner if box)


def widths_of(model: Any) -> Widths:
    """The widths of a model whose layers are known."""
    _, layers = layer_stack(model)
    _, feed_forward = layer_blocks(model)
    down: Any = layers[0].get_submodule(feed_forward.down)
    config, heads = model.config, model.config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Widths(config.hidden_size, down.weight.shape[input_axis(down)], heads, groups)


def student_widths(teacher: Any, given: Mapping[str, Any]) -> Widths:
    """The student's widths: those that are given, those that follow from them, and the teacher's.

    A head keeps its size. Families that compute it (BERT: hidden_size / num_attention_heads) get the number of heads
    that fits their `hidden_size`; where the config states it (`head_dim`) heads and channels are cut independently.
    Query heads that share a key-value head go together.

    Args:
        teacher: The model.
        given: Config entries, in the family's own spelling or as `SPELLINGS` has them.

    Raises:
        SettingError: An entry that is no width, or values that do not fit.
        UnsupportedModelError: A family whose layers are not known.
    """
    old = widths_of(teacher)
    found = _canonical(teacher.config, given)
    for name, value in found.items():
        most = getattr(old, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise SettingError(f"{name} must be a whole number in 1..{most} for this teacher, got {value!r}.")
    queries = old.num_attention_heads // old.num_key_value_heads
    heads = found.get("num_attention_heads")
    groups = found.get("num_key_value_heads")
    if heads is None and groups is not None:
        heads = groups * queries
    hidden = found.get("hidden_size", old.hidden_size)
    if not isinstance(getattr(teacher.config, "head_dim", None), int):
        heads = _computed_heads(old, hidden, heads)
    heads = old.num_attention_heads if heads is None else heads
    if heads % queries or (groups is not None and heads != groups * queries):
        raise SettingError(
            f"In this teacher {queries} query heads share a key-value head, and go together: num_attention_heads must "
            f"be {queries} times num_key_value_heads, got {heads} and {heads / queries if groups is None else groups}."
        )
    return Widths(hidden, found.get("intermediate_size", old.intermediate_size), heads, heads // queries)


def _computed_heads(old: Widths, hidden: int, heads: int | None) -> int:
    head_dim = old.hidden_size // old.num_attention_heads
    fitting = hidden / head_dim
    if fitting != int(fitting) or (heads is not None and heads != fitting):
        got = f"hidden_size={hidden}" if heads is None else f"num_attention_heads={heads} with hidden_size={hidden}"
        raise SettingError(
            f"{got} does not fit: the teacher's heads have {head_dim} channels, and its config has no head_dim, so "
            f"hidden_size must be {head_dim} · num_attention_heads. Give hidden_size alone, the heads follow: "
            f"{_some_multiples(head_dim, old.num_attention_heads)}."
        )
    return int(fitting)


def _some_multiples(step: int, most: int) -> str:
    values = [str(step * count) for count in range(1, most + 1)]
    return ", ".join(values if most <= 6 else [*values[:3], "…", *values[-2:]])


def _canonical(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    own = _own_names(config)
    found: dict[str, Any] = {}
    for name, value in given.items():
        width = next((width for width in own if name in (width, own[width])), None)
        if width is None:
            near = difflib.get_close_matches(name, [*own, *own.values()], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingError(
                f"{name}={value!r} is no width of the family {config.model_type!r}; its widths are "
                f"{', '.join(own.values())}.{hint} Layers are num_layers=; another family is architecture=."
            )
        if width in found:
            raise SettingError(f"{width} is given twice, as {width} and as {own[width]}. Give it once.")
        found[width] = value
    return found


def _own_names(config: Any) -> dict[str, str]:
    """Width -> its name in this config."""
    entries = config.to_dict()
    own = {width: next((n for n in names if n in entries), None) for width, names in SPELLINGS.items()}
    return {width: name for width, name in own.items() if name is not None}


def set_widths(config: Any, widths: Widths) -> None:
    """Write the widths into a config, in its own spelling."""
    old = config.hidden_size
    for width, name in _own_names(config).items():
        setattr(config, name, getattr(widths, width))
    for name in FOLLOWERS:
        if getattr(config, name, None) == old:
            setattr(config, name, widths.hidden_size)
