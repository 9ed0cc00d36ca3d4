"""Which modules are factored, why others are not, and the matrices that stand in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from hfshrink.checkpoint import set_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.factorization.sites import check_is_model, factorable, factored, matrix, size_of
from hfshrink.layers import LowRankConv1D, LowRankConv2d, LowRankEmbedding, LowRankLinear, SeparableConv2d

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(("family", "count"), [("bert", 13), ("llama", 14), ("gpt2", 8), ("vit", 13), ("resnet", 6)])
def test_weights_inside_the_base_model_are_found_and_heads_listed(family, count):
    modules, skipped = factorable(tiny.model(family))
    assert len(modules) == count
    assert not set(modules) & set(skipped)
    assert "the task head" in skipped.values() or family == "gpt2"


def test_tied_weights_stay_and_say_with_whom():
    _, skipped = factorable(tiny.model("gpt2"), exclude=())
    assert skipped["lm_head"] == "its weight is tied to transformer.wte.weight"
    assert skipped["transformer.wte"] == "its weight is tied to lm_head.weight"
    with pytest.raises(SettingError, match="no module left to factor.*lm_head: its weight is tied"):
        factorable(tiny.model("gpt2"), "lm_head", ())


def test_the_head_is_taken_where_nothing_is_excluded():
    assert "classifier" in factorable(tiny.model("bert"), exclude=())[0]
    with pytest.raises(SettingError, match="classifier: the task head"):
        factorable(tiny.model("bert"), "classifier")


def test_embeddings_are_taken_only_where_they_alone_are_named():
    model = tiny.model("bert")
    assert list(factorable(model, "*word_embeddings")[0]) == ["bert.embeddings.word_embeddings"]
    for include in ("*", "bert.*"):
        modules, skipped = factorable(model, include)
        assert not any(isinstance(module, nn.Embedding) for module in modules.values())
        assert "an embedding" in skipped["bert.embeddings.word_embeddings"]
    assert len(factorable(model, ["*", "*word_embeddings"])[0]) == 14


def test_grouped_convolutions_and_thin_kernels_stay_dense():
    model = tiny.model("resnet")
    model.resnet.spare = nn.Conv2d(4, 4, 3, groups=2)
    assert "in 2 groups" in factorable(model)[1]["resnet.spare"]
    _, skipped = factorable(model, form="separable")
    assert [reason for reason in skipped.values() if "kernel of 1×1 gains nothing in the form 'separable'" in reason]


def test_modules_with_a_forward_of_their_own_stay_dense():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny.model("bert")
    model.bert.pooler.dense = Doubled(16, 16)
    assert "computed in a way of its own" in factorable(model)[1]["bert.pooler.dense"]


def test_what_is_factored_already_is_listed_or_refused_by_name():
    model = tiny.model("bert")
    dense = model.get_submodule(QUERY)
    set_layers(model, {QUERY: LowRankLinear.from_dense(dense, torch.ones(16, 1), torch.ones(1, 16))})
    modules, skipped = factorable(model)
    assert len(modules) == 12
    assert skipped[QUERY] == "is compressed already (low_rank)"
    with pytest.raises(SettingError, match=r"layer.0.attention.self.query: is compressed already"):
        factorable(model, QUERY)
    with pytest.raises(SettingError, match="query is compressed already, by a LowRankLinear. Leave it out"):
        factorable(model, ["*output.dense", QUERY])


def test_bad_weights_are_refused_by_name():
    model = tiny.model("bert")
    model.get_submodule(QUERY).weight.data[0, 0] = torch.nan
    with pytest.raises(SettingError, match=r"layer.0.attention.self.query.weight has NaN"):
        factorable(model)
    assert factorable(model, exclude="*query")
    model = tiny.model("bert")
    model.get_submodule(QUERY).weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"query.weight is of type torch.int8: quantized weights"):
        factorable(model)
    model = tiny.model("bert")
    nn.utils.parametrizations.weight_norm(model.get_submodule(QUERY))
    with pytest.raises(SettingError, match=r"query.weight is parametrized"):
        factorable(model)


def test_unknown_names_and_forms_are_refused():
    for how in ({"include": "*nothing*"}, {"exclude": "*nothing*"}):
        with pytest.raises(SettingError, match="The wildcard '\\*nothing\\*' matches none"):
            factorable(tiny.model("bert"), **how)
    with pytest.raises(SettingError, match="form must be one of channel, separable, tucker, got 'cp'"):
        factorable(tiny.model("bert"), form="cp")
    with pytest.raises(SettingError, match="exclude takes all"):
        factorable(tiny.model("bert"), "*query", "*query")
    with pytest.raises(UnsupportedModelError, match="A dict can't be factored: its weights lie in a graph"):
        check_is_model({})


@pytest.mark.parametrize(
    ("module", "form", "kind"),
    [
        (nn.Linear(5, 4), "channel", LowRankLinear),
        (Conv1D(4, 5), "channel", LowRankConv1D),
        (nn.Embedding(6, 4), "channel", LowRankEmbedding),
        (nn.Conv2d(3, 5, (2, 3), bias=False), "channel", LowRankConv2d),
        (nn.Conv2d(3, 5, (2, 3)), "separable", SeparableConv2d),
    ],
)
def test_layers_of_all_kinds_stand_for_the_product(module, form, kind):
    size = size_of(module, form)
    up, down = torch.randn(matrix(module, form=form).shape[0], 2), torch.randn(2, matrix(module, form=form).shape[1])
    layer = factored(module, up, down, form)
    assert type(layer) is kind
    torch.testing.assert_close(matrix(layer.to_dense(), form=form), up @ down, rtol=1e-5, atol=1e-5)
    weights = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
    assert weights == size.parameters(2)
    assert size.dense_parameters == module.weight.numel()


def test_stacks_of_experts_are_named_among_what_stays_dense() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    modules, skipped = factorable(MixtralForCausalLM(MixtralConfig(**sizes, **heads)))
    assert set(modules) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert skipped["model.layers.0.mlp.experts.gate_up_proj"] == "a stack of 3 matrices, as of experts"
    assert "model.layers.0.mlp.experts.down_proj" in skipped
