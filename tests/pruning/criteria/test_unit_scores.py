"""Scores of units against slow loops over weights, tokens and samples, and what scoring leaves behind."""

import pytest
import torch

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.criteria.fisher import reader, unit_gradients
from hfshrink.pruning.criteria.unit_scores import ON_DATA, unit_scores
from hfshrink.pruning.units.groups import find_units, weight_axis


def labelled(family, seed=0):
    batch = tiny.inputs(family, seed=seed)
    if tiny.TASK[family] == "text-generation":
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch | {"labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_magnitude_is_the_norm_of_all_weights_that_write_and_read_a_unit(family):
    model = tiny.model(family)
    groups = find_units(model, "heads+neurons")
    scores = unit_scores(model, groups, "magnitude")
    for group in groups:
        for unit in range(group.units):
            total = 0.0
            for axis in (*group.writes, *group.reads):
                module = model.get_submodule(axis.module)
                for position in axis.positions[unit].tolist():
                    total += float(
                        module.weight.detach().select(weight_axis(module, axis.side), position).square().sum()
                    )
            assert float(scores[group.name][unit]) == pytest.approx(total**0.5, rel=1e-4)


def test_channels_count_the_absolute_weights_of_their_filters():
    model = tiny.model("resnet")
    groups = find_units(model, "channels")
    scores = unit_scores(model, groups, "magnitude")
    for group in groups:
        expected = torch.zeros(group.units)
        for axis in group.writes:
            weight = model.get_submodule(axis.module).weight
            if weight.ndim == 4:
                for unit, positions in enumerate(axis.positions.tolist()):
                    expected[unit] += sum(weight[position].abs().sum() for position in positions)
        assert torch.allclose(scores[group.name], expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_activation_is_the_mean_norm_over_the_tokens_that_are_no_padding(family):
    model, batches = tiny.model(family), [tiny.inputs(family), tiny.inputs(family, batch=2, seed=1)]
    groups = find_units(model, "heads+neurons")
    scores = unit_scores(model, groups, "activation", batches)
    for group in groups:
        module, axis = reader(model, group)
        norms = []
        for batch in batches:
            seen = []
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            tiny.logits(model, batch)
            handle.remove()
            rows = len(next(iter(batch.values())))
            states = seen[0].reshape(rows, -1, seen[0].shape[-1])
            mask = batch.get("attention_mask", torch.ones(states.shape[:2]))
            for row, token in mask.nonzero().tolist():
                norms.append(torch.stack([states[row, token, part].norm() for part in axis.positions]))
        assert torch.allclose(scores[group.name], torch.stack(norms).mean(dim=0), rtol=1e-3, atol=1e-5)


def test_taylor_is_compared_within_a_layer_and_fisher_between_layers():
    model, batches = tiny.model("bert"), [labelled("bert"), labelled("bert", seed=1)]
    groups = find_units(model, "heads+neurons")
    gradients = unit_gradients(model, groups, batches)
    taylor, fisher = (unit_scores(model, groups, method, batches) for method in ("taylor", "fisher"))
    for name, found in gradients.items():
        rows = found.double().tolist()
        means = [sum(abs(row[unit]) for row in rows) / len(rows) for unit in range(len(rows[0]))]
        length = sum(mean**2 for mean in means) ** 0.5
        squares = [sum(row[unit] ** 2 for row in rows) / len(rows) for unit in range(len(rows[0]))]
        assert taylor[name].tolist() == pytest.approx([mean / length for mean in means])
        assert fisher[name].tolist() == pytest.approx(squares)


def test_a_group_without_any_gradient_scores_zero():
    model = tiny.model("bert")
    groups = find_units(model, "neurons", "*.1.*")
    torch.nn.init.zeros_(model.classifier.weight)
    [scores] = unit_scores(model, groups, "taylor", [labelled("bert")]).values()
    assert scores.tolist() == [0.0] * 24


def test_random_scores_go_by_the_seed():
    model = tiny.model("bert")
    groups = find_units(model, "heads")
    one, same, other = (unit_scores(model, groups, "random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    first, second = one.values()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ON_DATA)
def test_a_training_model_stays_as_it_is(method):
    """In train mode, with checkpointed layers, a frozen weight and gradients of its own, and inside `no_grad`."""
    model = tiny.model("llama").train()
    model.activation_checkpointing_enable()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(16)
    groups = find_units(model, "heads+neurons")
    with torch.no_grad():
        scores = unit_scores(model, groups, method, [labelled("llama")])
    again = unit_scores(tiny.model("llama"), groups, method, [labelled("llama")])
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert model.training
    assert not model.model.layers[0].training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


@pytest.mark.parametrize("method", ON_DATA)
def test_broken_data_raise_and_leave_no_hook(method):
    model = tiny.model("vit").train()
    batch = labelled("vit")
    batch["pixel_values"][1, 0, 0, 0] = float("nan")
    with pytest.raises(SettingError, match="NaN or infinite"):
        unit_scores(model, find_units(model, "heads+neurons"), method, [batch])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("method", ON_DATA)
def test_scores_on_data_need_data_and_one_linear_that_reads(method):
    model = tiny.model("bert")
    with pytest.raises(SettingError, match="no batch"):
        unit_scores(model, find_units(model, "heads"), method)
    model = tiny.model("resnet")
    with pytest.raises(UnsupportedModelError, match="channels"):
        unit_scores(model, find_units(model, "channels"), method, [labelled("resnet")])
