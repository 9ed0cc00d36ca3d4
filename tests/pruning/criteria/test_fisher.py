"""Gradients of unit masks: one per sample, equal to a loop over samples and to finite differences."""

import pytest
import torch

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.criteria.fisher import diagonal_fisher, reader, unit_gradients, unit_numbers
from hfshrink.pruning.units.groups import UnitAxis, UnitGroup, find_units, weight_axis

FAMILIES = ("bert", "roberta", "electra", "distilbert", "llama", "gpt2", "vit")


def labelled(family, **options):
    batch = tiny.inputs(family, **options)
    if tiny.TASK[family] == "text-generation":
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch | {"labels": torch.tensor([0, 1, 1])}


def row(batch, index):
    return {name: value[index : index + 1] for name, value in batch.items()}


def terms(family, batch):
    return int((batch["labels"][:, 1:] != -100).sum()) if tiny.TASK[family] == "text-generation" else 1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_has_the_gradient_that_it_has_alone(family):
    """∂ℒ/∂m = Σ w · ∂ℒ/∂w over the reading weights of the unit, one backward pass per sample."""
    model, batch = tiny.model(family), labelled(family)
    groups = find_units(model, "heads+neurons")
    found = unit_gradients(model, groups, [batch])
    for index in range(3):
        alone = row(batch, index)
        model.zero_grad()
        (model(**alone).loss * terms(family, alone)).backward()
        for group in groups:
            module, axis = reader(model, group)
            product = module.weight * module.weight.grad
            per_feature = product.sum(dim=1 - weight_axis(module, "in"))
            expected = per_feature[axis.positions].sum(dim=1)
            assert torch.allclose(found[group.name][index], expected, rtol=1e-3, atol=1e-5), group.name


def test_gradients_equal_finite_differences():
    model, batch = tiny.model("bert").double(), labelled("bert")
    groups = find_units(model, "heads+neurons")
    found = unit_gradients(model, groups, [batch])
    for group in groups[::3]:
        module, axis = reader(model, group)
        weight, losses = module.weight.data.clone(), []
        for step in (1e-4, -1e-4):
            module.weight.data = weight.clone()
            module.weight.data[:, axis.positions[1]] *= 1 + step
            with torch.no_grad():
                losses.append(float(model(**batch).loss) * 3)
        module.weight.data = weight
        slope = (losses[0] - losses[1]) / 2e-4
        assert float(found[group.name][:, 1].sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_tokens_of_a_tagger_add_up():
    model, batch = tiny.model("distilbert", "token-classification"), tiny.inputs("distilbert")
    batch["labels"] = torch.arange(21).view(3, 7).remainder(2).masked_fill(batch["attention_mask"] == 0, -100)
    groups = find_units(model, "neurons")
    together = unit_gradients(model, groups, [batch])
    apart = unit_gradients(model, groups, [row(batch, index) for index in range(3)])
    assert all(torch.allclose(together[name], apart[name], atol=1e-5) for name in together)


def test_the_model_is_left_as_it_was():
    model, batch = tiny.model("bert").train(), labelled("bert")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        first = unit_gradients(model, find_units(model, "heads"), [batch])
    second = unit_gradients(model, find_units(model, "heads"), [batch])
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_follow_each_other():
    model, batch = tiny.model("vit"), labelled("vit")
    groups = find_units(model, "neurons")
    once = unit_gradients(model, groups, [batch])
    twice = unit_gradients(model, groups, (b for b in (batch, row(batch, 2))))
    for name, gradients in once.items():
        assert twice[name].shape == (4, 24)
        assert torch.allclose(twice[name][[0, 1, 2, 3]], gradients[[0, 1, 2, 2]], rtol=1e-3, atol=1e-6)


def test_fisher_by_hand():
    assert diagonal_fisher(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).tolist() == [5.0, 2.0]


def test_features_know_their_unit():
    axis = UnitAxis("o", "in", torch.tensor([[0, 2], [1, 3]]))
    assert unit_numbers(axis).tolist() == [0, 1, 0, 1]


def test_what_is_missing_is_said():
    model = tiny.model("bert")
    groups = find_units(model, "heads")
    with pytest.raises(SettingError, match="Calibration needs labels for this method: BertFor.*input_ids"):
        unit_gradients(model, groups, [tiny.inputs("bert")])
    with pytest.raises(SettingError, match="no batch"):
        unit_gradients(model, groups, [])
    model.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(SettingError, match="layer.0.heads are NaN or infinite"):
        unit_gradients(model, groups, [labelled("bert")])


def test_units_with_several_readers_are_refused():
    model = tiny.model("bert")
    [group, *_] = find_units(model, "neurons")
    double = UnitGroup(group.name, "neurons", group.writes, group.reads * 2)
    with pytest.raises(UnsupportedModelError, match="24 neurons that 2 modules read"):
        reader(model, double)
