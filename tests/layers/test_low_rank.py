"""Linears, and GPT-2's Conv1D, as the product of two thin matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import LowRankConv1D, LowRankLinear, empty_layer


def linear(bias: bool = True) -> nn.Linear:
    """Weight of shape (6, 4)."""
    return nn.Linear(4, 6, bias=bias)


def conv1d() -> Conv1D:
    """Weight of shape (4, 6), with other numbers than zero in the bias."""
    conv = Conv1D(6, 4)
    nn.init.normal_(conv.bias)
    return conv


def low_rank(dense: nn.Linear) -> LowRankLinear:
    return LowRankLinear.from_dense(dense, torch.randn(6, 2), torch.randn(2, 4))


def low_rank_conv1d(dense: Conv1D) -> LowRankConv1D:
    return LowRankConv1D.from_dense(dense, torch.randn(6, 2), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("low_rank", "Expected the spec of a layer as a JSON object, got str"),
        ({"kind": "clustered"}, "Unknown kind of layer 'clustered'; this hfshrink knows low_rank, "),
        ({"kind": ["low_rank"]}, "Unknown kind"),
        ({"kind": "low_rank"}, "needs the entries bias, in_features, kind, out_features, rank, got kind"),
        ({"rank": 0}, r"rank must be an integer in 1\.\.2\*\*31, got 0"),
        ({"rank": True}, "rank must be an integer .* got True"),
        ({"rank": 2.0}, r"got 2\.0"),
        ({"in_features": 2**31 + 1}, "in_features must be an integer"),
        (
            {"in_features": 2**31, "out_features": 2**31},
            "2,147,483,648 × 2,147,483,648 weights is beyond any real model",
        ),
        ({"rank": 6}, r"rank must be in 1\.\.5 for a weight of shape \(6, 4\), got 6"),
        ({"bias": 1}, "bias that is true or false, got 'low_rank' and 1"),
        ({"extra": 1}, "needs the entries .* got bias, extra"),
    ],
)
def test_low_rank_spec_from_elsewhere(spec: object, match: str) -> None:
    if isinstance(spec, dict) and "kind" not in spec:
        spec = {"kind": "low_rank", "in_features": 4, "out_features": 6, "rank": 2, "bias": True, **spec}
    with pytest.raises(CheckpointError, match=match):
        empty_layer(spec)


class TestLowRankLinear:
    def test_by_hand(self) -> None:
        dense = nn.Linear(2, 3)
        dense.bias.data = torch.tensor([1.0, 0.0, -1.0])
        up, down = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0, 5.0]])
        layer = LowRankLinear.from_dense(dense, up, down)
        assert layer(torch.tensor([1.0, 1.0])).tolist() == [10.0, 18.0, 26.0]
        assert layer.to_dense().weight.tolist() == [[4.0, 5.0], [8.0, 10.0], [12.0, 15.0]]
        assert layer.to_dense().bias.tolist() == [1.0, 0.0, -1.0]

    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_its_dense_form(self, bias: bool) -> None:
        layer, x = low_rank(linear(bias)), torch.randn(2, 3, 4)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))

    def test_gradients_are_those_of_the_product(self) -> None:
        layer, x = low_rank(linear()), torch.randn(5, 4)
        layer(x).square().sum().backward()
        out = layer(x).detach()
        torch.testing.assert_close(layer.up.grad, 2 * out.T @ (x @ layer.weight.T))
        torch.testing.assert_close(layer.weight.grad, layer.up.T @ (2 * out.T @ x))

    def test_parameters(self) -> None:
        layer = low_rank(linear())
        assert sum(p.numel() for p in layer.parameters()) == 2 * (6 + 4) + 6

    @pytest.mark.parametrize("rank", [0, 6, 7])
    def test_rank(self, rank: int) -> None:
        with pytest.raises(SettingError, match=rf"rank must be in 1\.\.5 .* \(6, 4\), got {rank}"):
            LowRankLinear.from_dense(linear(), torch.ones(6, rank), torch.ones(rank, 4))

    @pytest.mark.parametrize(("up", "down"), [((4, 2), (2, 6)), ((6, 2), (3, 4)), ((6,), (4,)), ((2, 6), (4, 2))])
    def test_shapes(self, up: tuple[int, ...], down: tuple[int, ...]) -> None:
        with pytest.raises(SettingError, match=r"weight of shape \(6, 4\), got \(.*\) and \(.*\)"):
            LowRankLinear.from_dense(linear(), torch.ones(up), torch.ones(down))

    def test_readers_of_the_weight_keep_it(self) -> None:
        """A MultiheadAttention reads the weight of `out_proj` and never calls it."""
        attention = nn.MultiheadAttention(4, 2)
        with pytest.raises(SettingError, match="NonDynamicallyQuantizableLinear is computed in a way of its own"):
            LowRankLinear.from_dense(attention.out_proj, torch.ones(4, 1), torch.ones(1, 4))
        with pytest.raises(SettingError, match="Expected Linear, got Conv1D"):
            LowRankLinear.from_dense(conv1d(), torch.ones(4, 1), torch.ones(1, 6))


class TestLowRankConv1D:
    def test_is_the_low_rank_linear_of_the_transposed_weight(self) -> None:
        conv, x, up, down = conv1d(), torch.randn(2, 5, 4), torch.randn(6, 2), torch.randn(2, 4)
        flipped = linear()
        flipped.bias.data = conv.bias.data
        one, other = LowRankConv1D.from_dense(conv, up, down), LowRankLinear.from_dense(flipped, up, down)
        assert torch.equal(one(x), other(x))
        assert torch.equal(one.to_dense().weight, other.to_dense().weight.T)
        torch.testing.assert_close(one(x), one.to_dense()(x))
        assert torch.equal(one.to_dense().bias, conv.bias)
        assert (one.to_dense().nf, one.to_dense().nx) == (conv.nf, conv.nx)

    @pytest.mark.parametrize("rank", [0, 6])
    def test_rank(self, rank: int) -> None:
        with pytest.raises(SettingError, match=rf"rank must be in 1\.\.5 .* got {rank}"):
            LowRankConv1D.from_dense(conv1d(), torch.ones(6, rank), torch.ones(rank, 4))

    def test_square_weight_is_loud_at_every_rank(self) -> None:
        """Down (rank, in) would fit (in, out) only at rank = in = out, which is refused."""
        for rank in range(1, 4):
            layer = LowRankConv1D.from_dense(Conv1D(4, 4), torch.ones(4, rank), torch.ones(rank, 4))
            assert tuple(layer.weight.shape) != (4, 4)
        with pytest.raises(SettingError, match=r"rank must be in 1\.\.3"):
            LowRankConv1D.from_dense(Conv1D(4, 4), torch.ones(4, 4), torch.ones(4, 4))

    def test_spec_needs_a_bias(self) -> None:
        with pytest.raises(CheckpointError, match="Conv1D always has a bias"):
            empty_layer({**low_rank_conv1d(conv1d()).spec(), "bias": False})

    def test_shapes_are_those_of_out_and_in(self) -> None:
        with pytest.raises(SettingError, match=r"weight of shape \(6, 4\), got \(4, 2\) and \(2, 6\)"):
            LowRankConv1D.from_dense(conv1d(), torch.ones(4, 2), torch.ones(2, 6))
        with pytest.raises(SettingError, match="Expected Conv1D, got Linear"):
            LowRankConv1D.from_dense(linear(), torch.ones(6, 2), torch.ones(2, 4))
