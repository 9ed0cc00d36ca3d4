"""Codes packed and unpacked, what they stand for by hand, specs from elsewhere, and what the layer costs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from hfshrink.checkpoint import set_layers, to_dense
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import QuantizedLinear, empty_layer
from hfshrink.layers.quantized import NORMAL_FLOAT, pack_codes, packed_bytes, unpack_codes
from hfshrink.loading import load
from hfshrink.modules import count_parameters

SPEC = {"kind": "quantized", "in_features": 5, "out_features": 6, "bits": 4, "group_size": 3, "codebook": "int"}
SPEC |= {"zero_points": False, "bias": True}


def made(bits: int, group_size: int | None = 2, *, codebook: str = "int", zeros: bool = False, bias: bool = True):
    """Weight of shape (6, 5); groups of 2, 2 and 1."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (6, 5), generator=generator)
    scale = torch.rand(6, 1 if group_size is None else -(-5 // group_size), generator=generator)
    points = torch.randint(2**bits, scale.shape, generator=generator) if zeros else None
    dense = nn.Linear(5, 6, bias=bias)
    layer = QuantizedLinear.from_dense(
        dense, codes, scale, points, bits=bits, group_size=group_size, codebook=codebook
    )
    return layer, codes, scale, points, dense


CASES = [
    {"bits": 8, "group_size": None},
    {"bits": 4},
    {"bits": 4, "zeros": True},
    {"bits": 4, "codebook": "nf4"},
    {"bits": 3, "zeros": True},
    {"bits": 2, "group_size": None, "bias": False},
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 30])
def test_codes_come_back(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) <= bits * count / 8 + 2
    assert unpack_codes(packed, bits, count).tolist() == codes.tolist()


def test_packing_by_hand():
    assert pack_codes(torch.tensor([1, 2, 3, 0, 3]), 2).tolist() == [0b00111001, 0b11]
    assert pack_codes(torch.tensor([7, 4]), 3).tolist() == [0b0011, 0b11]  # low bits 3 and 0, high bits 1 and 1
    assert pack_codes(torch.tensor([200, 7]), 8).tolist() == [200, 7]


@pytest.mark.parametrize("case", CASES)
def test_weight_against_a_slow_loop(case):
    layer, codes, scale, points, dense = made(**case)
    size = case.get("group_size", 2) or 5
    expected = torch.empty(6, 5)
    for row in range(6):
        for column in range(5):
            code, group = int(codes[row, column]), column // size
            middle = 2 ** (case["bits"] - 1) if points is None else int(points[row, group])
            value = NORMAL_FLOAT[code] if case.get("codebook") == "nf4" else code - middle
            expected[row, column] = value * float(scale[row, group])
    torch.testing.assert_close(layer.dequantized(), expected)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, dense.bias))
    assert torch.equal(layer.to_dense()(x), layer(x))


@pytest.mark.parametrize("case", CASES)
def test_spec_gives_the_same_shapes_and_the_key_is_loud(case):
    layer = made(**case)[0]
    empty = empty_layer(json.loads(json.dumps(layer.spec())))
    assert empty.spec() == layer.spec()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(5, 6, bias=layer.bias is not None).load_state_dict(layer.state_dict(), strict=False)


def test_casts_keep_codes():
    layer = made(3, zeros=True)[0]
    before = layer.weight.clone(), layer.zero_point.clone()
    layer.to(torch.bfloat16)
    assert (layer.scale.dtype, layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.zero_point, before[1])
    assert layer(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dense_form_trains_and_shares_nothing():
    layer = made(4)[0].eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert dense.weight.requires_grad
    assert not dense.training
    before = layer.dequantized()
    with torch.no_grad():
        dense.weight.add_(1), dense.bias.add_(1)
    assert torch.equal(layer.dequantized(), before)
    assert layer.dense_shape == (6, 5)


def test_no_random_number_is_drawn():
    _, codes, scale, _, dense = made(4)
    state = torch.get_rng_state()
    QuantizedLinear.from_dense(dense, codes, scale, bits=4, group_size=2).to_dense()
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_reach_inputs_and_bias():
    layer, x = made(4)[0], torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, 5))
    assert layer.bias.grad.tolist() == [3.0] * 6


