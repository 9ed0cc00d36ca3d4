"""Gram matrices and squared gradients against loops over single rows; too little data, padding, no labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from hfshrink.calibration import collect
from hfshrink.errors import SettingError
from hfshrink.factorization.sites import factorable, matrix
from hfshrink.factorization.statistics import (
    check_tokens,
    collect_statistics,
    layer_statistics,
    row_weights,
    squared_gradients,
)

POOLER = "bert.pooler.dense"
LAYERS = {"bert": "*layer.*", "llama": "*layers.*", "gpt2": "*.h.*", "vit": "*layers.*"}


def batches(family, count=3, **kwargs):
    return [tiny.inputs(family, seed=seed, **kwargs) for seed in range(count)]


def labelled(family, count=2):
    found = batches(family, count)
    for batch in found:
        is_text = family == "llama"
        batch["labels"] = batch["input_ids"] if is_text else torch.tensor([0, 1, 1])
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_gram_matrices_equal_those_of_whole_passes(family):
    model, data = tiny.model(family), batches(family, 4)
    found = collect_statistics(model, data, include=LAYERS[family])
    with collect(model, "input_gram", include=list(found)) as whole, torch.no_grad():
        for batch in data:
            model(**batch)
    assert found
    for name, stats in found.items():
        assert stats.tokens == whole[name].tokens
        torch.testing.assert_close(stats.input_gram, whole[name].input_gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_squared_gradients_are_those_of_single_rows(family):
    model, data = tiny.model(family), labelled(family)
    modules, _ = factorable(model)
    found = squared_gradients(model, modules, data)
    slow = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    for batch in data:
        for row in range(3):
            model.zero_grad()
            model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
            for name, module in modules.items():
                slow[name] += module.weight.grad**2
    for name, stats in found.items():
        torch.testing.assert_close(stats.squared_gradient, slow[name])
        assert stats.backwards == 6
        rows = row_weights(modules[name], stats)
        torch.testing.assert_close(rows, matrix(modules[name], slow[name]).double().sum(1).sqrt())


def test_gradients_leave_no_trace():
    model = tiny.model("bert").train()
    frozen = model.bert.pooler.dense.weight.requires_grad_(False)
    modules, _ = factorable(model)
    found = squared_gradients(model, modules, labelled("bert"))
    assert float(found[POOLER].squared_gradient.sum()) > 0  # also of what is frozen
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_both_weightings_come_together():
    model = tiny.model("bert")
    found = collect_statistics(model, labelled("bert"), "fisher+activation", include="*query")
    for name, stats in found.items():
        assert stats.input_gram is not None, name
        assert stats.squared_gradient is not None, name


def test_padding_changes_nothing():
    """A batch with padding, and the same rows one by one without, give the same Gram matrices."""
    model, [batch] = tiny.model("bert"), batches("bert", 1)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [
        {"input_ids": ids[:length][None], "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for ids, length in zip(batch["input_ids"], lengths, strict=True)
    ]
    padded, plain = (collect_statistics(model, data, include="*layer.0*query") for data in ([batch], rows))
    for name, stats in padded.items():
        assert stats.tokens == plain[name].tokens == 18
        torch.testing.assert_close(stats.input_gram, plain[name].input_gram, rtol=1e-5, atol=1e-5)


def test_too_few_tokens_are_told_with_the_number_that_is_needed():
    model = tiny.model("bert")
    with pytest.raises(
        SettingError, match=r"has 18 tokens without .*output.dense with its 24 input features needs 24"
    ):
        collect_statistics(model, batches("bert", 1))
    model = tiny.model("resnet")
    with pytest.raises(SettingError, match=r"has 48 places without padding.*with its 147 input features needs 147"):
        next(layer_statistics(model, factorable(model)[0], "activation", batches("resnet", 1)))
    assert check_tokens({}, batches("bert")) is None
    assert check_tokens({"a": nn.Linear(3, 1)}, batches("vit")) is None
    assert check_tokens({"a": nn.Linear(3, 1)}, [{"input_ids": torch.ones(2, 5)}]) == 10


def test_a_module_that_sees_one_token_of_each_row_has_no_gram_matrix():
    found = collect_statistics(tiny.model("bert"), batches("bert", 2))
    assert (found[POOLER].tokens, found[POOLER].input_gram) == (6, None)
    assert all(stats.input_gram is not None for name, stats in found.items() if name != POOLER)


def test_labels_are_needed_for_gradients_only():
    with pytest.raises(SettingError, match="no loss from input_ids, attention_mask: the Fisher .* needs labels"):
        collect_statistics(tiny.model("bert"), batches("bert"), "fisher")
    found = collect_statistics(tiny.model("llama"), batches("llama"), "fisher", include="*q_proj")
    assert all(stats.squared_gradient is not None for stats in found.values())  # of its own tokens


def test_values_that_are_no_numbers_are_refused():
    model = tiny.model("bert")
    model.bert.encoder.layer[0].intermediate.dense.bias.data.fill_(float("inf"))
    with pytest.raises(SettingError, match="input of bert.encoder.layer.0.output.dense has NaN or infinite values"):
        collect_statistics(model, batches("bert"))
    model = tiny.model("bert")
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(SettingError, match="gradient of .* has NaN or infinite values"):
        collect_statistics(model, labelled("bert"), "fisher")


def test_settings_are_checked():
    with pytest.raises(SettingError, match="weighting must be one of fisher, activation, .*, got 'none'"):
        collect_statistics(tiny.model("bert"), [], "none")
    with pytest.raises(SettingError, match="calibration data is empty"):
        collect_statistics(tiny.model("bert"), [])
