"""Attention modules that count their heads follow when these are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
from hfshrink.errors import SettingError
from hfshrink.layers import ResizedConv1D, check_split, fit_heads, scale_heads


def test_counts_follow_and_come_back() -> None:
    network = tiny.model("gpt2")
    attention = network.transformer.h[0].attn
    dense = attention.c_attn
    for heads in (3, 1):  # a second cut starts from the counts of the dense module
        kept = torch.cat([torch.arange(heads * 4) + part * 16 for part in range(3)])
        attention.c_attn = ResizedConv1D.from_dense(dense, outputs=kept)
        fit_heads(network)
        assert (attention.num_heads, attention.split_size, attention.embed_dim) == (heads, heads * 4, 16)
    assert network.transformer.h[1].attn.split_size == 16
    attention.c_attn = attention.c_attn.to_dense()
    fit_heads(network)
    assert (attention.num_heads, attention.split_size) == (4, 16)
    assert "_dense_sizes" not in vars(attention)


def test_counts_that_do_not_divide_stay() -> None:
    attention = tiny.model("bert").bert.encoder.layer[0].attention.self
    scale_heads(attention, 15, 16)
    assert (attention.num_attention_heads, attention.all_head_size) == (4, 15)


@pytest.mark.parametrize("outputs", [torch.arange(47), torch.arange(45), torch.arange(3, 48)])
def test_parts_that_differ(outputs: Tensor) -> None:
    attention = tiny.model("gpt2").transformer.h[0].attn
    layer = ResizedConv1D.from_dense(attention.c_attn, outputs=outputs)
    with pytest.raises(SettingError, match=r"The 3 parts of the fused c_attn must keep the same features each"):
        check_split(attention, "c_attn", layer)
    check_split(attention, "c_proj", layer)
