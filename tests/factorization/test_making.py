"""Ranks by energy and by budget, updated inputs, forms of convolutions, embeddings, and what stays dense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from factored import FAMILIES, batches, gram_matrices, is_unchanged, labelled, parameters, state, with_products
from hfshrink import load, report
from hfshrink.checkpoint import compressed_layers
from hfshrink.errors import SettingError
from hfshrink.factorization.run import factorize
from hfshrink.factorization.sites import matrix
from hfshrink.layers import SeparableConv2d, TuckerConv2d


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_later_layers_are_fitted_to_what_the_factored_ones_make(family):
    dense, data = tiny.model(family), batches(family)
    model, plain = (
        factorize(copy.deepcopy(dense), 0.5, rank_multiple=1, calibration=data, update_inputs=update)
        for update in (True, False)
    )
    ranks = report(model).steps[-1].results["ranks"]
    slow = copy.deepcopy(dense)
    second = [name for name in ranks if ".1." in name]
    slow = with_products(slow, {n: r for n, r in ranks.items() if ".0." in n}, gram_matrices(dense, ranks, data))
    slow = with_products(slow, {name: ranks[name] for name in second}, gram_matrices(slow, second, data))
    for name in [name for name in ranks if ".0." in name or ".1." in name]:
        ours, theirs = (m.get_submodule(name) for m in (model, slow))
        torch.testing.assert_close(ours.to_dense().weight, theirs.weight, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(model.get_submodule(n).up, plain.get_submodule(n).up) for n in second)
    assert all(torch.equal(model.get_submodule(n).up, plain.get_submodule(n).up) for n in ranks if ".0." in n)


def test_heads_tied_weights_and_thin_modules_are_listed():
    step = report(factorize(tiny.model("gpt2"), 0.5, rank_multiple=1)).steps[-1]
    assert step.skipped["lm_head"].startswith("its weight is tied")
    model = tiny.model("bert")
    model.bert.pooler.dense = nn.Linear(16, 1)
    skipped = report(factorize(model, 0.5, rank_multiple=1)).steps[-1].skipped
    assert skipped["bert.pooler.dense"] == "no rank saves parameters: break-even rank is 0.941"
    assert skipped["classifier"] == "the task head"
    model = factorize(tiny.model("bert"), 0.5, rank_multiple=1, calibration=batches("bert", 2))
    assert report(model).steps[-1].skipped["bert.pooler.dense"] == "it saw 6 tokens, fewer than its 16 input features"


def test_ranks_by_energy_are_the_smallest_that_keep_it():
    model = factorize(tiny.model("llama"), energy=0.9, rank_multiple=1)
    dense, step = tiny.model("llama"), report(model).steps[-1]
    for name, rank in step.results["ranks"].items():
        squares = torch.linalg.svdvals(matrix(dense.get_submodule(name)).double()).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[rank - 1] >= 0.9 - 1e-9, name
        assert rank == 1 or kept[rank - 2] < 0.9, name
    assert all("at or above the break-even" in r for n, r in step.skipped.items() if "layers" in n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("update", [False, True])
def test_budgets_count_the_whole_model(family, update):
    model, data = tiny.model(family), batches(family)
    budget = int(0.8 * parameters(model))
    factorize(model, max_parameters=budget, rank_multiple=1, calibration=data, update_inputs=update)
    assert 0.97 * budget < parameters(model) <= budget
    tiny.logits(model, tiny.inputs(family))


@pytest.mark.parametrize(("form", "kind"), [("separable", SeparableConv2d), ("tucker", TuckerConv2d)])
def test_other_forms_of_convolutions(form, kind, tmp_path):
    dense = tiny.model("resnet")
    model = factorize(copy.deepcopy(dense), 0.5, form=form, rank_multiple=1)
    step = report(model).steps[-1]
    layers = compressed_layers(model)
    assert layers
    for name, layer in layers.items():
        assert type(layer) is kind
        weight, made = (m.weight.detach() for m in (dense.get_submodule(name), layer.to_dense()))
        error = float((weight - made).norm() ** 2 / weight.norm() ** 2)
        assert step.results["relative_errors"][name] == pytest.approx(error, rel=1e-3)
        assert step.results["kept_ratios"][name] <= 0.5
    assert "1×1" in " ".join(step.skipped.values())
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    batch = tiny.inputs("resnet")
    torch.testing.assert_close(tiny.logits(again, batch), tiny.logits(model, batch))


def test_embeddings_are_factored_where_they_are_named(tmp_path):
    model = factorize(
        tiny.model("bert"), 0.5, include="*word_embeddings", rank_multiple=1, calibration=batches("bert")
    )
    assert report(model).steps[-1].modules == ["bert.embeddings.word_embeddings"]
    model.save_pretrained(tmp_path)
    assert is_unchanged(load(tmp_path)[0], state(model))


def test_fisher_weights_need_labels_and_move_the_factors():
    dense = tiny.model("bert")
    with pytest.raises(SettingError, match="needs labels in the calibration data"):
        factorize(dense, 0.5, weighting="fisher", calibration=batches("bert"))
    made = {
        how: factorize(copy.deepcopy(dense), 0.5, weighting=how, calibration=labelled(), rank_multiple=1)
        for how in ("none", "fisher", "fisher+activation")
    }
    ups = [model.bert.encoder.layer[0].output.dense.to_dense().weight for model in made.values()]
    assert not torch.allclose(ups[0], ups[1])
    assert not torch.allclose(ups[1], ups[2])
    model = factorize(tiny.model("llama"), 0.5, weighting="fisher", calibration=batches("llama"), rank_multiple=1)
    assert report(model).steps[-1].source == "Hsu et al. 2022, arXiv:2207.00112"
