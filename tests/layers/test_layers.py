"""What holds for every compressed layer of two axes, and what holds for each that lost some."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import (
    LAYER_KINDS,
    CompressedLayer,
    LowRankConv1D,
    LowRankLinear,
    ResizedConv1D,
    ResizedLinear,
    empty_layer,
)


def linear(bias: bool = True) -> nn.Linear:
    """Weight of shape (6, 4)."""
    return nn.Linear(4, 6, bias=bias)


def low_rank(dense: nn.Linear) -> LowRankLinear:
    return LowRankLinear.from_dense(dense, torch.randn(6, 2), torch.randn(2, 4))


def resized(dense: nn.Linear) -> ResizedLinear:
    return ResizedLinear.from_dense(dense, torch.tensor([0, 2, 5]), torch.tensor([1, 3]))


def conv1d(bias: bool = True) -> Conv1D:
    """Weight of shape (4, 6), with other numbers than zero in the bias."""
    assert bias
    conv = Conv1D(6, 4)
    nn.init.normal_(conv.bias)
    return conv


def resized_conv1d(dense: Conv1D) -> ResizedConv1D:
    return ResizedConv1D.from_dense(dense, torch.tensor([0, 2, 5]), torch.tensor([1, 3]))


def low_rank_conv1d(dense: Conv1D) -> LowRankConv1D:
    return LowRankConv1D.from_dense(dense, torch.randn(6, 2), torch.randn(2, 4))


MAKERS = {
    "low_rank": low_rank,
    "low_rank_conv1d": low_rank_conv1d,
    "resized": resized,
    "resized_conv1d": resized_conv1d,
}
DENSE = {"low_rank": linear, "low_rank_conv1d": conv1d, "resized": linear, "resized_conv1d": conv1d}
CASES = [(kind, bias) for kind in MAKERS for bias in (True, False) if bias or DENSE[kind] is linear]


@pytest.fixture(params=CASES, ids=str)
def layer(request: pytest.FixtureRequest) -> CompressedLayer:
    kind, bias = request.param
    return MAKERS[kind](DENSE[kind](bias))


def test_spec_survives_json_and_gives_the_same_shapes(layer: CompressedLayer) -> None:
    spec = json.loads(json.dumps(layer.spec()))
    empty = empty_layer(spec)
    assert type(empty) is LAYER_KINDS[spec["kind"]]
    assert empty.spec() == layer.spec()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes


def test_key_is_loud(layer: CompressedLayer) -> None:
    """A dense layer refuses the state of a compressed one, for the shape of `weight`."""
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        DENSE[layer.kind](layer.bias is not None).load_state_dict(layer.state_dict(), strict=False)


def test_dense_shape_and_modes(layer: CompressedLayer) -> None:
    assert layer.dense_shape == ((4, 6) if layer.replaces is Conv1D else (6, 4))
    assert type(layer.to_dense()) is layer.replaces
    assert layer.to_dense().weight.shape == layer.dense_shape
    assert layer.to_dense().training
    assert not layer.eval().to_dense().training
    layer.weight.requires_grad_(False)
    assert not layer.to_dense().weight.requires_grad
    assert (layer.to_dense().bias is None) == (layer.bias is None)


def test_nothing_is_shared_with_the_dense_layer(layer: CompressedLayer) -> None:
    dense = layer.to_dense()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_no_random_number_is_drawn() -> None:
    dense = linear()
    factors = torch.randn(6, 2), torch.randn(2, 4)
    conv, state = conv1d(), torch.get_rng_state()
    low = LowRankLinear.from_dense(dense, *factors), LowRankConv1D.from_dense(conv, *factors)
    for made in (*low, resized(dense), resized_conv1d(conv)):
        made.to_dense()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(layer: CompressedLayer, dtype: torch.dtype) -> None:
    cast = layer.to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    assert all(buffer.dtype == torch.int32 for buffer in cast.buffers())
    assert cast.to_dense().weight.dtype == dtype
    remade = MAKERS[cast.kind](DENSE[cast.kind]().to(dtype))
    assert {p.dtype for p in remade.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"in_features": 4, "out_features": 6}, r"Nothing is cut: a weight of shape \(6, 4\)"),
        ({"in_features": 5}, r"\(6, 4\) can't be cut to \(3, 5\)"),
        ({"out_features": -1}, "out_features must be an integer"),
        ({"dense_in_features": 2**30, "dense_out_features": 2**11}, r"2,048 × 1,073,741,824 .*\(2\*\*40 at most\)"),
    ],
)
def test_resized_spec_from_elsewhere(sizes: dict[str, int], match: str) -> None:
    spec = {"kind": "resized", "in_features": 2, "out_features": 3, "dense_in_features": 4, "dense_out_features": 6}
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**spec, "bias": True, **sizes})


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"nx": 4, "nf": 6}, r"\(4, 6\) can't be cut to \(4, 6\): .* without a cut the layer stays a Conv1D"),
        ({"nx": 5}, r"\(4, 6\) can't be cut to \(5, 3\)"),
        ({"nf": 0}, "nf must be an integer"),
        ({"bias": False}, "Conv1D always has a bias"),
        ({"rank": 1}, "needs the entries bias, dense_nf, dense_nx, kind, nf, nx, got"),
    ],
)
def test_resized_conv1d_spec_from_elsewhere(sizes: dict[str, int], match: str) -> None:
    spec = {"kind": "resized_conv1d", "nx": 2, "nf": 3, "dense_nx": 4, "dense_nf": 6, "bias": True}
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**spec, **sizes})


class TestResizedLinear:
    def test_by_hand(self) -> None:
        dense = nn.Linear(3, 2)
        dense.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        dense.bias.data = torch.tensor([7.0, 8.0])
        layer = ResizedLinear.from_dense(dense, rows=torch.tensor([1]), columns=torch.tensor([0, 2]))
        assert layer(torch.tensor([1.0, 1.0])).tolist() == [18.0]
        assert layer.to_dense().weight.tolist() == [[0.0, 0.0, 0.0], [4.0, 0.0, 6.0]]
        assert layer.to_dense().bias.tolist() == [0.0, 8.0]

    @pytest.mark.parametrize("bias", [True, False])
    def test_is_the_masked_layer(self, bias: bool) -> None:
        """Cut outputs are missing, cut inputs don't count, and gradients are those of the masked layer."""
        dense = linear(bias)
        layer, x = resized(dense), torch.randn(5, 4, requires_grad=True)
        rows, columns = layer.kept()
        mask = torch.zeros(6, 4)
        mask[rows[:, None], columns] = 1
        out = layer(x[:, columns])
        masked = nn.functional.linear(x, dense.weight * mask, dense.bias)[:, rows]
        torch.testing.assert_close(out, masked)
        (out.square().sum()).backward()
        (masked.square().sum()).backward()
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad[rows][:, columns])
        if bias:
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad[rows])

    def test_one_side(self) -> None:
        only_rows = ResizedLinear.from_dense(linear(), rows=torch.arange(5))
        assert set(dict(only_rows.named_buffers())) == {"kept_rows"}
        every_row = ResizedLinear.from_dense(linear(), rows=torch.arange(6), columns=torch.tensor([3]))
        assert set(dict(every_row.named_buffers())) == {"kept_columns"}
        assert repr(every_row) == "ResizedLinear(in_features=1 of 4, out_features=6, bias=True)"

    def test_shrinking_twice_is_shrinking_once(self) -> None:
        dense = linear()
        twice = ResizedLinear.from_dense(resized(dense), rows=torch.tensor([1, 2]))
        once = ResizedLinear.from_dense(dense, torch.tensor([2, 5]), torch.tensor([1, 3]))
        assert twice.spec() == once.spec()
        assert list(twice.state_dict()) == list(once.state_dict())
        assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())
        assert torch.equal(twice.to_dense().weight, once.to_dense().weight)

    @pytest.mark.parametrize(
        ("rows", "match"),
        [
            (torch.arange(6), r"Nothing is cut: a weight of shape \(6, 4\)"),
            (None, "Nothing is cut"),
            (torch.tensor([], dtype=torch.long), "rows is empty; at least one of 6 must stay"),
            (torch.tensor([0, 6]), r"rows must lie in 0\.\.5, got 0\.\.6"),
            (torch.tensor([-1, 2]), r"rows must lie in 0\.\.5, got -1\.\.2"),
            (torch.tensor([2, 1]), r"rows must rise without repeats, got \[2, 1\]"),
            (torch.tensor([1, 1]), "rows must rise without repeats"),
            (torch.tensor([0.0, 1.0]), r"1-D tensor of integers, got torch.float32 of shape \(2,\)"),
            (torch.tensor([True] * 6), "integers, got torch.bool"),
            (torch.zeros(1, 1, dtype=torch.long), r"shape \(1, 1\)"),
            ([0, 1], "integers, got list"),
        ],
    )
    def test_indices(self, rows: Tensor, match: str) -> None:
        with pytest.raises(SettingError, match=match):
            ResizedLinear.from_dense(linear(), rows=rows)

    def test_corrupt_indices(self) -> None:
        layer = resized(linear())
        layer.kept_rows[2] = 6
        with pytest.raises(CheckpointError, match=r"corrupt: kept_rows must lie in 0\.\.5, got 0\.\.6"):
            layer.to_dense()


