"""SmoothQuant: the same logits in float, smaller spread of activations, folded only where nothing else reads them."""

import copy

import pytest
import torch

import tiny
from hfshrink.calibration import collect
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.quantization.graphs.smoothing import _ReaderWatch, smooth_model, smoothing_scale


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("bert", []),
        ("distilbert", []),
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("gpt2", ["ln_1", "ln_2"]),
        ("vit", ["layernorm_before", "layernorm_after"]),
    ],
)
def test_logits_stay_and_pre_norms_take_the_scale(family, norms):
    """BERT's norms feed the residual too: there the input is multiplied instead."""
    model, feed = tiny.model(family), [tiny.inputs(family), tiny.inputs(family, seed=1)]
    state = copy.deepcopy(model.state_dict())
    smoothed, results = smooth_model(model, feed, 0.5)
    for batch in feed:
        expected = tiny.logits(model, batch)
        assert torch.allclose(tiny.logits(smoothed, batch), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    moved = {name for name, value in smoothed.state_dict().items() if not torch.equal(value, state[name])}
    assert len(moved) >= 6
    assert [name.rpartition(".")[2] for name in results["folded"]] == norms * 2
    assert len(results["folded"]) + len(results["multiplied"]) == 4


def test_scale_by_hand_and_by_its_law():
    x, w = torch.tensor([16.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert smoothing_scale(x, w, 0.5).tolist() == [4.0, 0.5, 1.0, 1.0]
    assert smoothing_scale(x[:2], w[:2], 1.0).tolist() == [16.0, 1.0]
    assert smoothing_scale(x[:2], w[:2], 0.0).tolist() == [1.0, 0.25]
    scale = smoothing_scale(x[:2], w[:2], 0.5)  # an even split makes both equally large
    assert torch.allclose(x[:2] / scale, w[:2] * scale)


def test_outlier_channels_shrink():
    model, feed = tiny.model("llama"), [tiny.inputs("llama")]
    model.model.layers[0].input_layernorm.weight.data[3] *= 50
    smoothed, _ = smooth_model(model, feed, 0.5)
    spreads = []
    for network in (model, smoothed):
        with torch.no_grad(), collect(network, "input_absmax", include="model.layers.0.self_attn.q_proj") as stats:
            network(**feed[0])
        [found] = stats.values()
        spreads.append(found.input_absmax.max() / found.input_absmax.median())
    assert spreads[1] < 0.4 * spreads[0]


def test_norms_that_are_no_plain_factor_are_left():
    """Gemma multiplies by 1 + weight: dividing the weight would be wrong."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {name: tiny.CONFIGS["llama"][name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    model, batch = GemmaForCausalLM(GemmaConfig(**sizes, **heads)).eval(), tiny.inputs("llama")
    smoothed, results = smooth_model(model, [batch], 0.5)
    assert results["folded"] == []
    assert torch.allclose(tiny.logits(smoothed, batch), tiny.logits(model, batch), atol=1e-5)


def test_readers_are_seen_in_lists_too():
    """`torch.cat` takes a list: a norm whose output goes there must not be scaled."""
    watch, norm, linear = _ReaderWatch(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    norm.register_forward_hook(watch.made("norm"))
    linear.register_forward_pre_hook(watch.enter("group"))
    linear.register_forward_hook(watch.leave)
    with watch:
        x = norm(torch.ones(1, 4))
        linear(x)
        assert watch.readers == {"norm": {"group"}}
        torch.cat([x, x])
    assert watch.readers == {"norm": {"group", None}}


def test_groups_with_a_float_module_are_left():
    model, feed = tiny.model("llama"), [tiny.inputs("llama")]
    _, results = smooth_model(model, feed, 0.5, ["model.layers.0.self_attn.k_proj"])
    assert "model.layers.0.input_layernorm" not in results["folded"]
    assert len(results["folded"]) == 3


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="smooth needs a transformer .* got 'resnet'"):
        smooth_model(tiny.model("resnet"), [tiny.inputs("resnet")], 0.5)
    model = tiny.model("bert", num_hidden_layers=1)
    with pytest.raises(SettingError, match="nothing to smooth"):
        smooth_model(model, [], 0.5, [name for name, _ in model.named_modules()])
