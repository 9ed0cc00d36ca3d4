"""What an attention module knows about its heads must follow when its projections lose some."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfshrink.errors import SettingError
from hfshrink.layers.resized import ResizedLinear
from hfshrink.layers.resized_conv1d import ResizedConv1D

QUERIES = ("query", "query_proj", "q_lin", "q_proj", "c_attn")
"""How attention modules call the projection that makes their queries."""

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Their attributes that grow with the number of heads; `split_size` is the width of GPT-2's fused q, k and v each."""


def fit_heads(model: nn.Module) -> None:
    """Make the attention modules of a model count the heads that their resized or dense projections have now.

    Most families reshape by the head's size and never look; GPT-2 splits, OPT and DeBERTa reshape by the count.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_embd=4, n_layer=1, n_head=2, vocab_size=9))
        >>> attention = model.h[0].attn
        >>> kept = torch.tensor([0, 1, 4, 5, 8, 9])
        >>> attention.c_attn = ResizedConv1D.from_dense(attention.c_attn, outputs=kept)
        >>> fit_heads(model)
        >>> attention.num_heads, attention.split_size
        (1, 2)
    """
    for parent in model.modules():
        query = next((found for name in QUERIES if (found := getattr(parent, name, None)) is not None), None)
        dense_sizes = vars(parent).get("_dense_sizes")
        if isinstance(query, ResizedLinear | ResizedConv1D):
            kept, dense = _outputs(query)
            if dense_sizes is None:
                dense_sizes = {name: vars(parent)[name] for name in HEAD_COUNTS if name in vars(parent)}
            vars(parent)["_dense_sizes"] = dense_sizes  # to find the way back in to_dense
            scale_heads(parent, kept, dense, dense_sizes)
        elif dense_sizes is not None:
            vars(parent).update(dense_sizes)
            del vars(parent)["_dense_sizes"]


def scale_heads(parent: nn.Module, kept: int, dense: int, sizes: dict[str, Any] | None = None) -> None:
    """Multiply the head counts of an attention module by kept / dense, where that is a whole number.

    Args:
        parent: The attention module.
        kept: Features that its queries have now.
        dense: Features that they had when the counts were `sizes`.
        sizes: Attribute -> count; None takes the counts that it has.
    """
    sizes = {name: vars(parent)[name] for name in HEAD_COUNTS if name in vars(parent)} if sizes is None else sizes
    for name, size in sizes.items():
        if isinstance(size, int) and size * kept % dense == 0:
            vars(parent)[name] = size * kept // dense


def check_split(parent: Any, name: str, layer: Any) -> None:
    """Raise `SettingError` where the parts of a fused q, k and v would not all keep the same features.

    Args:
        parent: The module in which `layer` will stand.
        name: Its name there.
        layer: The resized layer, perhaps still on the meta device.
    """
    if name != "c_attn" or not isinstance(layer, ResizedConv1D) or not hasattr(parent, "split_size"):
        return
    parts = layer.dense_nf // vars(parent).get("_dense_sizes", vars(parent))["split_size"]  # k and v only: 2
    is_equal = layer.nf % parts == 0
    if is_equal and layer.kept_outputs is not None and not layer.kept_outputs.is_meta:
        numbers = layer.kept_outputs.view(parts, -1)
        starts = torch.arange(parts, device=numbers.device)[:, None] * (layer.dense_nf // parts)
        is_equal = bool((numbers - starts == numbers[0]).all())
    if not is_equal:
        raise SettingError(
            f"The {parts} parts of the fused c_attn must keep the same features each; these {layer.nf} of "
            f"{layer.dense_nf} outputs are not the same in each part."
        )


def _outputs(layer: ResizedLinear | ResizedConv1D) -> tuple[int, int]:
    """Features that a resized layer writes, and those that it wrote when it was dense."""
    if isinstance(layer, ResizedConv1D):
        return layer.nf, layer.dense_nf
    return layer.out_features, layer.dense_out_features
