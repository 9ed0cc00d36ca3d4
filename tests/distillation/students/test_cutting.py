"""Cutting: weights that don't fit are named, types stay, and the record says what was done."""

import pytest
import torch
import transformers

import tiny
from hfshrink import make_student, report
from hfshrink.errors import UnsupportedModelError


def test_layer_of_another_kind_is_named():
    """ModernBERT's first layer has no norm before its attention."""
    config = transformers.ModernBertConfig(**{**tiny.ENCODER, "num_hidden_layers": 4}, cls_token_id=2, sep_token_id=3)
    teacher = transformers.ModernBertForSequenceClassification(config)
    with pytest.raises(
        UnsupportedModelError,
        match=r"'modernbert' differ: layer 1 of the teacher can't be layer 0 of the student, it has model\.layers",
    ):
        make_student(teacher, layers=[1, 3])
    assert make_student(teacher, layers=[0, 3]).config.num_hidden_layers == 2


def test_layer_that_lacks_weights_is_named():
    """The first layer of a T5 holds the position bias of all."""
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_heads=2)
    teacher = transformers.T5EncoderModel(config)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* can't be layer 0 .* which needs .*relative_att"):
        make_student(teacher, layers=[1, 3])


def test_sparse_layer_in_the_place_of_a_dense_one_is_named():
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    config = transformers.Qwen2MoeConfig(
        **{**tiny.CONFIGS["llama"], "num_hidden_layers": 4}, **sizes, num_experts_per_tok=1, mlp_only_layers=[1]
    )
    with pytest.raises(UnsupportedModelError, match=r"family 'qwen2_moe' differ: layer 2 .* can't be layer 1"):
        make_student(transformers.Qwen2MoeForCausalLM(config), layers=[0, 2])


def test_every_parameter_keeps_its_dtype():
    teacher = tiny.model("bert").to(torch.bfloat16)
    teacher.classifier.float()
    teacher.classifier.weight.data += 1e-5
    for given in ({"num_layers": 1}, {"hidden_size": 8}, {"max_parameters": 5000}):
        student = make_student(teacher, **given)
        assert student.bert.pooler.dense.weight.dtype == torch.bfloat16
        assert student.classifier.weight.dtype == torch.float32
    assert torch.equal(make_student(teacher, 1).classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"layers": [1, 0]}, "layers"),
        ({"layers": [1, 0], "intermediate_size": 8}, "layers+magnitude"),
        ({"layers": [0, 1], "intermediate_size": 8}, "magnitude"),
        ({"num_layers": 2}, "copy"),
        ({"max_parameters": 10**9}, "copy"),
    ],
)
def test_method_says_what_was_done(given, method):
    assert report(make_student(tiny.model("bert"), **given)).steps[0].method == method


def test_empty_quantization_config_is_none():
    teacher = tiny.model("bert")
    teacher.config.quantization_config = None
    assert make_student(teacher, 1).config.num_hidden_layers == 1
