"""bitsandbytes in memory and while loading: the same bits, a plain reload equals the model, traps are named."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import tiny
from hfshrink import load
from hfshrink.checkpoint import set_layers
from hfshrink.errors import CheckpointError, MissingDependencyError, SettingError, UnsupportedModelError
from hfshrink.layers import ResizedLinear
from hfshrink.quantization.weights.bits import load_bits, quantize_fp4, quantize_int8, quantize_layers, quantize_nf4

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")

WIDE = {  # 4 bits need inputs in multiples of 64 and outputs of 32
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64},
}
AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}
HEADS = {"bert": ["classifier"], "llama": ["lm_head"], "gpt2": ["lm_head"]}
SCHEMES = [("int8", True), ("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)  # QLoRA, appendix E
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture
def folder(tmp_path):
    tiny.model("bert", **WIDE["bert"]).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
def test_plain_reload_equals_the_model_also_when_saved_after_a_forward_pass(family, scheme, double, tmp_path):
    model = tiny.model(family, **WIDE[family])
    batch = tiny.inputs(family)
    expected = tiny.logits(model, batch)
    quantized, layers, results = quantize_layers(model, scheme, HEADS[family], double)
    assert quantized is model
    logits = tiny.logits(model, batch)
    assert 0 < (logits - expected).abs().max() < 0.5 * expected.abs().max()
    model.save_pretrained(tmp_path)  # packed for this processor by now, if that has AVX512-BF16
    plain = AUTO[family].from_pretrained(tmp_path)
    assert equal_states(plain, model)
    assert torch.equal(tiny.logits(plain, batch), logits)
    assert not set(layers) & set(HEADS[family])
    assert results["skipped"].keys() == set(HEADS[family])


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
def test_loading_and_memory_give_the_same_bits(family, scheme, double, tmp_path):
    model = tiny.model(family, **WIDE[family])
    model.save_pretrained(tmp_path)
    quantize_layers(model, scheme, HEADS[family], double)
    loaded, layers, results = load_bits(tmp_path, scheme, double_quantization=double)
    assert equal_states(loaded, model)
    assert loaded.config.to_dict()["quantization_config"] == model.config.to_dict()["quantization_config"]
    assert layers
    assert results["skipped"] == dict.fromkeys(HEADS[family], "task head")


def test_nf4_takes_the_nearest_of_sixteen_quantiles():
    model = tiny.model("bert", **WIDE["bert"])
    layer = model.bert.encoder.layer[0].intermediate.dense
    weight = layer.weight.detach().clone()
    quantize_nf4(model, double_quantization=False)
    model.dequantize()
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = levels[(blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale
    found = model.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.allclose(found, nearest.reshape(weight.shape), atol=1e-6)


def test_int8_rounds_to_127_steps_of_each_rows_largest_value():
    model = tiny.model("bert", **WIDE["bert"])
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    quantize_int8(model)
    state = model.state_dict()
    name = "bert.encoder.layer.0.intermediate.dense"
    scale = weight.half().abs().amax(1).float()
    assert torch.equal(state[f"{name}.SCB"], scale)
    back = state[f"{name}.weight"].float() * scale[:, None] / 127
    assert ((back - weight).abs() <= 0.5 * scale[:, None] / 127 + 1e-3 * weight.abs()).all()


def test_conv1d_is_quantized_in_the_orientation_of_a_linear():
    model = tiny.model("gpt2", n_embd=64)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (inputs, outputs)
    quantize_int8(model, ["lm_head"])
    stored = model.transformer.h[0].mlp.c_fc
    assert stored.weight.shape == weight.T.shape
    assert torch.allclose(stored.weight.float() * stored.weight.SCB[:, None] / 127, weight.T, atol=0.02)


def test_a_sparse_row_of_zeros_stays_zero():
    model = tiny.model("bert", **WIDE["bert"])
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[:40] = 0
    twin = copy.deepcopy(model)
    for quantized in (quantize_int8(model)[0], quantize_nf4(twin)[0]):
        assert torch.isfinite(tiny.logits(quantized, tiny.inputs("bert"))).all()


def test_tied_weights_and_heads_stay_float_also_when_nothing_is_excluded():
    model = tiny.model("llama", **WIDE["llama"])
    _, layers, results = quantize_int8(model, ())
    assert results["skipped"] == {"lm_head": "its weight is tied to another one"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(layers) == 2 * 7


def test_an_untied_head_is_quantized_when_nothing_is_excluded():
    model = tiny.model("llama", **{**WIDE["llama"], "tie_word_embeddings": False, "vocab_size": 64})
    assert "lm_head" in quantize_nf4(model)[1]
    assert torch.isfinite(tiny.logits(model, tiny.inputs("llama"))).all()


def test_widths_that_do_not_divide_are_skipped_and_run(tmp_path):
    model = tiny.model("bert", hidden_size=64, intermediate_size=80)
    _, layers, results = quantize_nf4(model, ["classifier"])
    name = "bert.encoder.layer.0.output.dense"
    assert results["skipped"][name] == "4 bits need a multiple of 32 outputs and of 64 inputs, this has 64 and 80"
    assert len(layers) == 2 * 4 + 1
    logits = tiny.logits(model, tiny.inputs("bert"))
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(plain, tiny.inputs("bert")), logits)


def test_the_base_model_loads_from_the_checkpoint_with_its_skipped_layers(tmp_path):
    model = tiny.model("bert", hidden_size=64, intermediate_size=80)
    quantize_nf4(model, ["classifier", "bert.pooler.dense"])
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    batch = tiny.inputs("bert")
    with torch.no_grad():
        assert torch.equal(base(**batch).pooler_output, model.bert(**batch).pooler_output)


def test_a_skipped_name_that_ends_others_takes_them_along():
    """transformers matches names to skip as suffixes: what it would skip on reload must not be quantized."""

    class Renamed(type(tiny.model("bert"))):
        pass

    model = tiny.model("bert", **WIDE["bert"])
    model.preclassifier = nn.Linear(64, 64)
    _, layers, results = quantize_nf4(model, ["classifier"])
    assert "preclassifier" not in layers
    assert results["skipped"]["preclassifier"].startswith("transformers would skip it")


def test_nothing_left_raises():
    with pytest.raises(SettingError, match=r"nf4 finds nothing to quantize among 14 linear layers.*Try int8"):
        quantize_nf4(tiny.model("bert"), ["classifier"])
    with pytest.raises(SettingError, match="int8 finds nothing to quantize among 1 linear layers"):
        quantize_int8(tiny.model("resnet"), ["classifier.1"])


def test_what_is_quantized_already_is_refused(folder, tmp_path):
    model, _, _ = quantize_int8(tiny.model("bert", **WIDE["bert"]))
    with pytest.raises(UnsupportedModelError, match=r"quantized by bitsandbytes already.*float model"):
        quantize_nf4(model)
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match="quantized by bitsandbytes already"):
        load_bits(tmp_path / "int8", "nf4")


def test_a_layer_map_takes_the_slot(tmp_path):
    model, name = tiny.model("bert", **WIDE["bert"]), "bert.encoder.layer.0.intermediate.dense"
    set_layers(model, {name: ResizedLinear.from_dense(model.get_submodule(name), rows=torch.arange(96))})
    with pytest.raises(SettingError, match=r"one place for a quantization.*to_dense"):
        quantize_int8(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=r"one place for a quantization.*to_dense"):
        load_bits(tmp_path, "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_nothing_is_changed(value, tmp_path):
    model = tiny.model("bert", **WIDE["bert"])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value
    model.save_pretrained(tmp_path)
    for scheme in ("int8", "nf4"):
        with pytest.raises(SettingError, match=r"layer\.1\.output\.dense\.weight has NaN or infinite"):
            quantize_layers(model, scheme)
        with pytest.raises(SettingError, match=r"layer\.1\.output\.dense\.weight has NaN or infinite"):
            load_bits(tmp_path, scheme)
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_int8_refuses_what_float16_can_not_hold():
    model = tiny.model("bert", **WIDE["bert"])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = -70000
    with pytest.raises(SettingError, match=r"layer\.1\.output\.dense\.weight has values up to 70000.*65504"):
        quantize_int8(model)
    quantize_fp4(model)


def test_wrong_calls_are_named(folder):
    with pytest.raises(SettingError, match="scheme must be one of int8, nf4, fp4, got 'int4'"):
        load_bits(folder, "int4")
    with pytest.raises(SettingError, match="'\\*clasifier' matches none"):
        load_bits(folder, "int8", exclude="*clasifier")
    with pytest.raises(CheckpointError, match="no folder"):
        load_bits(folder / "nowhere" / "at" / "all", "int8")


def test_exclude_names_layers_and_embeddings_pass(folder):
    _, layers, results = load_bits(folder, "nf4", exclude=["*.attention.*", "*word_embeddings"])
    assert all("attention" not in name for name in layers)
    assert results["skipped"]["bert.encoder.layer.0.attention.self.key"] == "excluded"
    assert results["skipped"]["classifier"].startswith("4 bits need")


def test_bitsandbytes_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hfshrink\[bnb\]'"):
        quantize_int8(tiny.model("bert"))


def test_no_notice_per_layer_and_pass(caplog):
    with caplog.at_level(logging.WARNING):
        model, _, _ = quantize_int8(tiny.model("bert", **WIDE["bert"]))
        tiny.logits(model, tiny.inputs("bert"))
    assert caplog.records == []
    logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert caplog.records[-1].message == "something else"


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_weight_bytes_are_those_of_the_checkpoint_scales_included(scheme, tmp_path):
    model, _, results = quantize_layers(tiny.model("gpt2", n_embd=64), scheme)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors").values()
    assert results["weight_bytes"] == sum(tensor.nbytes for tensor in saved)


def test_load_reads_it_again(tmp_path, folder):
    model, _, _ = load_bits(folder, "nf4")
    model.save_pretrained(tmp_path / "nf4")
    assert isinstance(load(tmp_path / "nf4")[0].config.quantization_config, BitsAndBytesConfig)
