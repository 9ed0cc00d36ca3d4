"""bf16 and fp16: a plain reload is the model, nothing overflows unseen, families keep what they keep."""

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import tiny
from hfshrink import load
from hfshrink.checkpoint import set_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers import ResizedLinear
from hfshrink.quantization.weights.casting import cast_bf16, cast_fp16, cast_weights

T5 = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=30)


@pytest.mark.parametrize("cast", [cast_bf16, cast_fp16])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_a_plain_reload_equals_the_model(family, cast, tmp_path):
    model, dtype = tiny.model(family), torch.bfloat16 if cast is cast_bf16 else torch.float16
    batch = {key: part.to(dtype) if part.is_floating_point() else part for key, part in tiny.inputs(family).items()}
    weight = next(model.parameters()).detach().clone()
    same, modules, results = cast(model)
    assert same is model
    assert torch.equal(next(model.parameters()), weight.to(dtype))
    assert results == {"skipped": {}}
    assert modules
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert plain.dtype == model.dtype == dtype
    assert torch.equal(tiny.logits(plain, batch), tiny.logits(model, batch))


def test_what_is_not_saved_is_not_rounded(tmp_path):
    """`model.bfloat16()` rounds the frequencies of rotary positions; from_pretrained makes them anew in float32."""
    model = tiny.model("llama")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    cast_bf16(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_tied_weights_stay_tied():
    model = tiny.model("gpt2")
    cast_bf16(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_family_that_keeps_float32_keeps_it(tmp_path):
    model = T5ForConditionalGeneration(T5)
    _, modules, results = cast_fp16(model)
    kept = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert results["skipped"][kept] == "its family keeps it in float32"
    assert kept not in modules
    model.save_pretrained(tmp_path)
    one, other = model.state_dict(), T5ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)
    assert not cast_bf16(T5ForConditionalGeneration(T5))[2]["skipped"]


def test_fp16_overflow_raises_before_anything_is_changed():
    model = tiny.model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = 65520
    with pytest.raises(SettingError, match=r"layer\.1\.output\.dense\.weight has values up to 65520.*65504.*bf16"):
        cast_fp16(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    cast_bf16(model)


def test_nan_is_named():
    model = tiny.model("bert")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(SettingError, match=r"classifier\.bias has NaN"):
        cast_bf16(model)


def test_nothing_can_be_kept_in_float32():
    with pytest.raises(SettingError, match=r"bf16 can't leave classifier in float32: a config names one dtype"):
        cast_bf16(tiny.model("bert"), ["classifier"])


def test_no_change_and_other_dtypes_raise():
    model, _, _ = cast_bf16(tiny.model("bert"))
    with pytest.raises(SettingError, match="no weights to cast"):
        cast_bf16(model)
    with pytest.raises(SettingError, match=r"bfloat16 or torch\.float16, got torch\.float64"):
        cast_weights(model, dtype=torch.float64)


def test_a_layer_map_stays_and_reloads(tmp_path):
    model = tiny.model("bert")
    layer, kept = model.bert.encoder.layer[0], torch.arange(12)
    cut = {
        "intermediate": ResizedLinear.from_dense(layer.intermediate.dense, rows=kept),
        "output": ResizedLinear.from_dense(layer.output.dense, columns=kept),
    }
    set_layers(model, {f"bert.encoder.layer.0.{name}.dense": small for name, small in cut.items()})
    cast_bf16(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)[0]
    assert torch.equal(tiny.logits(again, tiny.inputs("bert")), tiny.logits(model, tiny.inputs("bert")))


def test_a_quantized_model_is_refused():
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    from hfshrink.quantization.weights.bits import quantize_int8

    model, _, _ = quantize_int8(tiny.model("bert"))
    with pytest.raises(UnsupportedModelError, match="quantized by bitsandbytes already"):
        cast_bf16(model)


def test_causal_generation_runs_after_reload(tmp_path):
    model, _, _ = cast_bf16(tiny.model("llama"))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.inputs("llama", batch=1)["input_ids"]
    assert torch.equal(
        plain.generate(ids, max_new_tokens=4, do_sample=False), model.generate(ids, max_new_tokens=4, do_sample=False)
    )
