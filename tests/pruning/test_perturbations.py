"""Trials of pruning: what they hide, against slow loops, and that nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from hfshrink.errors import SettingError
from hfshrink.pruning.perturbations import perturbation
from hfshrink.pruning.units.groups import find_units, used_units
from hfshrink.pruning.units.weights import matrix
from hfshrink.sensitivity import measure_sensitivity

CASES = [
    ("bert", "unstructured", 0.5),
    ("gpt2", "2:4", 0.5),
    ("resnet", "unstructured", 0.7),
    ("llama", "heads", 0.5),
    ("distilbert", "neurons", 0.5),
    ("resnet", "channels", 0.5),
    ("vit", "layers", 1.0),
]


def batch_of(family: str) -> dict[str, torch.Tensor]:
    batch = tiny.inputs(family)
    return batch if tiny.TASK[family] == "text-generation" else {**batch, "labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize(("family", "structure", "level"), CASES)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_every_place_changes_the_loss_and_comes_back(family, structure, level, method):
    model = tiny.model(family)
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    trial = perturbation(structure, method)
    found = measure_sensitivity(model, [batch_of(family)], trial, levels=(0, level))
    assert all(found.rise(place, 0) == 0 for place in found.places)
    assert all(found.rise(place, level) != 0 for place in found.places)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("structure", ["unstructured", "heads", "layers"])
def test_restored_after_an_exception(structure):
    model = tiny.model("bert")
    state, trial = copy.deepcopy(model.state_dict()), perturbation(structure)
    place = trial.places(model)[0]
    with pytest.raises(ZeroDivisionError), trial.apply(model, place, trial.levels[-1]):
        raise ZeroDivisionError
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_smallest_weights_of_one_module_go():
    model, trial = tiny.model("bert"), perturbation()
    place = trial.places(model)[3]
    dense = model.get_submodule(place).weight.detach().clone()
    with trial.apply(model, place, 0.3):
        weight = model.get_submodule(place).weight.detach().clone()
    limit = dense.abs().flatten().sort().values[round(0.3 * dense.numel())]
    expected = torch.tensor([[value if abs(value) >= limit else 0.0 for value in row] for row in dense.tolist()])
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_a_pattern_leaves_n_of_m_inputs(family):
    model, trial = tiny.model(family), perturbation("1:4")
    assert trial.levels == (0.75,)
    for place in trial.places(model):
        module = model.get_submodule(place)
        with trial.apply(model, place, 0.75):
            weight = matrix(module, module.weight.detach()).clone()
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(1).all()


def test_units_that_little_reads_go_first():
    model, trial = tiny.model("bert"), perturbation("neurons")
    [group, _] = find_units(model, "neurons")
    assert trial.places(model)[0] == group.name
    norms = [float(column.norm()) for column in model.get_submodule(group.reads[0].module).weight.detach().T]
    with trial.apply(model, group.name, 0.25):
        used = used_units(model, group)
    smallest = sorted(range(24), key=lambda unit: norms[unit])[:6]
    assert sorted(smallest) == (~used).nonzero().flatten().tolist()


def test_a_layer_is_skipped():
    model, batch = tiny.model("bert"), tiny.inputs("bert")
    shorter = copy.deepcopy(model)
    shorter.bert.encoder.layer = nn.ModuleList([shorter.bert.encoder.layer[1]])
    with perturbation("layers").apply(model, "bert.encoder.layer.0", 1.0):
        assert torch.equal(tiny.logits(model, batch), tiny.logits(shorter, batch))


def test_the_seed_decides():
    model, hidden = tiny.model("bert"), []
    for seed in (1, 1, 2):
        trial = perturbation(method="random", seed=seed)
        place = trial.places(model)[0]
        with trial.apply(model, place, 0.5):
            hidden.append(model.get_submodule(place).weight == 0)
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


def test_errors():
    for keywords, match in (
        ({"method": "movement"}, "method must be one of magnitude, random for a perturbation, got 'movement'"),
        ({"structure": "rows"}, "structure must be one of unstructured, heads.* N:M such as 2:4, got 'rows'"),
        ({"levels": (0.5, 1.0)}, r"A level must be a number in \[0, 1\), got 1.0"),
        ({"levels": 0.5}, r"levels must be a list of shares in \[0, 1\), got 0.5"),
        ({"structure": "2:4", "levels": (0.3,)}, r"2:4 has the level 0.5 only \(0 changes nothing\), got 0.3"),
        ({"structure": "layers", "levels": (0.5,)}, "layers has the level 1 only"),
    ):
        with pytest.raises(SettingError, match=match):
            perturbation(**keywords)
    with pytest.raises(SettingError, match="2:7 needs a number of inputs that 7 divides"):
        perturbation("2:7").places(tiny.model("bert"))
