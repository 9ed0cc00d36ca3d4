"""Narrower students: the blocks of a layer, the widths that fit, and slicing every weight to the kept units."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import layer_stack

HIDDEN = "hidden"
"""The unit of the residual stream's channels, the same in every layer."""


@dataclass(frozen=True)
class AttentionBlock:
    """Names of the attention's weights inside a layer; the same name for q, k and v says that they are one weight."""

    q: str
    k: str
    v: str
    o: str


@dataclass(frozen=True)
class FeedForwardBlock:
    """Names of the feed-forward weights inside a layer: into the neurons (`ups`), and out of them (`down`)."""

    ups: tuple[str, ...]
    down: str


BLOCKS: dict[str, tuple[AttentionBlock, FeedForwardBlock]] = {
    "BERT, RoBERTa, ELECTRA": (
        AttentionBlock("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        FeedForwardBlock(("intermediate.dense",), "output.dense"),
    ),
    "DeBERTa-v2": (
        AttentionBlock(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        FeedForwardBlock(("intermediate.dense",), "output.dense"),
    ),
    "DistilBERT": (
        AttentionBlock("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        FeedForwardBlock(("ffn.lin1",), "ffn.lin2"),
    ),
    "Llama, Mistral, Qwen, Gemma": (
        AttentionBlock("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        FeedForwardBlock(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ),
    "GPT-2": (
        AttentionBlock("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
        FeedForwardBlock(("mlp.c_fc",), "mlp.c_proj"),
    ),
    "OPT": (
        AttentionBlock("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        FeedForwardBlock(("fc1",), "fc2"),
    ),
    "ViT, DeiT, DINOv2": (
        AttentionBlock("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        FeedForwardBlock(("mlp.fc1",), "mlp.fc2"),
    ),
}
"""Title -> the weights of a layer. A row fits a model whose layers have exactly these weights of two axes and more."""

SPELLINGS = {
    "hidden_size": ("hidden_size", "dim", "n_embd"),
    "intermediate_size": ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim"),
    "num_attention_heads": ("num_attention_heads", "n_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
}
"""Width -> how the families' configs spell it."""

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


@dataclass(frozen=True)
class Axis:
    """An axis of a weight that is cut: it holds `parts` times all units (three where q, k and v are one weight)."""

    weight: str
    dim: int
    unit: str
    parts: int = 1


def layer_blocks(model: Any) -> tuple[AttentionBlock, FeedForwardBlock]:
    """The row of `BLOCKS` that fits the layers of a model.

    Raises:
        UnsupportedModelError: None does.
    """
    _, layers = layer_stack(model)
    owners = {name.rpartition(".")[0] for name, weight in layers[0].named_parameters() if weight.ndim > 1}
    for attention, feed_forward in BLOCKS.values():
        if owners == {attention.q, attention.k, attention.v, attention.o, *feed_forward.ups, feed_forward.down}:
            return attention, feed_forward
    raise UnsupportedModelError(
        f"The widths of the family {model.config.model_type!r} can't be cut: its layers have the weights "
        f"{', '.join(sorted(owners))}, expected those of {'; '.join(BLOCKS)}. Drop layers of it (num_layers=), or "
        "start a fresh student with architecture=."
    )


def widths_of(model: Any) -> Widths:
    """The widths of a model whose layers are known."""
    _, layers = layer_stack(model)
    _, feed_forward = layer_blocks(model)
    down: Any = layers[0].get_submodule(feed_forward.down)
    config, heads = model.config, model.config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Widths(config.hidden_size, down.weight.shape[_in_dim(down)], heads, groups)


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


def unit_counts(model: Any) -> dict[str, int]:
    """Unit -> how many of it a model has: channels, and per layer neurons and heads (groups of heads in GQA)."""
    stack, layers = layer_stack(model)
    widths = widths_of(model)
    counts = {HIDDEN: widths.hidden_size}
    for number in range(len(layers)):
        counts[f"{stack}.{number}.neurons"] = widths.intermediate_size
        counts[f"{stack}.{number}.heads"] = widths.num_key_value_heads
    return counts


def cut_axes(state: Mapping[str, Tensor], student: Any, counts: Mapping[str, int]) -> list[Axis]:
    """The axes at which the teacher's weights are longer than the student's, each with the unit that it counts.

    Args:
        state: The teacher's weights under the student's names.
        student: The narrower model.
        counts: Unit -> how many the teacher has.

    Raises:
        UnsupportedModelError: Other weights, or an axis that is no number of units.
    """
    target, known = student.state_dict(), _block_axes(student)
    new_counts = unit_counts(student)
    family = student.config.model_type
    if set(state) != set(target):
        names = ", ".join(sorted(set(state) ^ set(target))[:4])
        raise UnsupportedModelError(
            f"A {family!r} of these widths has other weights than its teacher ({names}). Keep hidden_size apart from "
            "embedding_size, or start fresh with architecture=."
        )
    found = []
    for name, weight in state.items():
        for dim, (old, new) in enumerate(zip(weight.shape, target[name].shape, strict=True)):
            if old == new:
                continue
            # elsewhere channels are counted, in a head that reads two pooled states side by side twice
            axis = known.get((name, dim), Axis(name, dim, HIDDEN, max(1, old // counts[HIDDEN])))
            per_unit, rest = divmod(old, axis.parts * counts[axis.unit])
            if rest or new != per_unit * axis.parts * new_counts[axis.unit]:
                raise UnsupportedModelError(
                    f"The widths of the family {family!r} can't be cut: {name} has {old} on axis {dim}, and {new} in "
                    f"the student, which is no number of {axis.unit} ({counts[axis.unit]} -> "
                    f"{new_counts[axis.unit]}). Start fresh with architecture=."
                )
            found.append(axis)
    return found


def _block_axes(model: Any) -> dict[tuple[str, int], Axis]:
    """(weight, axis) -> what is cut there, for all axes that count heads or neurons."""
    stack, layers = layer_stack(model)
    attention, feed_forward = layer_blocks(model)
    parts = 3 if attention.q == attention.k == attention.v else 1
    found: list[Axis] = []
    for number, layer in enumerate(layers):
        prefix = f"{stack}.{number}"
        for name in {attention.q: 0, attention.k: 0, attention.v: 0}:
            found += _out_axes(layer.get_submodule(name), f"{prefix}.{name}", f"{prefix}.heads", parts)
        for name in feed_forward.ups:
            found += _out_axes(layer.get_submodule(name), f"{prefix}.{name}", f"{prefix}.neurons", 1)
        for name, unit in ((attention.o, "heads"), (feed_forward.down, "neurons")):
            module = layer.get_submodule(name)
            found.append(Axis(f"{prefix}.{name}.weight", _in_dim(module), f"{prefix}.{unit}"))
    return {(axis.weight, axis.dim): axis for axis in found}


def _out_axes(module: nn.Module, name: str, unit: str, parts: int) -> list[Axis]:
    return [Axis(f"{name}.weight", 1 - _in_dim(module), unit, parts), Axis(f"{name}.bias", 0, unit, parts)]


def _in_dim(module: nn.Module) -> int:
    """The axis of a weight that meets the input: 1 in a Linear (out, in), 0 in GPT-2's Conv1D (in, out)."""
    return 1 if isinstance(module, nn.Linear) else 0


def block_indices(kept: Tensor, units: int, size: int, parts: int = 1) -> Tensor:
    """Positions on an axis of `size` that holds `parts` times `units` blocks of neighbours, of the kept units.

    Example:
        >>> block_indices(torch.tensor([0, 2]), units=3, size=6).tolist()
        [0, 1, 4, 5]
        >>> block_indices(torch.tensor([1]), units=2, size=6, parts=3).tolist()
        [1, 3, 5]
    """
    return torch.arange(size).view(parts, units, -1)[:, kept].flatten()


def keep_units(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], new_counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Unit -> the numbers of the highest-scored ones, in rising order; units that lose nothing need no score.

    Example:
        >>> keep_units({"hidden": torch.tensor([3.0, 1.0, 2.0])}, {"hidden": 3}, {"hidden": 2})
        {'hidden': tensor([0, 2])}
    """
    kept = {}
    for unit, new in new_counts.items():
        if new != counts[unit]:
            order = torch.sort(scores[unit].cpu(), descending=True, stable=True).indices
            kept[unit] = order[:new].sort().values
    return kept


def slice_state(
    state: Mapping[str, Tensor], axes: Sequence[Axis], kept: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """The weights with only the kept units on the given axes."""
    sliced = dict(state)
    for axis in axes:
        weight = sliced[axis.weight]
        index = block_indices(kept[axis.unit], counts[axis.unit], weight.shape[axis.dim], axis.parts)
        sliced[axis.weight] = weight.index_select(axis.dim, index.to(weight.device))
    return sliced