def test_memory_is_that_of_the_codes():
    codes, scale = torch.zeros(64, 128, dtype=torch.long), torch.ones(64, 2)
    layer = QuantizedLinear.from_dense(nn.Linear(128, 64), codes, scale, bits=4, group_size=64)
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) == 64 * 128 // 2 + 64 * 2 * 4 + 64 * 4
    assert count_parameters(layer) == (64, int(layer.bias.count_nonzero()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codes": torch.full((6, 5), 16)}, r"codes of 4 bits must lie in 0\.\.15, got 16\.\.16"),
        ({"codes": torch.zeros(5, 6, dtype=torch.int)}, r"codes must be integers of shape \(6, 5\)"),
        ({"codes": torch.zeros(6, 5)}, "got torch.float32"),
        ({"scale": torch.ones(6, 2)}, r"scale must be finite and of shape \(6, 3\), got \(6, 2\)"),
        ({"scale": torch.full((6, 3), float("nan"))}, "scale must be finite"),
        ({"zero_point": torch.full((6, 3), -1)}, r"zero_point of 4 bits must lie in 0\.\.15, got -1"),
        ({"bits": 5}, "8, 4, 3, 2 bits, or nf4 with 4 bits"),
        ({"bits": 3, "codebook": "nf4"}, "got 'nf4' with 3 bits"),
        ({"codebook": "fp4"}, "got 'fp4'"),
        ({"group_size": 6}, r"group_size must be in 1\.\.5 for a weight of shape \(6, 5\), got 6"),
        ({"group_size": 0}, "group_size must be in"),
    ],
)
def test_bad_values(change, match):
    given = {"codes": torch.zeros(6, 5, dtype=torch.long), "scale": torch.ones(6, 3), "bits": 4, "group_size": 2}
    with pytest.raises(SettingError, match=match):
        QuantizedLinear.from_dense(nn.Linear(5, 6), **{**given, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "8, 4, 3, 2 bits"),
        ({"bits": 4.0}, r"bits must be an integer .* got 4\.0"),
        ({"group_size": 0}, "group_size must be an integer"),
        ({"group_size": 6}, r"group_size must be in 1\.\.5"),
        ({"codebook": ["int"]}, "Expected a codebook by name"),
        ({"codebook": "x" * 999}, "got 'x{40}' with"),
        ({"codebook": None}, "needs the entries codebook and zero_points"),
        ({"zero_points": 1}, "zero_points that is true or false"),
        ({"codebook": "nf4", "zero_points": True}, "zero points True"),
        ({"extra": 1}, "needs the entries .* got .*extra"),
        ({"bias": None}, "bias that is true or false"),
        ({"in_features": 2**31, "out_features": 2**31}, "beyond any real model"),
    ],
)
def test_spec_from_elsewhere(change, match):
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**SPEC, **change})


def test_set_layers_refuses_a_tied_weight():
    network = tiny.model("gpt2")
    head = network.lm_head
    codes, scale = torch.zeros(head.weight.shape, dtype=torch.long), torch.ones(len(head.weight), 1)
    with pytest.raises(SettingError, match="weight of lm_head is tied"):
        set_layers(network, {"lm_head": QuantizedLinear.from_dense(head, codes, scale, bits=8)})


def test_other_bits_than_the_file_fail(tmp_path):
    network = tiny.model("bert")
    name = "bert.pooler.dense"
    dense = network.get_submodule(name)
    codes = torch.randint(16, dense.weight.shape)
    set_layers(network, {name: QuantizedLinear.from_dense(dense, codes, torch.ones(len(codes), 1), bits=4)})
    network.save_pretrained(tmp_path)
    again = to_dense(load(tmp_path)[0]).get_submodule(name)
    assert torch.equal(again.weight, codes.float() - 8)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{name}.scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no fitting scale for {name}"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][name]["bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        load(tmp_path)
