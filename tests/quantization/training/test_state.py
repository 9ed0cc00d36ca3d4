"""Fake quantization in the forward pass: what it watches, what it leaves alone, and what it leaves behind."""

import copy

import pytest
import torch

import tiny
from hfshrink.errors import CheckpointError
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.state import FakeQuantization

NAME = "bert.encoder.layer.0.intermediate.dense"


def made(**settings):
    """A model in training mode without dropout, its fake quantization, and the one module's site."""
    network = tiny.model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    fake = FakeQuantization(network, QAT(**{"include": NAME, **settings}))
    fake.set_progress(0.0)
    return network, fake, fake.sites[0]


def test_the_first_step_sets_the_range_and_the_next_move_it():
    network, fake, site = made(decay=0.75)
    seen = []
    hook = site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten()))
    with fake.installed():
        for seed in range(2):
            network(input_ids=tiny.inputs("bert", seed=seed)["input_ids"])
            fake.after_step(0.1)
    hook.remove()
    (low, high), (lower, higher) = (values.aminmax() for values in seen)
    assert float(site.low) == pytest.approx(float(0.75 * low + 0.25 * lower))
    assert float(site.high) == pytest.approx(float(0.75 * high + 0.25 * higher))


def test_batches_of_one_step_count_together_and_twice_is_once():
    (network, fake, site), (again, other, one) = made(), made()
    both = [tiny.inputs("bert", seed=seed)["input_ids"] for seed in range(2)]
    with fake.installed(), other.installed():
        for ids in (*both, *both):
            network(input_ids=ids)
        again(input_ids=torch.cat(both))
    for state in (fake, other):
        state.after_step(0.1)
    assert (float(site.low), float(site.high)) == pytest.approx((float(one.low), float(one.high)), rel=1e-6)


def test_padding_does_not_count():
    (network, fake, site), (again, other, one) = made(), made()
    batch = tiny.inputs("bert", batch=1, length=6)
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    with fake.installed(), other.installed():
        network(**batch)
        again(**padded)
    assert float(site.seen_low) == pytest.approx(float(one.seen_low), rel=1e-5)
    assert float(site.seen_high) == pytest.approx(float(one.seen_high), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_overflows_moves_nothing(bad):
    _, fake, site = made()
    site.see(torch.tensor([[-1.0, 2.0]]), None)
    fake.after_step(0.1)
    site.see(torch.tensor([[-9.0, bad]]), None)
    fake.after_step(0.2)
    assert (float(site.low), float(site.high)) == (-1.0, 2.0)


def test_parameters_stay_registered_and_nothing_is_left_behind():
    network, fake, site = made()
    keys, parameter = list(network.state_dict()), site.module.weight
    inside = []
    with fake.installed():
        hook = site.module.register_forward_pre_hook(lambda module, args: inside.append(module.weight))
        output = network(**tiny.inputs("bert"), labels=torch.tensor([0, 1, 0]))
        hook.remove()
        assert list(network.state_dict()) == keys
        output.loss.backward()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            site.module(torch.zeros(2, 5))
    assert inside[0] is not parameter
    assert site.module.weight is parameter
    assert parameter.grad is not None
    assert not any("weight" in module.__dict__ for module in network.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_copies_made_meanwhile_compute_in_float():
    network, fake, _ = made(weight_bits=2)
    batch = tiny.inputs("bert")
    expected = tiny.logits(network, batch)
    with fake.installed():
        assert torch.allclose(tiny.logits(copy.deepcopy(network), batch), expected)
        assert not torch.allclose(tiny.logits(network, batch), expected)


def test_folded_weights_are_what_was_computed_with_and_only_for_a_while():
    network, fake, site = made(weight_bits=3)
    latent = site.module.weight.detach().clone()
    expected = site.weight().detach()
    with fake.folded():
        assert torch.equal(site.module.weight, expected)
    assert torch.equal(site.module.weight, latent)
    fake.fold()
    assert torch.equal(network.get_submodule(NAME).weight, expected)


def test_learned_scales_start_from_the_range_and_never_leave_the_outer_codes_idle():
    network, fake, site = made(weight_bits=4, weight_ranges="lsq", activation_ranges="lsq")
    assert len(fake.learned()) == 2
    with fake.installed():
        network(**tiny.inputs("bert"))
    fake.after_step(0.1)
    assert float(site.input_scale.detach()) == pytest.approx(float((site.high - site.low) / 255))
    site.weight_scale.data *= 100
    site.project()
    assert torch.allclose(site.weight_scale.flatten(), site.module.weight.abs().amax(1) / 8)
    site.weight_scale.data.fill_(-1.0)
    site.project()
    assert (site.weight_scale > 0).all()


def test_a_state_of_other_settings_is_refused():
    _, fake, _ = made()
    _, other, _ = made(weight_ranges="lsq")
    with pytest.raises(CheckpointError, match=r"does not fit this run: weight_scale\.bert"):
        fake.load_state(other.state())
