"""Search, rearrangement and rescaling together: budgets hold, nothing asked changes nothing."""

import copy
import json

import pytest
import torch

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.search import tuning
from hfshrink.pruning.search.tuning import search_and_tune
from hfshrink.pruning.units.groups import UnitGroup, find_units, used_units


def labelled(family, **options):
    batch = tiny.inputs(family, batch=4, **options)
    if tiny.TASK[family] == "text-generation":
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch | {"labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2", "vit"])
def test_budget_holds_and_masks_are_in_the_weights(family):
    model = tiny.model(family)
    groups = find_units(model, "heads+neurons")
    batches = [labelled(family, seed=seed) for seed in range(3)]
    kept, results = search_and_tune(model, groups, 0.4, batches, sequence_length=7)
    assert 0.5 < results["macs_ratio"] <= 0.6
    assert results["macs_after"] == round(results["macs_ratio"] * results["macs_before"])
    assert results["latency_ratio"] is None
    for group in groups:
        assert torch.equal(used_units(model, group), kept[group.name])
        found = results["groups"][group.name]
        assert (found["units"], found["kept"]) == (group.units, int(kept[group.name].sum()))
        assert found["lost_energy"][1] <= found["lost_energy"][0] + 1e-9
        assert ("rescaling" in found) == (found["kept"] < found["units"])
    assert json.loads(json.dumps(results)) == results
    assert set(results["seconds"]) == {"costs", "gradients", "search", "rearrange", "rescale"}
    assert torch.isfinite(tiny.logits(model, tiny.inputs(family))).all()


def test_no_sparsity_changes_nothing():
    model = tiny.model("bert")
    before = copy.deepcopy(model.state_dict())
    kept, results = search_and_tune(
        model, find_units(model, "heads+neurons"), 0.0, [labelled("bert")], sequence_length=7
    )
    assert all(mask.all() for mask in kept.values())
    assert results["macs_ratio"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rescale", [True, False])
def test_dead_neurons_go_first_and_the_logits_stay(rescale):
    """Nothing reads every second neuron: their importance is zero, and so is what is to be made up for."""
    model, batch = tiny.model("bert"), labelled("bert")
    groups = find_units(model, "neurons")
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight.data[:, ::2] = 0
    before = tiny.logits(model, batch)
    kept, _ = search_and_tune(model, groups, 0.5, [batch], sequence_length=7, rescale=rescale)
    assert all(mask.nonzero().flatten().tolist() == list(range(1, 24, 2)) for mask in kept.values())
    assert torch.allclose(tiny.logits(model, batch), before, atol=1e-5)


def test_steps_can_be_left_out():
    model, batch = tiny.model("bert"), labelled("bert")
    groups = find_units(model, "heads+neurons")
    weights = copy.deepcopy(model.state_dict())
    kept, results = search_and_tune(model, groups, 0.5, [batch], sequence_length=7, rearrange=False, rescale=False)
    assert all(set(found) == {"units", "kept"} for found in results["groups"].values())
    for group in groups:
        name = f"{group.reads[0].module}.weight"
        columns = torch.zeros(weights[name].shape[1]).index_fill(
            0, group.reads[0].positions[kept[group.name]].flatten(), 1
        )
        assert torch.equal(model.state_dict()[name], weights[name] * columns)


def test_latency_budgets_are_met_by_the_table(monkeypatch):
    """Steps of two heads and eight neurons instead of a clock."""

    def table(model, groups, sequence_length):
        steps = {"heads": 2, "neurons": 8}
        return {g.name: torch.ceil(torch.arange(g.units + 1) / steps[g.structure]).double() for g in groups}

    monkeypatch.setattr(tuning, "measure_block_latencies", table)
    model = tiny.model("bert")
    groups = find_units(model, "heads+neurons")
    kept, results = search_and_tune(
        model, groups, 0.4, [labelled("bert")], cost="latency", sequence_length=7, rearrange=False
    )
    assert results["latency_ms_before"] == 10
    assert results["latency_ms_after"] <= 6
    assert results["latency_ratio"] == results["latency_ms_after"] / 10
    assert {int(kept[g.name].sum()) % {"heads": 2, "neurons": 8}[g.structure] for g in groups} == {0}


def test_a_clock_works_too():
    model = tiny.model("bert", hidden_size=64, intermediate_size=2048)
    _, results = search_and_tune(
        model, find_units(model, "neurons"), 0.3, [labelled("bert")], cost="latency", sequence_length=7, halfway=True
    )
    assert 0 < results["latency_ratio"] <= 0.7


def test_least_squares_sees_some_tokens_only(monkeypatch):
    batches = [labelled("bert", seed=seed) for seed in range(4)]  # 7 + 6 + 5 + 4 tokens each
    lengths = [int(batch["attention_mask"].sum()) for batch in batches]
    monkeypatch.setattr(tuning, "RESCALE_TOKENS", sum(lengths) // 2)
    some = tuning._some_tokens(batches, 7)
    assert [any(batch is taken for taken in some) for batch in batches] == [True, False, True, False]
    monkeypatch.setattr(tuning, "RESCALE_TOKENS", 30)
    images = [{"pixel_values": torch.ones(4, 3, 8, 8)}] * 4
    assert len(tuning._some_tokens(images, 5)) == 2
    assert len(tuning._some_tokens(images[:1], 5)) == 1


def test_settings_are_checked_first():
    model = tiny.model("bert")
    groups, batches = find_units(model, "heads"), [labelled("bert")]
    with pytest.raises(SettingError, match="sparsity must lie in \\[0, 1\\), got 1"):
        search_and_tune(model, groups, 1, batches, sequence_length=7)
    with pytest.raises(SettingError, match="cost must be 'macs' or 'latency', got 'flops'"):
        search_and_tune(model, groups, 0.5, batches, cost="flops", sequence_length=7)
    with pytest.raises(SettingError, match="Use a sparsity of at most 0.7500"):
        search_and_tune(model, groups, 0.9, batches, sequence_length=7)
    with pytest.raises(SettingError, match="got 0 groups"):
        search_and_tune(model, [], 0.5, batches, sequence_length=7)
    channels = UnitGroup("stem.channels", "channels", groups[0].writes, groups[0].reads)
    with pytest.raises(SettingError, match="among them stem.channels"):
        search_and_tune(model, [channels], 0.5, batches, sequence_length=7)
    [group, *_] = find_units(model, "neurons")
    double = UnitGroup(group.name, "neurons", group.writes, group.reads * 2)
    with pytest.raises(UnsupportedModelError, match="24 neurons that 2 modules read"):
        search_and_tune(model, [double], 0.5, batches, sequence_length=7)
