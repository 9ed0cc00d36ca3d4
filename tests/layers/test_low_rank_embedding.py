"""Embeddings as a narrow table and a small matrix."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import LowRankEmbedding, empty_layer


def table(**settings: Any) -> nn.Embedding:
    """7 words of 5 numbers."""
    return nn.Embedding(7, 5, **settings)


def low_rank(dense: nn.Embedding | None = None) -> LowRankEmbedding:
    return LowRankEmbedding.from_dense(dense or table(padding_idx=0), torch.randn(7, 2), torch.randn(2, 5))


def test_by_hand() -> None:
    up, down = torch.arange(14.0).view(7, 2), torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0, 0.0]])
    layer = LowRankEmbedding.from_dense(table(), up, down)
    assert layer(torch.tensor([[3, 0]])).tolist() == [[[6.0, 7.0, 12.0, 21.0, 0.0], [0.0, 1.0, 0.0, 3.0, 0.0]]]
    assert torch.equal(layer.to_dense().weight, up @ down)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (7 + 5)


def test_equals_its_dense_form() -> None:
    layer, ids = low_rank(), torch.randint(7, (3, 4))
    torch.testing.assert_close(layer(ids), layer.to_dense()(ids))
    assert layer.to_dense().padding_idx == 0
    assert type(layer.to_dense()) is nn.Embedding


def test_padding_gets_no_gradient() -> None:
    """Its row of the narrow table stays what it is, as the row of a dense table does."""
    layer = low_rank()
    layer(torch.tensor([0, 3, 3])).sum().backward()
    assert layer.weight.grad[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(layer.weight.grad[3], 2 * layer.down.detach().sum(dim=1))


def test_padding_of_zeros_stays_zero() -> None:
    up = torch.randn(7, 2)
    up[0] = 0
    layer = LowRankEmbedding.from_dense(table(padding_idx=0), up, torch.randn(2, 5))
    assert layer(torch.tensor([0])).tolist() == [[0.0] * 5]


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_spec_survives_json(padding_idx: int | None) -> None:
    layer = low_rank(table(padding_idx=padding_idx))
    empty = empty_layer(json.loads(json.dumps(layer.spec())))
    assert type(empty) is LowRankEmbedding
    assert empty.spec() == layer.spec()
    assert repr(empty) == repr(layer)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert [tensor.shape for tensor in empty.parameters()] == [(7, 2), (2, 5)]


def test_key_is_loud() -> None:
    layer = low_rank()
    assert layer.dense_shape == (7, 5)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        table().load_state_dict(layer.state_dict(), strict=False)


def test_modes_and_copies() -> None:
    dense = table().to(torch.bfloat16).eval().requires_grad_(False)
    random = torch.get_rng_state()
    layer = LowRankEmbedding.from_dense(dense, torch.ones(7, 2), torch.ones(2, 5))
    again = layer.to_dense()
    assert torch.equal(random, torch.get_rng_state())
    assert not layer.training
    assert not again.training
    assert not any(p.requires_grad for p in (*layer.parameters(), *again.parameters()))
    assert {p.dtype for p in (*layer.parameters(), *again.parameters())} == {torch.bfloat16}
    again.weight.data.zero_()
    assert layer.weight.tolist() == [[1.0, 1.0]] * 7


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


@pytest.mark.parametrize(
    ("dense", "match"),
    [
        (BartScaledWordEmbedding(7, 5, None, embed_scale=2.0), "BartScaledWordEmbedding is computed in a way of its"),
        (Shifted(7, 5), "Shifted is computed in a way of its own; only what computes as a plain Embedding"),
        (nn.EmbeddingBag(7, 5), "Expected Embedding, got EmbeddingBag"),
        (table(max_norm=1.0), r"Only a plain table can be factored, got max_norm=1\.0"),
        (table(sparse=True), "sparse=True"),
    ],
)
def test_other_tables_are_refused(dense: nn.Module, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        LowRankEmbedding.from_dense(dense, torch.ones(7, 2), torch.ones(2, 5))


@pytest.mark.parametrize("shapes", [((7, 2), (3, 5)), ((5, 2), (2, 7)), ((7,), (5,))])
def test_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(SettingError, match=r"for a table of shape \(7, 5\), got \(.*\) and \("):
        LowRankEmbedding.from_dense(table(), *(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"rank": 5}, r"rank must be in 1\.\.4 for a table of shape \(7, 5\), got 5"),
        ({"rank": 0}, "rank must be an integer"),
        ({"num_embeddings": 2**31, "embedding_dim": 2**30}, "beyond any real model"),
        ({"padding_idx": 7}, r"padding_idx must be in 0\.\.6 or None, got 7"),
        ({"padding_idx": "0"}, "padding_idx must be an integer or null, got '0'"),
        ({"padding_idx": True}, "padding_idx must be an integer or null, got 'True'"),
        ({"bias": False}, "needs the entries embedding_dim, kind, .* got bias"),
    ],
)
def test_spec_from_elsewhere(entries: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**low_rank().spec(), **entries})
