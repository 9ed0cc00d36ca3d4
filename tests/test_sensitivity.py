"""Loss rises against a slow loop; the model is the same afterwards, whatever happens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import pytest
import torch
from torch import nn
from transformers import BertForTokenClassification

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.sensitivity import Sensitivity, SensitivityRow, measure_sensitivity, restored

TEXTS = ["the dog is good", "a very old cat reads", "bad plot", "the sun was warm and the movie long", "no"]
LINEARS = ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense"]


class Shrink:
    """Weights times (1 − level): what a technique would bring."""

    title = "shrink"
    levels = (0.0, 0.5)

    def places(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if name.endswith("intermediate.dense")]

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        weight = model.get_submodule(place).weight
        with restored(weight):
            weight.mul_(1 - level)
            torch.rand(3)  # a careless draw
            yield


class Broken(Shrink):
    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        with super().apply(model, place, level):
            if level == 1:
                raise ZeroDivisionError
            if level == 2:
                model.get_submodule(place).weight.fill_(float("nan"))
            yield


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1, 0]})


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_rises_against_a_slow_loop(rows):
    model = tiny.model("bert")
    state = copy.deepcopy(model.state_dict())
    model.train()
    random_state = torch.get_rng_state()
    found = measure_sensitivity(model, rows, Shrink(), batch_size=2, processor=tiny.tokenizer())
    assert model.training
    assert same(model, state)
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()

    def slow(network: nn.Module) -> float:
        losses = []
        for text, label in zip(rows["text"], rows["label"], strict=True):
            with torch.no_grad():
                losses.append(
                    network(**tiny.tokenizer()(text, return_tensors="pt"), labels=torch.tensor([label])).loss
                )
        return float(sum(losses)) / len(losses)

    assert found.dense_loss == pytest.approx(slow(model), abs=1e-6)
    assert found.examples == 5
    assert found.places == LINEARS
    for place in LINEARS:
        changed = copy.deepcopy(model)
        changed.get_submodule(place).weight.data.mul_(0.5)
        assert found.rise(place, 0.5) == pytest.approx(slow(changed) - slow(model), abs=1e-6)
        assert found.rise(place, 0.0) == 0.0


def test_language_models_are_asked_for_their_input():
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    trial = Shrink()
    trial.places = lambda model: ["model.layers.0.mlp.up_proj"]
    found = measure_sensitivity(model, [batch, {name: t[:1] for name, t in batch.items()}], trial)
    total, count = 0.0, 0
    for row in [0, 1, 2, 0]:  # token after token
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        chances = tiny.logits(model, {"input_ids": ids}).log_softmax(-1)
        for position in range(length - 1):
            total, count = total - float(chances[0, position, ids[0, position + 1]]), count + 1
    assert found.dense_loss == pytest.approx(total / count, abs=1e-5)
    masked = measure_sensitivity(tiny.model("bert", "fill-mask"), [tiny.inputs("bert")], Shrink())
    assert masked.dense_loss > 0


def test_the_model_is_restored_after_an_exception(rows):
    model = tiny.model("bert")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        measure_sensitivity(model, rows, Broken(), levels=(0.5, 1), processor=tiny.tokenizer())
    assert same(model, state)


def test_a_loss_that_is_no_number_is_missing(rows):
    model = tiny.model("bert")
    found = measure_sensitivity(model, rows, Broken(), levels=(2, 0.5), include=LINEARS[1], processor=tiny.tokenizer())
    assert found.rise(LINEARS[1], 2) is None
    assert "no number" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0] == {
        "place": LINEARS[1],
        "level": 2,
        "loss": None,
        "rise": None,
    }


def report() -> Sensitivity:
    rises = {("a", 0.3): 0.1, ("a", 0.9): 0.2, ("b", 0.3): 0.0, ("b", 0.9): 0.9, ("c", 0.3): None, ("c", 0.9): 0.0}
    rows = [SensitivityRow(*key, None if rise is None else 1 + rise, rise) for key, rise in rises.items()]
    return Sensitivity("prune", 1.0, 5, tuple(rows))


def test_order_and_table():
    found = report()
    assert found.best_first() == ["a", "b", "c"]
    assert found.best_first(0.9) == ["c", "a", "b"]
    assert str(found).splitlines()[1:4] == [
        "| place | 0.3       | 0.9     |",
        "|-------|-----------|---------|",
        "| a     | +0.1000   | +0.2000 |",
    ]
    with pytest.raises(SettingError, match=r"'a' at 0.5 was not measured; levels: 0.3, 0.9"):
        found.best_first(0.5)


@pytest.mark.parametrize(("name", "start"), [("map.png", b"\x89PNG"), ("map.svg", b"<?xml")])
def test_plot(tmp_path, name, start):
    pytest.importorskip("matplotlib")
    report().plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_errors(rows):
    model = tiny.model("bert")
    words = tiny.tokenizer()
    for keywords, match in (
        ({"levels": ()}, r"levels must be one or more numbers, got \(\)"),
        ({"levels": 0.5}, "levels must be one or more numbers, got 0.5"),
        ({"levels": ("high",)}, "levels must be one or more numbers"),
        ({"include": "*.attention"}, r"'\*.attention' matches none of 2 places: bert.encoder"),
        ({"exclude": "bert.*"}, "No place is left of 2"),
        ({"samples": 0}, "samples must be at least 1"),
    ):
        with pytest.raises(SettingError, match=match):
            measure_sensitivity(model, rows, Shrink(), **{"processor": words, **keywords})
    with pytest.raises(SettingError, match="needs labels, and the data has only .*input_ids.* 'text-classification'"):
        measure_sensitivity(model, rows.remove_columns("label"), Shrink(), processor=words)
    with pytest.raises(SettingError, match="must end in .png or .svg, got 'map.txt'"):
        report().plot("map.txt")
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(SettingError, match="The loss is nan before any change"):
        measure_sensitivity(model, rows, Shrink(), processor=words)


def test_a_model_without_a_loss():
    class Headless(type(tiny.model("bert"))):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask)

    model = Headless(tiny.model("bert").config)
    batch = {**tiny.inputs("bert"), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(UnsupportedModelError, match="Headless computes no loss from"):
        measure_sensitivity(model, [batch], Shrink())


@pytest.mark.parametrize("family", ["bert", "bert-tokens"])
def test_the_divergence_needs_no_labels_and_equals_a_slow_loop(family):
    model = tiny.model("bert", num_labels=3)
    if family == "bert-tokens":
        model = BertForTokenClassification(model.config).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = measure_sensitivity(model, [batch], Shrink(), measure="divergence")
    assert found.dense_loss == 0.0
    damaged = copy.deepcopy(model)
    damaged.get_submodule(LINEARS[1]).weight.data.mul_(0.5)
    total, count = 0.0, 0
    for row in range(2):
        given = {name: value[row : row + 1, : mask[row].sum()] for name, value in batch.items()}
        with torch.no_grad():
            p, q = (side(**given).logits.flatten(0, -2).double().softmax(-1) for side in (model, damaged))
        total += float((p * (p / q).log()).sum())
        count += len(p)
    assert found.rise(LINEARS[1], 0.5) == pytest.approx(total / count, rel=1e-2)
    assert found.rise(LINEARS[0], 0.0) == pytest.approx(0.0, abs=1e-8)
    assert str(found).startswith("divergence from the model as it is, shrink, 2 examples")


def test_the_divergence_is_of_classes():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([0])}
    with pytest.raises(SettingError, match="measure must be one of loss, divergence, got 'kl'"):
        measure_sensitivity(tiny.model("bert"), [batch], Shrink(), measure="kl")
    with pytest.raises(UnsupportedModelError, match="no classes to compare"):
        measure_sensitivity(tiny.model("bert", num_labels=1), [batch], Shrink(), measure="divergence")
