"""Factored layers of every kind for tiny models, with the factors of a singular value decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.layers import (
    CompressedLayer,
    LowRankConv1D,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    SeparableConv2d,
    TuckerConv2d,
)

KINDS: dict[str, type] = {
    "low_rank": nn.Linear,
    "low_rank_conv1d": Conv1D,
    "low_rank_embedding": nn.Embedding,
    "low_rank_conv2d": nn.Conv2d,
    "separable_conv2d": nn.Conv2d,
    "tucker_conv2d": nn.Conv2d,
}
"""kind -> the class of modules that it stands for."""


def layers(network: nn.Module, kind: str, rank: int | None = None) -> dict[str, CompressedLayer]:
    """A layer of `kind` for every module that it may stand for; ranks 1, 2, 3, … in turn, or `rank` where it fits."""
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    found = {
        name: module
        for name, module in network.named_modules()
        if type(module) is KINDS[kind] and f"{name}.weight" not in {*tied, *tied.values()}
    }
    ranks = [1 + number % 4 for number in range(len(found))] if rank is None else [rank] * len(found)
    return {name: layer(module, kind, r) for (name, module), r in zip(found.items(), ranks, strict=True)}


def layer(module: Any, kind: str, rank: int) -> CompressedLayer:
    """The layer of `kind` that is nearest to a module, or near to it, at a rank or a lower one that it can have."""
    weight = module.weight.detach().double()
    if kind == "low_rank":
        return LowRankLinear.from_dense(module, *pair(weight, min(rank, weight.shape[0] - 1)))
    if kind == "low_rank_conv1d":
        return LowRankConv1D.from_dense(module, *pair(weight.T, min(rank, weight.shape[1] - 1)))
    if kind == "low_rank_embedding":
        return LowRankEmbedding.from_dense(module, *pair(weight, min(rank, weight.shape[1] - 1)))
    out, into, height, width = weight.shape
    if kind == "low_rank_conv2d":
        up, down = pair(weight.flatten(1), min(rank, out - 1))
        return LowRankConv2d.from_dense(module, up, down.view(-1, into, height, width))
    if kind == "separable_conv2d":
        column, row = pair(weight.permute(1, 2, 0, 3).reshape(into * height, out * width), min(rank, out - 1))
        vertical = column.T.reshape(-1, into, height, 1)
        return SeparableConv2d.from_dense(module, vertical, row.view(-1, out, 1, width).transpose(0, 1))
    first = torch.linalg.svd(weight.transpose(0, 1).flatten(1)).U[:, : min(rank, into, out - 1)].T
    last = torch.linalg.svd(weight.flatten(1)).U[:, : min(rank, out)]
    core = torch.einsum("os,oihw,ri->srhw", last, weight, first)
    return TuckerConv2d.from_dense(module, first[..., None, None], core, last[..., None, None])


def pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors up (out, rank) and down (rank, in) of a weight (out, in)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
