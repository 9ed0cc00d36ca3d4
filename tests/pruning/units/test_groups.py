"""Units: masking is exact where nothing else reads them."""

import pytest
import torch

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.units.groups import find_units, mask_units, unit_slices, used_units

FAMILIES = ("bert", "roberta", "electra", "distilbert", "llama", "gpt2", "vit")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["heads", "neurons"])
def test_what_writes_a_masked_unit_does_not_matter(family, structure):
    """The oracle of the whole table: noise in the writes of masked units leaves the logits as they are."""
    model, batch = tiny.model(family), tiny.inputs(family)
    for group in find_units(model, structure):
        kept = torch.arange(group.units) != 1
        mask_units(model, group, kept)
        assert torch.equal(used_units(model, group), kept)
    masked = tiny.logits(model, batch)
    for group in find_units(model, structure):
        for axis in group.writes:
            module = model.get_submodule(axis.module)
            dim = 1 if type(module).__name__ == "Conv1D" else 0
            noise = torch.randn_like(module.weight.index_select(dim, axis.positions[1]))
            module.weight.data.index_copy_(dim, axis.positions[1], noise)
    assert torch.allclose(tiny.logits(model, batch), masked, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_cover_each_axis_once(family):
    model = tiny.model(family)
    for group in find_units(model, "heads+neurons"):
        for axis in (*group.writes, *group.reads):
            flat = axis.positions.flatten().sort().values
            assert torch.equal(flat, torch.arange(len(flat))), axis.module


def test_query_heads_of_one_key_are_one_unit():
    heads = find_units(tiny.model("llama"), "heads")[0]
    assert heads.units == 2  # of four query heads
    assert [axis.positions.shape[1] for axis in heads.writes] == [8, 4, 4]


def test_heads_of_a_fused_weight_lie_in_three_parts():
    heads = find_units(tiny.model("gpt2"), "heads")[0]
    assert heads.writes[0].positions[1].tolist() == [*range(4, 8), *range(20, 24), *range(36, 40)]


def test_slices_hold_the_weights_of_each_unit():
    model = tiny.model("bert")
    neurons = find_units(model, "neurons")[0]
    [ups] = unit_slices(model, neurons.writes)
    [downs] = unit_slices(model, neurons.reads)
    layer = model.bert.encoder.layer[0]
    assert torch.equal(ups, layer.intermediate.dense.weight)
    assert torch.equal(downs, layer.output.dense.weight.T)


def test_wildcards_choose_groups():
    model = tiny.model("bert")
    assert [g.name for g in find_units(model, "heads", exclude="*.0.*")] == ["bert.encoder.layer.1.heads"]
    with pytest.raises(SettingError, match="matches none of 2 groups"):
        find_units(model, "heads", include="*.7.*")


def test_other_structures_and_families_are_refused():
    with pytest.raises(SettingError, match="must be one of heads, neurons"):
        find_units(tiny.model("bert"), "weights")
    with pytest.raises(UnsupportedModelError, match="'resnet'.*channels"):
        find_units(tiny.model("resnet"), "heads")


def test_wildcards_that_leave_no_group_are_named():
    with pytest.raises(SettingError, match=r"exclude=\['\*'\] leave none of 2 groups"):
        find_units(tiny.model("bert"), "heads", exclude="*")