class TestResizedConv1D:
    def test_is_the_resized_linear_of_the_transposed_weight(self) -> None:
        conv, x = conv1d(), torch.randn(2, 5, 2)
        flipped = linear()
        flipped.weight.data, flipped.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
        one, other = resized_conv1d(conv), resized(flipped)
        torch.testing.assert_close(one(x), other(x))
        assert torch.equal(one.to_dense().weight, other.to_dense().weight.T)
        assert torch.equal(one.to_dense().bias, other.to_dense().bias)
        assert [index.tolist() for index in one.kept()] == [index.tolist() for index in other.kept()]
        one(x).square().sum().backward()
        other(x).square().sum().backward()
        torch.testing.assert_close(one.weight.grad, other.weight.grad.T)

    def test_shrinking_twice_is_shrinking_once(self) -> None:
        dense = conv1d()
        twice = ResizedConv1D.from_dense(resized_conv1d(dense), outputs=torch.tensor([1, 2]))
        once = ResizedConv1D.from_dense(dense, torch.tensor([2, 5]), torch.tensor([1, 3]))
        assert twice.spec() == once.spec()
        assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())
        assert repr(twice) == "ResizedConv1D(nx=2 of 4, nf=2 of 6)"

    def test_one_side(self) -> None:
        assert set(dict(ResizedConv1D.from_dense(conv1d(), torch.arange(5)).named_buffers())) == {"kept_outputs"}
        layer = ResizedConv1D.from_dense(conv1d(), inputs=torch.tensor([3]))
        assert set(dict(layer.named_buffers())) == {"kept_inputs"}

    @pytest.mark.parametrize(
        ("outputs", "match"),
        [
            (None, r"Nothing is cut: a weight of shape \(4, 6\)"),
            (torch.tensor([0, 6]), r"outputs must lie in 0\.\.5, got 0\.\.6"),
            (torch.tensor([2, 1]), "outputs must rise without repeats"),
        ],
    )
    def test_indices(self, outputs: Tensor | None, match: str) -> None:
        with pytest.raises(SettingError, match=match):
            ResizedConv1D.from_dense(conv1d(), outputs)

    def test_corrupt_indices(self) -> None:
        layer = resized_conv1d(conv1d())
        layer.kept_inputs[1] = 4
        with pytest.raises(CheckpointError, match=r"corrupt: kept_inputs must lie in 0\.\.3, got 1\.\.4"):
            layer.to_dense()
