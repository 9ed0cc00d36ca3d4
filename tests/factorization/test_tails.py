"""The table of exact errors against the errors of real factors, and tails that can be added up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tiny
from hfshrink.calibration import collect
from hfshrink.errors import SettingError
from hfshrink.factorization.allocation import Size, budget_ranks
from hfshrink.factorization.perturbations import perturbation
from hfshrink.factorization.tails import comparable_tails, factor_errors, measured_weights
from hfshrink.sensitivity import Sensitivity, SensitivityRow, measure_sensitivity


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_errors_are_those_of_real_factors(family):
    model, trial = tiny.model(family), perturbation()
    found = factor_errors(model, levels=(1.0, 0.6, 0.2), exclude=())
    assert found.places == trial.places(model)
    for place in found.places:
        weight = model.get_submodule(place).weight
        dense = weight.detach().clone().double()
        for level in (0.6, 0.2):
            with trial.apply(model, place, level):
                lost = dense - weight.detach().double()
            share = sum(float(x) ** 2 for x in lost.flatten()) / sum(float(x) ** 2 for x in dense.flatten())
            assert found.rise(place, level) == pytest.approx(share, abs=1e-6)
        assert found.rise(place, 1.0) == 0
        assert found.rise(place, 0.6) <= found.rise(place, 0.2) < 1


def test_errors_of_outputs_by_activations():
    model = tiny.model("bert")
    seen = {}
    with collect(model, "input_gram") as statistics, torch.no_grad():
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        model(input_ids=tiny.inputs("bert")["input_ids"])
    found = factor_errors(model, (0.5,), weighting="activation", statistics=statistics)
    assert "classifier" not in found.places  # the task head
    trial = perturbation("activation", statistics=statistics)
    for handle in handles:
        handle.remove()
    for place in found.places:
        module = model.get_submodule(place)
        inputs = seen[place].flatten(0, -2).double()
        before = inputs @ module.weight.detach().double().T
        with trial.apply(model, place, 0.5):
            after = inputs @ module.weight.detach().double().T
        assert found.rise(place, 0.5) == pytest.approx(
            float((before - after).square().sum() / before.square().sum()), abs=1e-5
        )


def test_the_table_the_order_and_the_plot(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    model[1].weight.data = torch.zeros(4, 4)
    found = factor_errors(model, (0.5,))
    assert str(found).splitlines() == [
        "share of squared norm lost, factorize, weighting none",
        "| place | 0.5    |",
        "|-------|--------|",
        "| 0     | 0.3333 |",
        "| 1     | 0.0000 |",
    ]
    assert found.best_first() == ["1", "0"]
    assert found.to_dict()["measure"] == "error"
    assert factor_errors(model, (0.5,), include="0").places == ["0"]
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "errors.svg")
    assert (tmp_path / "errors.svg").read_bytes().startswith(b"<?xml")


def test_a_folder_is_loaded(tmp_path):
    model = tiny.model("bert")
    model.save_pretrained(tmp_path)
    assert factor_errors(str(tmp_path), (0.5,)) == factor_errors(model, (0.5,))


def test_relative_tails_ignore_the_scale_of_a_module():
    tails = {"a": torch.tensor([8.0, 2.0, 0.0]), "b": 100 * torch.tensor([8.0, 2.0, 0.0]), "zero": torch.zeros(3)}
    for weighting in ("none", "activation"):
        found = comparable_tails(tails, weighting)
        assert found["a"].tolist() == found["b"].tolist() == [1.0, 0.25, 0.0]
        assert found["zero"].tolist() == [0.0, 0.0, 0.0]
        assert found["a"].dtype == torch.float64


def test_fisher_tails_approximate_the_loss_rise():
    """Where F_ij = g_i x_j exactly, the tail over tr(G) is Σ F_ij e_ij² for errors that are alike in all columns."""
    torch.manual_seed(0)
    outputs, inputs = torch.rand(3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    fisher = outputs[:, None] * inputs[None]
    error = torch.randn(3, 5, dtype=torch.float64)
    row_weight, gram = fisher.sum(1).sqrt(), torch.diag(inputs)
    weighted = row_weight[:, None] * error * gram.sqrt().sum(0)
    tail = torch.stack([weighted.square().sum(), torch.tensor(0.0)])
    found = comparable_tails({"a": tail}, "fisher+activation", {"a": float(gram.trace())})["a"]
    assert float(found[0]) == pytest.approx(float((fisher * error.square()).sum()))
    even = torch.ones(5, dtype=torch.float64)
    tail = (outputs * 5).sum() * torch.tensor([5.0, 0.0])  # errors of 1, all inputs alike: G = I
    found = comparable_tails({"a": tail}, "fisher", {"a": 5})["a"]
    assert float(found[0]) == pytest.approx(float((outputs[:, None] * even[None]).sum()))


def test_gradients_put_unweighted_tails_in_units_of_the_loss():
    """Where F_ij = g x_j with the same g for all rows, mean(w²) · tail / tr(G) is Σ F_ij e_ij² of those errors."""
    torch.manual_seed(0)
    inputs, error = torch.rand(5, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64).expand(3, 5)
    fisher = 0.7 * inputs.expand(3, 5)
    tail = torch.stack([(error.square() * inputs).sum(), torch.tensor(0.0)])
    energies = {"a": float(inputs.sum())}, {"a": float(fisher.sum()) / 3}
    found = comparable_tails({"a": tail}, "activation", *energies)["a"]
    assert float(found[0]) == pytest.approx(float((fisher * error.square()).sum()))
    weighted = comparable_tails({"a": energies[1]["a"] * tail}, "fisher+activation", energies[0])["a"]
    torch.testing.assert_close(found, weighted)
    unused = comparable_tails({"a": tail}, "none", {"a": 5}, {"a": 0.0})["a"]  # no gradient ever reached it
    assert unused.tolist() == [0.0, 0.0]


def test_bad_scales():
    tails = {"a": torch.tensor([8.0, 2.0, 0.0])}
    for weighting, energies, match in (
        ("fisher", (None,), "input_energy of a must be above 0 for 'fisher', got nan"),
        ("fisher", ({"a": 0.0},), "input_energy of a must be above 0"),
        ("activation", (None, {"a": 1.0}), "input_energy of a must be above 0 for 'activation', got nan"),
        ("activation", ({"a": 1.0}, {"b": 1.0}), "row_energy of a must be at least 0, got nan"),
        ("whitened", (None,), "weighting must be one of"),
    ):
        with pytest.raises(SettingError, match=match):
            comparable_tails(tails, weighting, *energies)


def rows_of(rises):
    return Sensitivity("t", 1.0, 4, tuple(SensitivityRow(*key, None, rise) for key, rise in rises.items()))


def test_measured_weights_by_hand():
    sizes = dict.fromkeys("abc", Size(10, 2, 4))  # break-even 5: ratio 0.4 is rank 2, 0.2 rank 1
    tails = dict.fromkeys("abc", torch.tensor([9.0, 4.0, 2.0, 1.0, 0.0]))
    rises = {("a", 0.4): 0.2, ("a", 0.2): 0.4, ("b", 0.4): None, ("b", 0.2): 8.0, ("c", 0.4): -0.1, ("c", 0.2): 0.0}
    found = measured_weights(rows_of(rises), tails, sizes)
    assert found == pytest.approx({"a": 0.1, "b": 2.0, "c": 0.01 * 1.05})
    dear = budget_ranks(tails, sizes, 12, 1, found)
    assert dear["b"] == max(dear.values())


def test_measured_weights_of_a_model_predict_its_rises():
    model = tiny.model("bert")
    batch = {**tiny.inputs("bert", batch=8), "labels": torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])}
    trial = perturbation()
    found = measure_sensitivity(model, [batch], trial, measure="divergence", levels=(0.5,))
    tails, sizes = {}, {}
    for name in found.places:
        squares = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()).square()
        tails[name] = torch.cat([squares, squares.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        sizes[name] = Size.of_matrix(*model.get_submodule(name).weight.shape)
    weights = measured_weights(found, tails, sizes)
    for name in found.places:
        rank = int(0.5 * sizes[name].break_even)
        assert weights[name] * float(tails[name][rank]) >= found.rise(name, 0.5) * 0.999 - 1e-12


def test_measured_weights_need_measurements():
    sizes, tails = {"a": Size(10, 2, 4)}, {"a": torch.tensor([9.0, 4.0, 2.0, 1.0, 0.0])}
    for rises, match in (
        ({("b", 0.4): 0.1}, "a was not measured, and 0 more; measured: b"),
        ({("a", 0.4): None}, "No loss rise of a is a number"),
        ({("a", 0.4): -0.1}, "No measured loss rises above the dense one: it is all noise"),
    ):
        with pytest.raises(SettingError, match=match):
            measured_weights(rows_of(rises), tails, sizes)


def test_bad_input():
    model = tiny.model("bert")
    for keywords, match in (
        ({"levels": (0.0,)}, "A level must be a rank ratio"),
        ({"weighting": "activation"}, "needs statistics with input_gram"),
        ({"include": "*.nothing"}, "matches none"),
    ):
        with pytest.raises(SettingError, match=match):
            factor_errors(model, **keywords)
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = math.nan
    with pytest.raises(SettingError, match=r"layer.0.output.dense.*NaN"):
        factor_errors(model)
