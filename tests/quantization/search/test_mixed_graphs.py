"""Mixed precision in ONNX: nodes as planned, the budget held, and answers near those of the float model."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import tiny
from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.four_bit import pack
from hfshrink.quantization.graphs.nodes import module_of
from hfshrink.quantization.search.mixed_graphs import make_onnx_mixed
from hfshrink.quantization.search.precisions import PRECISIONS, encode

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

WIDE = {"hidden_size": 64, "intermediate_size": 96}


def rows() -> list[dict[str, torch.Tensor]]:
    return [{**tiny.inputs("bert", batch=8, seed=3), "labels": torch.arange(8) % 2}]


def mixed(model, **options):
    options = {"calibration": rows(), "size_ratio": 0.3, "group_size": 16, **options}
    return make_onnx_mixed(model, tiny.tokenizer(), ["classifier"], **options)


@pytest.fixture(scope="module")
def model():
    return tiny.model("bert", **WIDE)


@pytest.fixture(scope="module", autouse=True)
def one_export(model):
    """The tiny model is exported once; each test gets a copy."""
    first = export_float(model, tiny.tokenizer())
    component = first.components["model"]

    def copy_of(other, processor):
        if other is not model:
            return export_float(other, processor)
        parts = {"model": type(component)(component.program.clone(), component.metadata)}
        return type(first)(parts, first.export_format, copy.deepcopy(first.config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfshrink.quantization.search.mixed_graphs.export_float", copy_of)
        yield


@pytest.fixture(scope="module")
def made(model, one_export):
    state = copy.deepcopy(model.state_dict())
    found = mixed(model, size_ratio=0.25)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found


def kinds_of(exported) -> dict[str, int]:
    ops = [node.op_type for node in exported.components["model"].program.graph]
    return {op: ops.count(op) for op in ("MatMulNBits", "MatMulInteger")}


def test_nodes_are_as_planned_within_the_budget(made):
    exported, modules, results = made
    chosen = [row["precision"] for row in results["plan"]["modules"].values()]
    assert {"int4", "int8"} <= set(chosen)
    assert kinds_of(exported) == {"MatMulNBits": chosen.count("int4"), "MatMulInteger": chosen.count("int8")}
    assert results["graph_bytes"] <= results["budget_bytes"]
    assert results["graph_bytes"] > 0.9 * results["budget_bytes"]
    assert "bert.embeddings.word_embeddings" in modules
    assert {n for n, row in results["plan"]["modules"].items() if row["precision"] != "fp32"} <= set(modules)
    assert "classifier" not in modules
    json.dumps(results)


def test_answers_are_near(model, made):
    inputs = tiny.tokenizer()(["a good film", "the movie was sad"], padding=True, return_tensors="pt")
    expected, found = tiny.logits(model, inputs), made[0](**inputs).logits
    assert (found - expected).abs().max() < 0.5 * expected.abs().max()
    assert not torch.equal(found, expected)


def test_only_four_bits_and_float(model):
    exported, modules, results = mixed(model, precisions=("int4", "fp32"), size_ratio=0.5)
    chosen = [row["precision"] for row in results["plan"]["modules"].values()]
    assert kinds_of(exported) == {"MatMulNBits": chosen.count("int4"), "MatMulInteger": 0}
    assert results["graph_bytes"] <= results["budget_bytes"]
    assert set(modules) > {n for n, row in results["plan"]["modules"].items() if row["precision"] == "int4"}


def test_what_is_predicted_is_what_is_written(model, made):
    """The 4-bit codes of the graph are those that the trial rounded to."""
    exported, _, results = made
    found = {
        value.name: value.const_value for value in exported.components["model"].program.graph.initializers.values()
    }
    checked = 0
    for name, row in results["plan"]["modules"].items():
        if row["precision"] == "int4":
            codes, scale, _ = encode(model.get_submodule(name).weight.detach(), PRECISIONS["int4"], 16)
            node = next(n for n in exported.components["model"].program.graph if module_of(n) == name and n.domain)
            assert (found[node.inputs[1].name].numpy() == pack(codes, 4, 16)).all()
            assert torch.equal(torch.tensor(found[node.inputs[2].name].numpy()), scale)
            checked += 1
    assert checked


def test_least_budget(model):
    with pytest.raises(SettingError, match=r"budget of 1,000 bytes is too small: .* takes [\d,]+ bytes"):
        mixed(model, size_ratio=None, budget_bytes=1000)


def test_a_budget_of_milliseconds(model, monkeypatch):
    """Times are made up, so that the choice is known: int8 takes half, 4 bits as long as float."""
    slow = {"int4": 100, "int8": 50, "fp32": 100}
    room = "hfshrink.quantization.search.mixed_graphs"

    def costs(products, precisions, write):
        assert products["bert.encoder.layer.0.intermediate.dense"] == (34, 64, 96)
        return {name: {p: slow[p] for p in precisions} for name in products}

    monkeypatch.setattr(f"{room}.measure_costs", costs)
    monkeypatch.setattr(f"{room}._milliseconds", lambda *_: 2.0)
    with pytest.raises(SettingError, match=r"budget of 1 ms is too small: .* takes 1\.350 ms here, 0\.700 of them"):
        mixed(model, size_ratio=None, budget_ms=1)
    exported, _, results = mixed(model, size_ratio=None, budget_ms=1.5)
    chosen = [row["precision"] for row in results["plan"]["modules"].values()]
    assert len(chosen) == 13
    assert chosen.count("int8") >= 10
    assert kinds_of(exported) == {"MatMulNBits": chosen.count("int4"), "MatMulInteger": chosen.count("int8")}
    assert (results["budget_ms"], results["float_ms"], results["measured_ms"]) == (1.5, 2.0, 2.0)
    json.dumps(results)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget_ms": 5}, "Give one of budget_bytes, size_ratio and budget_ms, got None, 0.3, 5"),
        ({"budget_ms": -1, "size_ratio": None}, "budget_ms must be a number above 0, got -1"),
        ({"precisions": ("nf4", "int8")}, "precisions of a graph are int4, int8, fp32, got 'nf4'"),
        ({"precisions": ("int4",)}, "two or more different ones"),
        ({"group_size": 20}, "group_size must be one of 16, 32, 64, 128, 256, got 20"),
        ({"calibration": None}, "give rows, calibration"),
        ({"plot": "plan"}, r"must end in \.png or \.svg"),
        ({"size_ratio": None}, "Give one of budget_bytes, size_ratio and budget_ms, got None, None, None"),
        ({"size_ratio": 2}, r"may stay, in \(0, 1\], got 2"),
    ],
)
def test_bad_settings(model, options, match):
    with pytest.raises(SettingError, match=match):
        mixed(model, **options)


@pytest.mark.slow
def test_convolutional_networks_need_another_scheme():
    batch = [{**tiny.inputs("resnet"), "labels": torch.tensor([0, 1, 1])}]
    with pytest.raises(SettingError, match="nothing to quantize.*convolutional networks"):
        make_onnx_mixed(tiny.model("resnet"), None, ["classifier.1"], calibration=batch, size_ratio=0.5)
