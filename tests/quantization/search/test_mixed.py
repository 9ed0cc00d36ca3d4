"""Mixed precision: the budget holds byte by byte, harm is predicted and measured, and the model reloads."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import tiny
from hfshrink.checkpoint import layer_map, set_layers
from hfshrink.errors import SettingError
from hfshrink.layers import QuantizedLinear
from hfshrink.loading import load
from hfshrink.quantization.search.mixed import make_mixed_weights, model_bytes
from hfshrink.quantization.search.plan import Plan, make_plan, measure_plan, measure_rises, trial_of
from hfshrink.quantization.search.precisions import PRECISIONS, quantized_layer, rounded_weight, weight_bytes
from hfshrink.sensitivity import measure_sensitivity

LINEARS = 13
"""Of a tiny BERT without its head: 2 layers of 6, and the pooler."""


def rows() -> list[dict[str, torch.Tensor]]:
    return [{**tiny.inputs("bert", batch=8, seed=3), "labels": torch.arange(8) % 2}]


def divergence(dense, other) -> float:
    """KL(p, q) of the classes, the mean over rows."""
    with torch.no_grad():
        p, q = (
            network(**tiny.inputs("bert", batch=8, seed=3)).logits.double().softmax(-1) for network in (dense, other)
        )
    return float((p * (p / q).log()).sum(-1).mean())


def mixed(model, **options):
    options = {"size_ratio": 0.5, "precisions": ("int3", "int8", "fp32"), "group_size": 8, **options}
    return make_mixed_weights(model, ["classifier"], calibration=rows(), **options)


@pytest.mark.parametrize("precisions", [("int3", "int8", "fp32"), ("nf4", "int8", "bf16"), ("int2", "int4")])
def test_budget_holds_and_bytes_are_told(precisions):
    model = tiny.model("bert")
    before = model_bytes(model)
    ratio = 0.45 if "bf16" in precisions else 0.6
    found, modules, results = mixed(model, size_ratio=ratio, precisions=precisions)
    assert found is model
    assert results["memory_bytes"] == model_bytes(model) <= results["budget_bytes"] == int(ratio * before)
    plan = results["plan"]
    assert len(plan["modules"]) == LINEARS
    assert set(modules) == set(layer_map(model))
    assert "classifier" not in modules
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in modules)
    dtype = torch.bfloat16 if "bf16" in precisions else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, row in plan["modules"].items():
        module = model.get_submodule(name)
        held = [module.weight, *([module.scale] if name in modules else [])]
        assert row["bytes"] == sum(t.numel() * t.element_size() for t in held)
    json.dumps(results)


def test_measured_rise_is_that_of_the_model():
    model = tiny.model("bert")
    dense = copy.deepcopy(model)
    _, _, results = mixed(model)
    assert results["measure"] == "divergence"
    assert results["plan"]["measured_rise"] == pytest.approx(divergence(dense, model), rel=1e-2)
    alone = [row["rise"] for row in results["plan"]["modules"].values()]
    assert results["plan"]["predicted_rise"] == pytest.approx(sum(max(rise, 0) for rise in alone))


def test_plan_is_the_best_of_all():
    """Three modules, two precisions: all eight choices by hand."""
    model = tiny.model("bert")
    names = [name for name in measure_names(model) if "layer.0.attention.self" in name]
    trials = {name: trial_of(PRECISIONS[name], 8) for name in ("int2", "int8")}
    rises = measure_rises(model, rows(), names, trials)
    sizes = {name: {p: weight_bytes((16, 16), PRECISIONS[p], 8) for p in trials} for name in names}
    budget = 2 * sizes[names[0]]["int2"] + sizes[names[0]]["int8"]
    plan = make_plan(rises, sizes, budget)
    totals = []
    for options in itertools.product(trials, repeat=3):
        pairs = list(zip(names, options, strict=True))
        if sum(sizes[n][o] for n, o in pairs) <= budget:
            totals.append(sum(max(rises[n][o], 0) for n, o in pairs))
    assert plan.predicted_rise == pytest.approx(min(totals))
    state = copy.deepcopy(model.state_dict())
    _, rise = measure_plan(model, rows(), {n: trials[o] for n, o in plan.precisions.items()})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    layers = {n: quantized_layer(model.get_submodule(n), PRECISIONS[o], 8) for n, o in plan.precisions.items()}
    dense = copy.deepcopy(model)
    set_layers(model, layers)
    assert rise == pytest.approx(divergence(dense, model), rel=1e-2)


def measure_names(model) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "classifier"]


def test_rises_are_those_of_the_perturbation():
    model = tiny.model("bert")
    names = measure_names(model)[:2]
    found = measure_rises(model, rows(), names, {"nf4": trial_of(PRECISIONS["nf4"], 8), "fp32": None})
    trial, level = trial_of(PRECISIONS["nf4"], 8)
    expected = measure_sensitivity(model, rows(), trial, measure="divergence", levels=(level,), include=names)
    assert found == {name: {"nf4": expected.rise(name, 4), "fp32": 0.0} for name in names}


def test_a_tight_budget_takes_the_fewest_bits_and_a_wide_one_the_most():
    tight, wide = tiny.model("bert"), tiny.model("bert")
    with pytest.raises(SettingError, match=r"budget of 100 bytes is too small.* takes ([\d,]+) bytes") as problem:
        mixed(tight, size_ratio=None, budget_bytes=100)
    assert layer_map(tight) == {}
    least = int(str(problem.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    _, _, results = mixed(tight, size_ratio=None, budget_bytes=least)
    assert {row["precision"] for row in results["plan"]["modules"].values()} == {"int3"}
    assert results["memory_bytes"] == least
    _, modules, results = mixed(wide, size_ratio=1.0, precisions=("int2", "fp32"))
    assert results["plan"]["predicted_rise"] == 0
    assert len(modules) == sum(
        row["rise"] <= 0 and row["precision"] == "int2" for row in results["plan"]["modules"].values()
    )


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_round_trip(family, tmp_path):
    model = tiny.model(family)
    batch = tiny.inputs(family)
    labelled = {**batch, "labels": torch.arange(3) % 2} if family != "llama" else batch
    kept = ["lm_head"] if family == "llama" else ["classifier"]
    options = {"size_ratio": 0.4, "precisions": ("nf4", "int8", "bf16"), "group_size": 8}
    make_mixed_weights(model, kept, calibration=[labelled], **options)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hfshrink"
    loaded, _ = load(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert layer_map(loaded) == layer_map(model) != {}
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


def test_what_is_not_saved_keeps_its_precision():
    """Rotary frequencies in bfloat16 would turn far positions by the wrong angle; a reload computes them anew."""
    model = tiny.model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    options = {"size_ratio": 0.5, "precisions": ("nf4", "int8", "bf16"), "group_size": 8}
    _, _, results = make_mixed_weights(model, ["lm_head"], calibration=[tiny.inputs("llama")], **options)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert results["memory_bytes"] <= results["budget_bytes"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_weight_too_large_for_its_float_changes_nothing():
    model = tiny.model("bert")
    model.classifier.weight.data[0, 0] = 1e5
    with pytest.raises(SettingError, match="classifier"):
        mixed(model, precisions=("int8", "fp16"))
    assert layer_map(model) == {}
    assert model.dtype == torch.float32


def test_tied_and_special_modules_stay():
    model = tiny.model("gpt2")
    with pytest.raises(SettingError, match="GPT2LMHeadModel has no Linear to quantize: .* Conv1D"):
        make_mixed_weights(model, [], calibration=[tiny.inputs("gpt2")], size_ratio=0.5)
    bert = tiny.model("bert")
    bert._keep_in_fp32_modules = ["intermediate"]
    _, modules, _ = mixed(bert, size_ratio=0.6, precisions=("int3", "int8"))
    assert len(modules) == LINEARS - 2
    assert not any("intermediate" in name for name in modules)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"size_ratio": None},
            r"Give one of budget_bytes and size_ratio, got None and None\. .* has [\d,]+ bytes now",
        ),
        ({"budget_bytes": 5000}, "got 5000 and 0.5"),
        ({"size_ratio": 1.5}, r"share of the model's bytes that may stay, in \(0, 1\], got 1\.5"),
        ({"size_ratio": None, "budget_bytes": 1e6}, "whole number of at least 1, got 1000000.0"),
        ({"precisions": ("int8",)}, "two or more different ones"),
        ({"precisions": ("int8", "int8")}, "two or more different ones"),
        ({"precisions": ("fp32", "bf16", "int8")}, "at most one of them float"),
        ({"precisions": ("int8", "int5")}, "A precision must be one of fp32, .* got 'int5'"),
        ({"precisions": "int8"}, "precisions must be a list such as"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"budget_ms": 5}, "no budget of milliseconds: codes are unpacked in each call"),
        ({"plot": "plan.pdf"}, r"must end in \.png or \.svg, got 'plan\.pdf'"),
    ],
)
def test_bad_settings_change_nothing(options, match):
    model = tiny.model("bert")
    with pytest.raises(SettingError, match=match):
        mixed(model, **options)
    assert layer_map(model) == {}
    assert model.dtype == torch.float32


def test_rows_and_a_free_slot_are_needed():
    model = tiny.model("bert")
    with pytest.raises(SettingError, match="measured damage: give rows"):
        make_mixed_weights(model, [], size_ratio=0.5)
    regression = tiny.model("bert", num_labels=1)  # a loss, and no classes
    with pytest.raises(SettingError, match="The loss needs labels"):
        make_mixed_weights(regression, [], calibration=[tiny.inputs("bert")], size_ratio=0.5)
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(SettingError, match="quantized by bitsandbytes"):
        mixed(model)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    plan = Plan({"a": "int4", "b": "int8"}, {"a": 0.2, "b": 0.1}, {"a": 4, "b": 8}, 0.3)
    for suffix in (".png", ".svg"):
        plan.plot(tmp_path / f"plan{suffix}")
        assert (tmp_path / f"plan{suffix}").stat().st_size > 1000
    mixed(tiny.model("bert"), plot=tmp_path / "model.svg")
    assert (tmp_path / "model.svg").is_file()


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "int3", "int2"])
@pytest.mark.parametrize("group_size", [None, 5])
def test_layers_equal_the_perturbation_and_its_bytes(name, group_size):
    linear = nn.Linear(70, 6)
    layer = quantized_layer(linear, PRECISIONS[name], group_size)
    assert torch.equal(layer.dequantized(), rounded_weight(linear.weight.detach(), PRECISIONS[name], group_size))
    held = layer.weight.numel() + 4 * layer.scale.numel()
    assert weight_bytes((6, 70), PRECISIONS[name], group_size) == held
