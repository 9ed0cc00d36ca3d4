"""Trials of factoring: the best product of a rank against a slow loop, and that nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from hfshrink.calibration import ModuleStatistics, collect
from hfshrink.errors import SettingError
from hfshrink.factorization import tails
from hfshrink.factorization.perturbations import perturbation
from hfshrink.sensitivity import measure_sensitivity

FAMILIES = ["bert", "gpt2", "llama", "vit", "resnet"]


def batch_of(family):
    batch = tiny.inputs(family)
    return batch if tiny.TASK[family] == "text-generation" else {**batch, "labels": torch.tensor([0, 1, 1])}


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def as_matrix(model, place, weight):
    return weight.T if "gpt2" in type(model).__name__.lower() else weight.flatten(1)


def statistics_of(model, family):
    """Squared gradients and input Gram matrices of all modules but convolutions, on one batch."""
    batch = batch_of(family)
    with collect(model, "input_gram") as grams, torch.no_grad():
        model(**batch)
    with collect(model, "squared_gradient") as gradients:
        model(**batch, **({} if "labels" in batch else {"labels": batch["input_ids"]})).loss.backward()
    model.zero_grad()
    return {
        name: ModuleStatistics(input_gram=found.input_gram, squared_gradient=gradients[name].squared_gradient)
        for name, found in grams.items()
        if name in gradients
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_changes_the_loss_and_comes_back(family):
    model = tiny.model(family)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = measure_sensitivity(model, [batch_of(family)], perturbation(), levels=(1.0, 0.5))
    assert all(found.rise(place, 1.0) == 0 for place in found.places)
    assert sum(found.rise(place, 0.5) != 0 for place in found.places) >= len(found.places) - 1
    assert same(model, state)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_is_the_best_product_of_its_rank(family):
    model, trial = tiny.model(family), perturbation()
    for place in trial.places(model):
        weight = model.get_submodule(place).weight
        dense = as_matrix(model, place, weight.detach().clone())
        out, features = dense.shape
        for level in (0.3, 0.7):
            rank = max(1, int(level * out * features / (out + features)))
            left, values, right = torch.linalg.svd(dense.double(), full_matrices=False)
            expected = sum(values[k] * torch.outer(left[:, k], right[k]) for k in range(rank))
            with trial.apply(model, place, level):
                product = as_matrix(model, place, weight.detach()).double()
            assert torch.allclose(product, expected, atol=1e-6)
            assert torch.equal(as_matrix(model, place, weight.detach()), dense)


@pytest.mark.parametrize("weighting", ["fisher", "activation", "fisher+activation"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_weighting_makes_its_own_error_smaller(family, weighting):
    model = tiny.model(family)
    statistics = statistics_of(model, family)
    plain, weighted = perturbation(), perturbation(weighting, statistics=statistics)
    places = weighted.places(model)
    assert set(places) <= set(statistics)
    smaller = 0
    for place in places:
        weight = model.get_submodule(place).weight
        dense = as_matrix(model, place, weight.detach().clone()).double()
        squares = as_matrix(model, place, statistics[place].squared_gradient).double()
        rows = squares.sum(1) if "fisher" in weighting else torch.ones(len(dense))
        gram = statistics[place].input_gram if "activation" in weighting else torch.eye(dense.shape[1])
        errors = []
        for trial in (weighted, plain):
            with trial.apply(model, place, 0.4):
                lost = dense - as_matrix(model, place, weight.detach()).double()
            errors.append(
                float(sum(row * vector @ gram.double() @ vector for row, vector in zip(rows, lost, strict=True)))
            )
        assert errors[0] <= errors[1] * (1 + 1e-6)
        smaller += errors[0] < 0.95 * errors[1]
    assert smaller > len(places) / 2


def test_a_spectrum_is_computed_once_for_all_levels(monkeypatch):
    calls = []
    decompose = tails.decompose
    monkeypatch.setattr(tails, "decompose", lambda *args, **kwargs: calls.append(args) or decompose(*args, **kwargs))
    model, trial = tiny.model("bert"), perturbation()
    first, second = trial.places(model)[:2]
    for place in (first, second, first):
        for level in (0.9, 0.5, 0.3, 1.0):
            with trial.apply(model, place, level):
                pass
    assert len(calls) == 3
    model.get_submodule(first).weight.data.mul_(2)
    for half in (False, True):
        model = model.half() if half else model
        weight = model.get_submodule(first).weight
        dense = weight.detach().clone()
        with trial.apply(model, first, 0.5):
            assert 0 < float((weight - dense).norm()) < float(dense.norm())
        assert torch.equal(weight, dense)
    assert len(calls) == 5


def test_restored_after_an_exception():
    model, trial = tiny.model("bert"), perturbation()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), trial.apply(model, trial.places(model)[0], 0.3):
        raise ZeroDivisionError
    assert same(model, state)


def test_tied_and_small_modules_are_no_places():
    assert not {"lm_head", "transformer.wte"} & set(perturbation().places(tiny.model("gpt2")))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 8, 3))
    assert perturbation().places(model) == ["0", "3"]
    with pytest.raises(
        SettingError, match=r"None of 1 modules can be factored with weighting='none': each is too small"
    ):
        perturbation().places(nn.Sequential(nn.Linear(8, 1)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weighting": "whitened"}, "weighting must be one of none, fisher, activation, fisher.activation, got 'whit"),
        (
            {"weighting": "activation"},
            "weighting='activation' needs statistics with input_gram of each module, got None",
        ),
        ({"weighting": "fisher+activation"}, "needs statistics with squared_gradient and input_gram"),
        ({"levels": ()}, r"levels must be a list of rank ratios in \(0, 1\], got \(\)"),
        ({"levels": 0.5}, r"levels must be a list of rank ratios in \(0, 1\], got 0.5"),
        ({"levels": (0.5, 0)}, r"A level must be a rank ratio \(kept / dense parameters\) in \(0, 1\], got 0"),
        ({"levels": (1.1,)}, "in .0, 1., got 1.1"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(SettingError, match=match):
        perturbation(**settings)


def test_other_bad_input():
    model, trial = tiny.model("bert"), perturbation()
    place = trial.places(model)[0]
    with pytest.raises(SettingError, match="A level must be a rank ratio"), trial.apply(model, place, 2):
        pass
    weighted = perturbation("activation", statistics={"elsewhere": ModuleStatistics(input_gram=torch.eye(16))})
    with pytest.raises(SettingError, match="has no statistics; there are some for elsewhere"):
        weighted.places(model)
    wrong = perturbation("activation", statistics={place: ModuleStatistics(input_gram=torch.eye(3))})
    with pytest.raises(SettingError, match=place.replace(".", r"\.")), wrong.apply(model, place, 0.5):
        pass
