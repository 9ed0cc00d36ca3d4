"""4-bit layers: exact after forward passes, whatever the processor packs them into."""

import copy

import pytest
import torch

import tiny
from hfshrink.errors import UnsupportedModelError
from hfshrink.quantization.weights.bits import quantize_layers
from hfshrink.quantization.weights.exactness import dequantize, four_bit_layers, keep_exact

bnb = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
PACKS = bool(bnb.functional.has_avx512bf16())
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def four_bit(scheme, double):
    return quantize_layers(tiny.model("bert", **WIDE), scheme, ["classifier"], double)[0]


@pytest.mark.skipif(not PACKS, reason="this processor has no AVX512-BF16, so nothing is packed")
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_without_care_a_state_taken_after_a_forward_pass_is_corrupt(scheme):
    """The trap itself: once bitsandbytes is cured, `keep_exact` can go."""
    layer = bnb.nn.Linear4bit(64, 32, compress_statistics=False, quant_type=scheme)
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), quant_type=scheme, compress_statistics=False, module=layer)
    layer.weight = layer.weight.to("cpu")
    before = layer.state_dict()["weight.absmax"].clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    assert layer.state_dict()["weight.absmax"].shape != before.shape


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_state_is_the_same_before_and_after_forward_passes(scheme, double):
    model = four_bit(scheme, double)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        first = tiny.logits(model, tiny.inputs("bert"))
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(tiny.logits(model, tiny.inputs("bert")), first)


def test_a_copy_is_exact_too():
    model = four_bit("nf4", True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tiny.logits(model, tiny.inputs("bert"))
    twin = copy.deepcopy(model).state_dict()
    assert all(torch.equal(before[key], twin[key]) for key in before)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_dequantized_is_the_same_before_and_after_forward_passes(scheme, double, tmp_path):
    one, other = (quantize_layers(tiny.model("bert", **WIDE), scheme, ["classifier"], double)[0] for _ in range(2))
    tiny.logits(other, tiny.inputs("bert"))
    other.save_pretrained(tmp_path / "quantized")  # the config's dtype is a string from here on
    dequantize(one)
    dequantize(other)
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == tiny.model("bert", **WIDE).state_dict().keys()
    assert all(torch.equal(one_state[key], other_state[key]) for key in one_state)
    other.save_pretrained(tmp_path / "float")
    plain = type(other).from_pretrained(tmp_path / "float")
    assert torch.equal(tiny.logits(plain, tiny.inputs("bert")), tiny.logits(one, tiny.inputs("bert")))
    assert not hasattr(plain.config, "quantization_config")
    one.half()


def test_a_float_model_has_nothing_to_turn_back():
    with pytest.raises(UnsupportedModelError, match="no layers of bitsandbytes"):
        dequantize(tiny.model("bert"))


@pytest.mark.skipif(not PACKS, reason="this processor has no AVX512-BF16, so nothing is packed")
def test_layers_packed_before_are_refused(tmp_path):
    four_bit("nf4", True).save_pretrained(tmp_path)
    plain = type(tiny.model("bert")).from_pretrained(tmp_path).eval()
    tiny.logits(plain, tiny.inputs("bert"))
    with pytest.raises(UnsupportedModelError, match=r"layer\.0\.attention\.self\.query was packed"):
        keep_exact(plain)
    with pytest.raises(UnsupportedModelError, match="Load the model again"):
        dequantize(plain)
    assert four_bit_layers(plain)
