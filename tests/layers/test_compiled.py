"""Factored layers under `torch.compile`: one graph without breaks, the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import thin_layers

DENSE = {nn.Linear: lambda: nn.Linear(4, 6), Conv1D: lambda: Conv1D(6, 4), nn.Embedding: lambda: nn.Embedding(9, 4)}
DENSE |= {nn.Conv2d: lambda: nn.Conv2d(4, 6, 3, padding=1)}
INPUTS = {
    nn.Linear: torch.randn(3, 4),
    Conv1D: torch.randn(3, 4),
    nn.Embedding: torch.tensor([[1, 2]]),
    nn.Conv2d: torch.randn(2, 4, 5, 5),
}


@pytest.mark.parametrize("kind", thin_layers.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factored_layer_is_one_graph(kind: str, dtype: torch.dtype) -> None:
    dense = thin_layers.KINDS[kind]
    layer = thin_layers.layer(DENSE[dense](), kind, 2).to(dtype)
    inputs = INPUTS[dense] if dense is nn.Embedding else INPUTS[dense].to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), layer(inputs))
