"""Layers and their blocks: which weights are attention and feed-forward, and leaving layers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import UnsupportedModelError
from hfshrink.modules import layer_stack


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


def layer_blocks(model: Any) -> tuple[AttentionBlock, FeedForwardBlock]:
    """The row of `BLOCKS` that fits all layers of a model.

    Raises:
        UnsupportedModelError: None does.
    """
    _, layers = layer_stack(model)
    owners = [_owners(layer) for layer in layers]
    for attention, feed_forward in BLOCKS.values():
        expected = {attention.q, attention.k, attention.v, attention.o, *feed_forward.ups, feed_forward.down}
        if all(found == expected for found in owners):
            return attention, feed_forward
    raise UnsupportedModelError(
        f"The widths of the family {model.config.model_type!r} can't be cut: its layers have the weights "
        f"{', '.join(sorted(set().union(*owners)))}, expected those of {'; '.join(BLOCKS)} in each. Whole layers can "
        "be dropped, and single weights pruned."
    )


def _owners(layer: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, weight in layer.named_parameters() if weight.ndim > 1}


def head_size(model: Any) -> int:
    """Channels of one attention head: the config's `head_dim`, else hidden size / heads of the uncut model."""
    config = model.config.get_text_config()
    stated = getattr(config, "head_dim", None)
    return stated if isinstance(stated, int) else config.hidden_size // config.num_attention_heads


def input_axis(module: nn.Module) -> int:
    """The axis of a weight that meets the input: 0 in GPT-2's Conv1D (in, out), 1 in all others (out or rank, in)."""
    return 0 if isinstance(module, Conv1D) else 1


def spread_layers(depth: int, num_layers: int) -> list[int]:
    """`num_layers` of `depth` layer numbers, spread evenly, first and last among them (only the first for one).

    Example:
        >>> spread_layers(12, 6)
        [0, 2, 4, 7, 9, 11]
    """
    if num_layers == 1:
        return [0]
    return [round(i * (depth - 1) / (num_layers - 1)) for i in range(num_layers)]


def set_depth(config: Any, kept: Sequence[int]) -> None:
    """Write into a config that only some layers are left; lists with one entry per layer (`layer_types`) keep theirs.

    A backbone (DINOv2) has one stage per layer, of which the last one is put out.
    """
    depth = config.num_hidden_layers
    for name, value in config.to_dict().items():
        is_per_layer = isinstance(value, list) and len(value) == depth and "layer" in name
        if is_per_layer and getattr(config, name, None) == value:
            setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    if len(kept) != depth and hasattr(config, "set_output_features_output_indices"):
        named = ("stage_names", "out_features", "out_indices")
        entries = {name: value for name, value in config.to_dict().items() if name not in named}
        config.stage_names = type(config).from_dict(entries).stage_names
        config.set_output_features_output_indices(None, None)


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 − cos(x, y) per token: how much a layer turns the hidden state (ShortGPT, arXiv:2403.03853).

    Args:
        before: A layer's input x, shape (tokens, hidden).
        after: Its output y, shape (tokens, hidden).

    Returns:
        Shape (tokens,), float64; the mean over tokens is the layer's influence, in 0..2.

    Example:
        >>> block_influence(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])).tolist()
        [1.0, 0.0]
    """
    x, y = before.double(), after.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    return 1 - (x * y).sum(dim=-1) / norms.clamp_min(torch.finfo(torch.float64).tiny)
