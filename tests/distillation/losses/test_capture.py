"""What a Recorder sees, and that the model does not notice."""

import copy
import json
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import tiny
from hfshrink.distillation.losses.capture import _LISTENERS, _SWITCHED, Features, Recorder, Wanted, probe
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import layer_stack

FAMILIES = ("bert", "roberta", "electra", "distilbert", "llama", "gpt2", "vit")
KINDS = [*((family, "sdpa") for family in FAMILIES), ("bert", "eager"), ("llama", "eager")]
EVERY_LAYER = Wanted(attention=(0, 1))


def hidden_wants(network):
    name, _ = layer_stack(network)
    return Wanted(outputs=(f"{name}.0", f"{name}.1"), inputs=(f"{name}.0",))


def record(network, batch, *wants):
    with Recorder(network, wants) as recorder:
        outputs = network(**batch)
        return outputs, recorder.take(batch.get("attention_mask"))


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_recording_changes_neither_logits_nor_the_attention_implementation(family, kind):
    network, batch = tiny.model(family), tiny.inputs(family)
    network.set_attn_implementation(kind)
    before = tiny.logits(network, batch)
    outputs, _ = record(network, batch, EVERY_LAYER, hidden_wants(network))
    assert torch.equal(outputs.logits, before)
    assert network.config._attn_implementation == kind
    assert not _LISTENERS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_scores_give_the_familys_own_attention_after_mask_and_softmax(family, kind):
    network, batch = tiny.model(family), tiny.inputs(family)
    network.set_attn_implementation("eager")
    attentions = network(**batch, output_attentions=True).attentions
    network.set_attn_implementation(kind)
    _, features = record(network, batch, EVERY_LAYER)
    rows = features.mask if features.mask is not None else torch.ones(3, 5, dtype=torch.bool)
    for number, expected in enumerate(attentions):
        states = features.attention[number]
        pairs = torch.ones((), dtype=torch.bool) if states.pairs is None else states.pairs
        ours = states.scores.masked_fill(~pairs, -math.inf).softmax(-1)
        assert torch.allclose(ours.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_layers_are_the_models_own_hidden_states(family):
    network, batch = tiny.model(family), tiny.inputs(family)
    hidden = network(**batch, output_hidden_states=True).hidden_states
    _, features = record(network, batch, hidden_wants(network))
    name, _ = layer_stack(network)
    assert torch.equal(features.inputs[f"{name}.0"], hidden[0])
    assert torch.equal(features.outputs[f"{name}.0"], hidden[1])


def test_grouped_queries_share_their_keys():
    _, features = record(tiny.model("llama"), tiny.inputs("llama"), EVERY_LAYER)
    states = features.attention[0]
    assert states.query.shape[1] == 4
    assert states.key.shape[1] == states.value.shape[1] == 2
    by_hand = states.query[1, 3, 5] @ states.key[1, 1, 2] / 2  # query heads 2 and 3 read key head 1; √4 = 2
    assert states.scores[1, 3, 5, 2].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_causal_models_forbid_the_future_with_and_without_padding():
    network = tiny.model("gpt2")
    batch = tiny.inputs("gpt2", batch=1)
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        _, features = record(network, inputs, EVERY_LAYER)
        assert torch.equal(features.attention[0].pairs[0, 0], torch.ones(7, 7, dtype=torch.bool).tril())


def test_gradients_flow_through_what_was_recorded():
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    _, features = record(network, batch, EVERY_LAYER, hidden_wants(network))
    total = features.attention[1].scores.square().mean() + features.outputs["bert.encoder.layer.0"].square().mean()
    total.backward()
    assert network.bert.encoder.layer[1].attention.self.key.weight.grad.abs().sum() > 0
    assert network.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def loss_gradients(network, batch):
    network.zero_grad()
    with Recorder(network, [EVERY_LAYER, hidden_wants(network)]) as recorder:
        outputs = network(**batch)
        features = recorder.take()
        total = outputs.logits.square().mean() + features.attention[1].scores.square().mean()
        total = total + features.attention[0].value.square().mean()
        total = total + features.outputs["bert.encoder.layer.1"].square().mean()
        total.backward()
        with pytest.raises(SettingError, match="Nothing was recorded"):  # what backward computed again is not new
            recorder.take()
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def test_gradient_checkpointing_gives_the_same_gradients():
    network = tiny.model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = tiny.inputs("bert")
    expected = loss_gradients(network, batch)
    network.activation_checkpointing_enable()
    found = loss_gradients(network, batch)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_reentrant_checkpointing_is_refused():
    network = tiny.model("bert").train()
    network.activation_checkpointing_enable({"use_reentrant": True})
    network.enable_input_require_grads()
    with pytest.raises(
        SettingError, match='attention of layer 0 of the bert model comes without.*"use_reentrant": False'
    ):
        record(network, tiny.inputs("bert"), EVERY_LAYER)
    assert network.config._attn_implementation == "sdpa"


def test_features_are_seen_through_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        network, batch = tiny.model("bert"), tiny.inputs("bert")
        wrapped = DistributedDataParallel(network)
        with Recorder(network, [EVERY_LAYER]) as recorder:
            wrapped(**batch)
            assert set(recorder.take().attention) == {0, 1}
    finally:
        torch.distributed.destroy_process_group()


def test_copies_that_data_parallel_runs_are_refused():
    network = tiny.model("bert")
    network._is_replica = True  # as torch marks them
    with pytest.raises(SettingError, match="nn.DataParallel.*torchrun"):
        record(network, tiny.inputs("bert"), EVERY_LAYER)


def test_masks_with_position_biases_of_each_head_tell_the_pairs():
    network, batch = other_model("bert"), tiny.inputs("bert")
    bias = torch.randn(3, 4, 7, 7)
    padded = (batch["attention_mask"] == 0)[:, None, None].expand(3, 4, 7, 7).clone()
    expected = ~padded[:, :1]
    padded[:, 0, :, 1] = True  # one head alone may not look there
    with Recorder(network, [EVERY_LAYER]) as recorder:
        network(batch["input_ids"], attention_mask=bias.masked_fill(padded, torch.finfo().min))
        assert torch.equal(recorder.take().attention[0].pairs, expected)


def test_autocast_is_recorded_as_it_runs():
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    with torch.autocast("cpu", torch.bfloat16):
        _, features = record(network, batch, EVERY_LAYER)
    assert features.attention[0].query.dtype == torch.bfloat16
    assert features.attention[0].scores.dtype == torch.float32


def test_take_gives_the_last_pass_once():
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    with Recorder(network, [EVERY_LAYER]) as recorder:
        network(**batch)
        network(**{name: value[:1] for name, value in batch.items()})
        features = recorder.take(batch["attention_mask"][:1])
        assert features.attention[0].query.shape[0] == 1
        assert features.mask.dtype == torch.bool
        with pytest.raises(SettingError, match="Nothing was recorded of the bert model.*no forward pass"):
            recorder.take()


def test_attention_is_put_back_after_an_exception():
    network = tiny.model("vit")
    with Recorder(network, [EVERY_LAYER]):
        assert network.config._attn_implementation == "hfshrink_sdpa"
    with pytest.raises(RuntimeError, match="mine"), Recorder(network, [EVERY_LAYER]):
        raise RuntimeError("mine")
    assert network.config._attn_implementation == "sdpa"
    assert not _LISTENERS


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_models_that_share_a_config_are_recorded_together(kind, first_out):
    networks, batch = [tiny.model("bert"), tiny.model("bert", seed=1)], tiny.inputs("bert")
    config = networks[0].config
    shared = [type(network)(config).eval() for network in networks]
    shared[0].set_attn_implementation(kind)
    recorders = [Recorder(network, [EVERY_LAYER]) for network in shared]
    for network, recorder in zip(shared, recorders, strict=True):
        recorder.__enter__()
        assert config._attn_implementation == f"hfshrink_{kind}"
        network(**batch)
        assert set(recorder.take().attention) == {0, 1}
    recorders[first_out].__exit__(None, None, None)
    last = 1 - first_out
    shared[last](**batch)
    assert set(recorders[last].take().attention) == {0, 1}
    recorders[last].__exit__(None, None, None)
    assert config._attn_implementation == kind
    assert not _SWITCHED


def test_a_model_saved_and_copied_while_recording_is_as_any_other(tmp_path):
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    with Recorder(network, [EVERY_LAYER]) as recorder:
        network.save_pretrained(tmp_path)
        other = copy.deepcopy(network)
        assert torch.equal(tiny.logits(other, batch), tiny.logits(network, batch))
        assert set(recorder.take().attention) == {0, 1}
    assert "hfshrink" not in (tmp_path / "config.json").read_text()
    assert "attn_implementation" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    reloaded = type(network).from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"


def test_a_second_recorder_of_attention_is_refused_and_leaves_the_first():
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    with Recorder(network, [EVERY_LAYER]) as recorder:
        with pytest.raises(SettingError, match="Another Recorder reads the attention of this bert model"):
            Recorder(network, [EVERY_LAYER]).__enter__()
        network(**batch)
        assert set(recorder.take().attention) == {0, 1}


def test_wants_that_the_model_does_not_have_are_refused():
    network = tiny.model("bert")
    with pytest.raises(SettingError, match="bert model has no module called 'encoder.nowhere'"):
        Recorder(network, [Wanted(outputs=("encoder.nowhere",))])
    with pytest.raises(SettingError, match=r"bert model has the layers 0\.\.1 in 'bert.encoder.layer', got layer 2"):
        Recorder(network, [Wanted(attention=(1, 2))])


def other_model(family, **config):
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(family, **{**tiny.ENCODER, **config})).eval()


