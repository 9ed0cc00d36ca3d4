"""Budgets of the whole model in parameters and bytes, and bounds on the fall of a metric."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import tiny
import training
from factored import batches, is_unchanged, parameters, state
from hfshrink import evaluate, report
from hfshrink.errors import BudgetError
from hfshrink.factorization.run import factorize
from hfshrink.measurement import Score


def test_a_budget_in_bytes_counts_all_tensors_in_their_dtype(tmp_path):
    model = tiny.model("resnet").bfloat16()
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    budget = int(0.8 * tensors)
    factorize(model, max_size_bytes=budget, rank_multiple=1)
    found = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert 0.95 * budget < found <= budget
    tied = tiny.model("gpt2")
    budget = int(0.8 * 4 * parameters(tied))
    factorize(tied, max_size_bytes=budget, rank_multiple=1)
    assert 0.95 * budget < 4 * parameters(tied) <= budget


def test_a_budget_that_cannot_be_met_tells_the_nearest():
    model = tiny.model("bert")
    before = state(model)
    with pytest.raises(BudgetError, match=r"max_parameters=100 can't be reached: the nearest is ([\d,]+) of"):
        factorize(model, max_parameters=100)
    with pytest.raises(BudgetError, match=r"max_size_bytes=100 can't be reached: the nearest is .* bytes") as error:
        factorize(model, max_size_bytes=100, rank_multiple=1)
    assert is_unchanged(model, before)
    nearest = int(str(error.value).split("nearest is ")[1].split(" ")[0].replace(",", ""))
    factorize(model, max_size_bytes=nearest, rank_multiple=1)
    assert set(report(model).steps[-1].results["ranks"].values()) == {1}


def test_the_bound_of_a_metric_is_kept():
    rows = training.rows(24)
    model = factorize(tiny.model("bert"), max_drop=0.1, metric="accuracy", calibration=rows, rank_multiple=1)
    step = report(model).steps[-1]
    drops = step.results["drops"]
    assert step.settings["max_drop"] == 0.1
    assert min(t["drop"] for t in drops["tries"]) <= 0.1
    assert step.results["kept_ratio"] <= 0.95
    assert drops["dense"] - evaluate(model, rows, "accuracy").main.value <= 0.1 + 1e-9


def test_a_bound_that_cannot_be_kept_changes_nothing(monkeypatch):
    model, values = tiny.model("bert"), iter([0.9, *[0.4] * 9])
    before = state(model)
    found = lambda *_, **__: SimpleNamespace(main=Score("accuracy", next(values)))  # noqa: E731
    monkeypatch.setattr("hfshrink.factorization.deciding.evaluate", found)
    with pytest.raises(BudgetError, match=r"No budget up to 0.95 holds max_drop=0.1; drops by budget: .*0.5000"):
        factorize(model, max_drop=0.1, calibration=batches("bert"), weighting="none", rank_multiple=1)
    assert is_unchanged(model, before)
