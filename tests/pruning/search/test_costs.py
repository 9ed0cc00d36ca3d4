"""Costs: counted as torch's own counter does, and times that never fall."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from hfshrink.errors import SettingError
from hfshrink.pruning.search.costs import (
    BlockShape,
    block_calls,
    block_shape,
    kept_cost,
    mac_costs,
    measure_block_latencies,
    monotone,
    unit_macs,
)
from hfshrink.pruning.units.groups import find_units


def test_macs_by_hand():
    """BERT-base at 128 tokens: 3·S·d·h + 2·S²·h + S·h·d per head, 2·S·d per neuron."""
    head = BlockShape("heads", 12, ((768, 64),) * 3, (64, 768))
    neuron = BlockShape("neurons", 3072, ((768, 1),), (1, 768))
    assert unit_macs(head, 128) == 4 * 128 * 768 * 64 + 2 * 128**2 * 64
    assert unit_macs(neuron, 128) == 2 * 128 * 768


@pytest.mark.parametrize(("family", "stack"), [("bert", "bert.encoder"), ("llama", "model"), ("gpt2", "transformer")])
def test_dense_macs_are_what_torch_counts(family, stack):
    model = tiny.model(family, attn_implementation="eager")
    costs = mac_costs(model, find_units(model, "heads+neurons"), sequence_length=7)
    batch = {name: value[:1] for name, value in tiny.inputs(family).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    counts = counter.get_flop_counts()
    counted = sum(counts[f"{type(model).__name__}.{stack}"].values()) // 2
    assert kept_cost(costs) == counted


def test_cost_grows_with_units():
    model = tiny.model("llama")
    groups = find_units(model, "heads+neurons")
    for group in groups:
        table = mac_costs(model, groups, 5)[group.name]
        assert table.shape == (group.units + 1,)
        assert torch.equal(table.diff(), table[1].expand(group.units))
    costs = {"a": torch.tensor([0.0, 2.0, 5.0]), "b": torch.tensor([0.0, 1.0])}
    assert kept_cost(costs) == 6
    assert kept_cost(costs, {"a": torch.tensor([False, True]), "b": torch.tensor([True])}) == 3


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "distilbert"])
def test_measured_tables_fit_every_family(family):
    model = tiny.model(family)
    groups, threads = find_units(model, "heads+neurons"), torch.get_num_threads()
    tables = measure_block_latencies(model, groups, 7, levels=4, repeats=2)
    assert torch.get_num_threads() == threads
    for group in groups:
        table = tables[group.name]
        assert table.shape == (group.units + 1,)
        assert table[0] == 0
        assert (table.diff() >= 0).all()
        assert table[-1] > 0
    assert torch.equal(tables[groups[0].name], tables[groups[2].name])  # one shape, timed once


def test_a_large_block_costs_more_than_a_small_one():
    shape = BlockShape("neurons", 512, ((256, 1),), (1, 256))
    assert unit_macs(shape, 1) == 512
    model = tiny.model("bert", hidden_size=256, intermediate_size=2048, num_hidden_layers=1)
    [group] = find_units(model, "neurons")
    table = measure_block_latencies(model, [group], 32, levels=3, repeats=3)[group.name]
    assert table[-1] > 2 * table[1]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_timed_block_has_the_outputs_of_the_real_one(family):
    model = tiny.model(family)
    for group in find_units(model, "heads+neurons")[:2]:
        shape = block_shape(model, group)
        for call in block_calls(shape, [1, group.units], (2, 5), torch.tanh):
            assert call().shape == (2, 5, 16)
            assert torch.isfinite(call()).all()


def test_monotone_keeps_what_rises_and_levels_what_falls():
    rising = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert torch.equal(monotone(rising), rising)
    noisy = monotone(torch.tensor([2.0, 1.0, 4.0, 3.0, 6.0]))
    assert noisy.tolist() == [1.5, 1.5, 3.5, 3.5, 6.0]


def test_numbers_out_of_range_are_refused():
    model = tiny.model("bert")
    groups = find_units(model, "heads")
    with pytest.raises(SettingError, match="sequence_length must be at least 1 token, got 0"):
        mac_costs(model, groups, 0)
    with pytest.raises(SettingError, match="levels must be at least 2, got 1"):
        measure_block_latencies(model, groups, 4, levels=1)
