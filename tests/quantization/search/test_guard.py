"""The guard: the bound holds, the most harmful modules go back first, few tries, and errors before work."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch

import tiny
from hfshrink.errors import SettingError
from hfshrink.evaluation import evaluate
from hfshrink.quantization.perturbations import PLACES, perturbation, rows_of
from hfshrink.quantization.search.guard import _most_harmful_first, guard

TEXTS = [f"{a} {b} {c}" for a in ("the", "a") for b in ("good", "bad", "old", "sad") for c in ("dog", "cat", "film")]
OUTPUT = "bert.encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("bert", num_labels=3)


@pytest.fixture(scope="module")
def rows(model) -> datasets.Dataset:
    """Rows whose labels are the model's own answers: its accuracy is 1."""
    plain = datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
    answers = evaluate(model, plain, processor=tiny.tokenizer()).predictions
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [int(answer) for answer in answers]})


class Maker:
    """Adds noise to modules: a scheme whose harm is known."""

    def __init__(self, noise: dict[str, float]) -> None:
        self.noise, self.calls = noise, []

    def __call__(self, model: Any, processor: Any, kept_float: list[str]) -> tuple[Any, list[str], dict[str, Any]]:
        self.calls.append(list(kept_float))
        made, changed = copy.deepcopy(model), []
        generator = torch.Generator().manual_seed(0)
        for name, module in made.named_modules():
            if isinstance(module, PLACES):
                noise = torch.randn(module.weight.shape, generator=generator)
                if name not in kept_float and name != "classifier":
                    rows_of(module).add_(self.noise.get(name, 0) * noise.flatten(1))
                    changed.append(name)
        if not changed:
            raise SettingError("There is nothing to quantize")
        return made, changed, {"own": 1}


@pytest.fixture
def ranked(monkeypatch):
    """The guard's ranking, replaced: the order is known."""

    def replace(first: list[str]) -> None:
        def order(model, rows, processor, modules, bits):
            return [*first, *(name for name in modules if name not in first)]

        monkeypatch.setattr("hfshrink.quantization.search.guard._most_harmful_first", order)

    return replace


def run(maker, model, rows, *, metric=None, max_drop=0.0, kept=("classifier",)):
    return guard(maker, model, tiny.tokenizer(), list(kept), None, rows, metric, max_drop)


def test_nothing_is_restored_where_the_bound_holds(model, rows):
    maker = Maker({})
    made, modules, results = run(maker, model, rows)
    assert maker.calls == [["classifier"]]
    assert results["restored"] == []
    assert results["own"] == 1
    assert results["guard"]["tries"] == [{"restored": 0, "value": 1.0, "drop": 0.0}]
    assert results["guard"]["metric"] == "accuracy"
    assert len(modules) == 16
    assert made is not model


def test_the_harmful_module_goes_back(model, rows, ranked):
    ranked([OUTPUT])
    maker = Maker({OUTPUT: 50.0})
    made, modules, results = run(maker, model, rows)
    assert results["restored"] == [OUTPUT]
    assert OUTPUT not in modules
    assert maker.calls == [["classifier"], ["classifier", OUTPUT]]
    assert torch.equal(made.get_submodule(OUTPUT).weight, model.get_submodule(OUTPUT).weight)
    assert results["guard"]["tries"][0]["drop"] > 0
    assert results["guard"]["tries"][1]["drop"] == 0


@pytest.mark.parametrize("harmful", [1, 3, 8, 15])
def test_bisection_finds_the_number(model, rows, ranked, harmful):
    """The metric here only counts the harmful modules that are not in float."""
    names = Maker({})(model, None, [])[1]
    ranked(names)
    maker = Maker({})

    def score(predictions, references):
        kept = maker.calls[-1] if maker.calls else names
        return 1 - 0.01 * len(set(names[:harmful]) - set(kept))

    found = run(maker, model, rows, metric=score, max_drop=0.001)[2]
    assert found["restored"] == names[:harmful]
    assert len(maker.calls) <= 1 + 5 + 3
    assert [row["drop"] < 0.001 for row in found["guard"]["tries"]] == [
        row["restored"] >= harmful for row in found["guard"]["tries"]
    ]


