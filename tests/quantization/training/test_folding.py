"""What training left: ranges that outlive saving, weights whose scales are read off, and parity with ONNX."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import convnets
import tiny
import training
from hfshrink.errors import SettingError
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.sites import make_sites
from hfshrink.quantization.training.state import FakeQuantization
from hfshrink.quantization.training.trainer import QATTrainer
from hfshrink.record import StepRecord, append_step

LSQ = {"weight_ranges": "lsq", "activation_ranges": "lsq"}


def trained(family="bert", quantization=None, steps=4, **config):
    """A tiny model after a few steps of training."""
    network = convnets.model(family) if family in convnets.MAKERS else tiny.model(family, seed=1, **config)
    images = family not in ("bert", "gpt2")
    QATTrainer(
        network,
        training.arguments(max_steps=steps, optim="adamw_torch", learning_rate=1e-3),
        quantization=quantization or QAT(4, **LSQ),
        train_dataset=pictures(8 if family == "vit" else 32) if images else training.rows(16),
        data_collator=None if images else training.collate,
    ).train()
    return network.eval()


def pictures(size):
    from datasets import Dataset

    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"pixel_values": images.tolist(), "labels": [i % 2 for i in range(16)]}).with_format(
        "torch"
    )


def test_ranges_and_scales_outlive_saving(tmp_path):
    network = trained()
    network.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    (ranges, scales), (again, others) = learned_ranges(network), learned_ranges(loaded)
    assert ranges == again
    assert all(torch.equal(scales[name], others[name]) for name in scales)


@pytest.mark.parametrize("quantization", [QAT(4), QAT(4, **LSQ), QAT(2, weight_ranges="lsq"), QAT(3, group_size=4)])
def test_the_scales_that_were_trained_are_read_off_the_folded_weights(quantization):
    network = tiny.model("bert", seed=3)
    fake = FakeQuantization(network, quantization)
    for site in fake.sites:
        if site.weight_scale is not None:
            site.weight_scale.data *= 2  # some above, some below what the largest weight allows
        site.project()
    expected = {site.name: site.weight().detach() for site in fake.sites}
    fake.fold()
    settings = {**quantization.given(), "activation_bits": None}
    modules = list(expected)
    append_step(network, StepRecord("quantize", quantization.method, settings=settings, modules=modules))
    scales = learned_ranges(network)[1]
    for site in fake.sites:
        weight = site.module.weight.detach()
        assert torch.equal(weight, expected[site.name])
        if site.weight_scale is not None:
            assert torch.allclose(scales[site.name], site.weight_scale.detach().squeeze(-1), rtol=1e-5)
        rows = site.rows().detach()
        codes = rows / scales[site.name].unsqueeze(-1)
        assert torch.allclose(codes, codes.round(), atol=1e-4)
    again = make_sites(network, QAT(quantization.weight_bits, group_size=quantization.group_size))
    for site in again:  # plain rounding to nearest finds the same codes
        assert torch.allclose(site.weight(), expected[site.name], rtol=1e-5, atol=1e-9)


def test_weights_that_changed_since_are_noticed(caplog):
    network = trained()
    network.bert.encoder.layer[0].output.dense.weight.data *= 1.3  # still a grid
    assert learned_ranges(network) is not None
    network.bert.encoder.layer[0].output.dense.weight.data += 0.01
    assert learned_ranges(network) is None
    assert "output.dense have changed since qat-w4a8" in caplog.text
    with pytest.raises(SettingError, match="holds no ranges of quantization-aware training"), fake_quantized(network):
        pass


def test_a_model_that_was_not_trained_so_has_none():
    assert learned_ranges(tiny.model("bert")) is None
    assert learned_ranges(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("quantization", [{}, {"weight_ranges": "lsq"}])
def test_rounding_to_nearest_of_four_bit_exports_finds_the_trained_weights(group_size, quantization):
    from hfshrink.quantization.graphs.rounding import dequantized, round_to_nearest

    network = trained(quantization=QAT(4, None, group_size=group_size, **quantization))
    for name in learned_ranges(network)[1]:
        weight = network.get_submodule(name).weight.detach()
        rounded = round_to_nearest(weight, 4, group_size)
        assert torch.allclose(dequantized(*rounded, group_size), weight, rtol=1e-5, atol=1e-8), name
