"""Layers run one by one give what the model gives, and the positions that count are those that the answer reads."""

import pytest
import torch
from torch import nn

import tiny
from hfshrink.errors import UnsupportedModelError
from hfshrink.layerwise import frozen, hidden_of, run_layer, without_cache
from hfshrink.modules import layer_stack
from hfshrink.pruning.oneshot.replay import record_layers

FAMILIES = ("bert", "roberta", "electra", "distilbert", "llama", "gpt2", "vit")


def outputs_of(layers, model, batch):
    found = []
    hooks = [layer.register_forward_hook(lambda _, __, y: found.append(hidden_of(y))) for layer in layers]
    tiny.logits(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_layers_equal_the_model(family):
    model, batches = tiny.model(family), [tiny.inputs(family, seed=seed) for seed in (0, 1)]
    layers = list(layer_stack(model)[1])
    calls = record_layers(model, layers, batches)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    for index, batch in enumerate(batches):
        outputs = outputs_of(layers, model, batch)
        state = calls.hidden[index]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                state = run_layer(layer, state, calls.others[number][index])
                assert torch.allclose(state, outputs[number], atol=1e-5)


def test_a_classifier_reads_the_first_token_and_a_language_model_all():
    batch = tiny.inputs("bert")
    for family, task, expected in (
        ("bert", None, torch.zeros(3, 7).index_fill(1, torch.tensor([0]), 1).bool()),
        ("llama", None, batch["attention_mask"].bool()),
        ("bert", "token-classification", batch["attention_mask"].bool()),
    ):
        model = tiny.model(family, task)
        calls = record_layers(model, list(layer_stack(model)[1]), [batch | {"labels": torch.zeros(3)}])
        assert torch.equal(calls.read[0], expected)
        assert torch.equal(calls.valid[0], batch["attention_mask"].bool())


def test_images_have_no_padding():
    model = tiny.model("vit")
    calls = record_layers(model, list(layer_stack(model)[1]), [tiny.inputs("vit")])
    assert calls.valid[0].all()
    assert calls.read[0].sum() == 3  # the class token of each


def test_only_decoders_have_a_cache_to_turn_off():
    assert without_cache(tiny.model("llama")) == {"use_cache": False}
    assert without_cache(nn.Linear(2, 2)) == {}


def test_weights_thaw_after_an_error():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)

    def stop():
        assert not layer.weight.requires_grad
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), frozen(layer):
        stop()
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


class Odd(nn.Module):
    """Calls its layers by name, or only the first of them."""

    def __init__(self, by_name):
        super().__init__()
        self.layers, self.by_name = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), by_name

    def forward(self, x):
        return (self.layers[0](input=x) if self.by_name else self.layers[0](x),)


@pytest.mark.parametrize(("by_name", "message"), [(True, "Layer 0 of Odd is not called"), (False, "do not all run")])
def test_layers_that_cannot_be_run_alone_are_refused(by_name, message):
    model = Odd(by_name)
    with pytest.raises(UnsupportedModelError, match=message):
        record_layers(model, list(model.layers), [{"x": torch.ones(1, 3, 2)}])
