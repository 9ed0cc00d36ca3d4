"""Which layers are taken: by shape, tie, class, name; on meta as in memory."""

import pytest
import torch
from torch import nn

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.quantization.weights.choice import (
    check_finite,
    check_unquantized,
    choose_layers,
    kept_names,
    layer_shape,
    linear_layers,
)
from hfshrink.streaming.sources import empty_model

WIDE = {
    "bert": {"hidden_size": 64, "intermediate_size": 80},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64},
}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("family", WIDE)
def test_a_model_on_meta_has_the_same_choice(family, scheme, tmp_path):
    model = tiny.model(family, **WIDE[family])
    model.save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert choose_layers(empty, scheme, kept_names(empty, None)) == choose_layers(
        model, scheme, kept_names(model, None)
    )


def test_shapes_of_linears_and_conv1ds_read_outputs_first():
    layers = linear_layers(tiny.model("gpt2"))
    assert layer_shape(layers["transformer.h.0.mlp.c_fc"]) == (64, 16)
    assert layer_shape(layers["lm_head"]) == (52, 16)


def test_subclasses_of_linear_are_not_replaced():
    class Own(nn.Linear):
        pass

    model = tiny.model("bert", **WIDE["bert"])
    model.bert.pooler.dense = Own(64, 64)
    assert choose_layers(model, "int8").skipped == {"bert.pooler.dense": "a Own, which transformers does not replace"}


def test_weights_tied_in_fact_are_skipped_though_the_family_declares_no_tie():
    model = tiny.model("bert", **WIDE["bert"])
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    first.query.weight = second.query.weight
    skipped = choose_layers(model, "int8").skipped
    assert set(skipped.values()) == {"its weight is tied to another one"}
    assert len(skipped) == 2


def test_exclude_takes_wildcards_of_conv1ds_too():
    model = tiny.model("gpt2")
    assert set(kept_names(model, "*c_fc")) == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}
    assert kept_names(model, ()) == {}
    assert kept_names(model, None) == {"lm_head": "task head"}


def test_finite_values_pass():
    check_finite("layer", torch.tensor([-1e30, 1e30]), "nf4")
    check_finite("layer", torch.tensor([-65504.0, 65504.0]), "int8", through_float16=True)
    with pytest.raises(SettingError, match="layer has values up to 65505"):
        check_finite("layer", torch.tensor([-65505.0, 1.0]), "int8", through_float16=True)


def test_configs_as_objects_and_as_json_are_checked():
    check_unquantized({}, "here")
    check_unquantized(tiny.model("bert").config, "here")
    with pytest.raises(UnsupportedModelError, match="here is quantized by gptq already"):
        check_unquantized({"quantization_config": {"quant_method": "gptq"}}, "here")
    with pytest.raises(SettingError, match="here holds compressed layers"):
        check_unquantized({"quantization_config": {"quant_method": "hfshrink"}}, "here")