def test_ranking_puts_the_worst_first(model, rows):
    """By measured loss rises at 8 bits; what has no weight in PyTorch comes last."""
    names = Maker({})(model, None, [])[1]
    order = _most_harmful_first(model, rows, tiny.tokenizer(), ["node_7", *names, OUTPUT], 8)
    encoded = tiny.tokenizer()(TEXTS, padding=True, return_tensors="pt")
    labels = torch.tensor(list(rows["label"]))
    losses = {}
    for name in names:
        trial = perturbation("int", quantize_inputs=True)
        with torch.no_grad(), trial.apply(model, name, 8):
            losses[name] = float(model(**encoded, labels=labels).loss)
    assert order[-1] == "node_7"
    assert order[:3] == sorted(names, key=lambda name: -losses[name])[:3]
    assert sorted(order[:-1]) == sorted(names)
    with pytest.raises(SettingError, match="None of 1 quantized modules has a weight to rank: node_7"):
        _most_harmful_first(model, rows, tiny.tokenizer(), ["node_7"], 8)


def test_a_loose_bound_allows_a_fall(model, rows):
    maker = Maker({OUTPUT: 50.0})
    found = run(maker, model, rows, max_drop=1.0)[2]
    assert found["restored"] == []
    assert found["guard"]["tries"][0]["drop"] > 0


def test_a_metric_that_should_fall(model, rows, ranked):
    """A loss by name of the function: it may rise by max_drop only."""

    def loss(predictions, references):
        return sum(p != r for p, r in zip(predictions, references, strict=True)) / len(predictions)

    ranked([OUTPUT])
    found = run(Maker({OUTPUT: 50.0}), model, rows, metric=loss)[2]
    assert found["restored"] == [OUTPUT]
    assert found["guard"]["direction"] == "lower is better"
    assert found["guard"]["tries"][0]["value"] > found["guard"]["float"] == 0


def test_the_direction_is_read_off_the_name(model, rows, ranked):
    """An error that rises is no gain."""

    def mean_squared_error(predictions, references):
        return sum(p != r for p, r in zip(predictions, references, strict=True)) / len(predictions)

    ranked([OUTPUT])
    found = run(Maker({OUTPUT: 50.0}), model, rows, metric=mean_squared_error)[2]
    assert found["restored"] == [OUTPUT]
    assert found["guard"]["direction"] == "lower is better"


def test_modules_are_ranked_at_the_bits_of_the_scheme(model, rows, monkeypatch):
    asked = []

    def trial(scheme, levels, quantize_inputs):
        asked.append((levels, quantize_inputs))
        return perturbation(scheme, levels, quantize_inputs=quantize_inputs)

    monkeypatch.setattr("hfshrink.quantization.search.guard.perturbation", trial)
    for bits in (8, 4):
        _most_harmful_first(model, rows, tiny.tokenizer(), [OUTPUT], bits)
    assert asked == [((8,), True), ((4,), False)]


def test_a_scheme_that_keeps_nothing_in_float(model, rows):
    maker = Maker({OUTPUT: 50.0})
    with pytest.raises(SettingError, match="accuracy goes from 1.0000 to .* stores all weights alike"):
        guard(maker, model, tiny.tokenizer(), [], None, rows, None, 0.0, None)
    assert len(maker.calls) == 1


def test_a_bound_that_no_choice_keeps(model, rows, ranked):
    _, names, _ = Maker({})(model, None, [])
    ranked(names)
    maker = Maker({names[-1]: 1000.0, "classifier": 0.0})
    broken = copy.deepcopy(model)
    with pytest.raises(SettingError, match=r"accuracy falls by more than max_drop=0 from 1\.0000 while any of 16"):
        run(maker, broken, rows)
    assert max(len(kept) for kept in maker.calls) == 1 + 15


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_drop": -0.1}, "max_drop must be a number of at least 0, .* got -0.1"),
        ({"max_drop": float("nan")}, "got nan"),
        ({"max_drop": True}, "got True"),
        ({"metric": "bleu"}, "metric must be one of accuracy, .* got 'bleu'"),
    ],
)
def test_bad_settings_before_any_export(model, rows, change, match):
    maker = Maker({})
    with pytest.raises(SettingError, match=match):
        run(maker, model, rows, **change)
    assert maker.calls == []


def test_rows_without_labels_before_any_export(model):
    maker = Maker({})
    for rows, match in ((None, "needs validation rows"), (datasets.Dataset.from_dict({"text": TEXTS}), "label")):
        with pytest.raises(SettingError, match=match):
            run(maker, model, rows)
    assert maker.calls == []


@pytest.mark.slow
def test_an_export_is_guarded(model, rows):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from hfshrink.quantization.graphs.dynamic import make_dynamic

    exported, modules, results = run(make_dynamic, model, rows, max_drop=0.2)
    assert OUTPUT in modules
    assert results["guard"]["tries"][-1]["drop"] <= 0.2
    assert set(results["restored"]).isdisjoint(modules)
    assert evaluate(exported, rows, processor=tiny.tokenizer()).main.value >= 0.8