@pytest.mark.parametrize("family", ["mpnet", "convbert", "roformer"])
def test_families_with_their_own_attention_are_named(family):
    network = other_model(family)
    with pytest.raises(UnsupportedModelError, match=f"family '{family}' can't be read.*AttentionInterface"):
        probe(network, EVERY_LAYER)


def test_modules_that_the_family_runs_past_are_named():
    groups = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    network = other_model("squeezebert", embedding_size=16, **groups)  # calls its layers' forward, not the layers
    with pytest.raises(UnsupportedModelError, match="'squeezebert' ran past .*layers.0"):
        probe(network, hidden_wants(network))


def test_cross_attention_in_a_layer_is_refused():
    network = other_model("bert", is_decoder=True, add_cross_attention=True)
    batch = {"input_ids": torch.tensor([[5, 6]]), "encoder_hidden_states": torch.randn(1, 3, 16)}
    with pytest.raises(UnsupportedModelError, match="attention of layer 0 more than once"):
        record(network, batch, EVERY_LAYER)


def test_a_probe_leaves_mode_and_random_state_as_they_were():
    network = tiny.model("resnet").train()
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    state = torch.random.get_rng_state()
    features = probe(network, Wanted(outputs=("resnet.encoder.stages.0",)))
    assert features.outputs["resnet.encoder.stages.0"].shape[1] == 8
    assert network.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in network.named_buffers())


def test_features_without_anything_are_empty():
    assert Features() == Features(outputs={}, inputs={}, attention={}, mask=None)
