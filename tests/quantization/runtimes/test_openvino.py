"""OpenVINO schemes: the float graph equals the model, int8 and 4-bit weights are close, heads stay float."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers.exporters import ExportedComponent, ExportedModel
from transformers.pytorch_utils import Conv1D

import tiny
from hfshrink import evaluate, load, profile, quantize, report
from hfshrink.errors import SettingError, require
from hfshrink.inputs import random_inputs

if not all(map(importlib.util.find_spec, ("openvino", "nncf"))):
    pytest.skip("openvino and nncf are not installed", allow_module_level=True)
openvino = require("openvino", extra="openvino")  # without its telemetry

from hfshrink.quantization.runtimes import openvino as schemes  # noqa: E402
from hfshrink.quantization.runtimes.openvino import (  # noqa: E402
    _quantize,
    make_openvino_fp32,
    make_openvino_int4,
    make_openvino_int8,
)
from hfshrink.quantization.runtimes.openvino_graphs import (  # noqa: E402
    FLOAT32,
    WEIGHT_PORTS,
    export_openvino,
    weight_types,
)

PAIRS = tiny.tokenizer()(
    ["a good film", "the very long boring movie was not good", "bad"],
    ["not bad", "a dull plot", "the sun is warm and the story is short"],
    padding=True,
    return_tensors="pt",
)


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert", num_labels=3, num_hidden_layers=1)


@pytest.fixture(scope="module")
def rows(bert):
    return [random_inputs(bert, 4, length, tiny.tokenizer(), length, pairs=True) for length in (6, 12, 24)]


@pytest.fixture(scope="module")
def fp32(bert):
    """The export, and module of each node. Its model's weights are gone: the export must own what it computes with."""
    model = copy.deepcopy(bert)
    made = export_openvino(model, tiny.tokenizer())
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), bert.parameters(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return made


@pytest.fixture(scope="module")
def shared(bert, fp32):
    """Every scheme starts from a copy of one export of the same model, which takes seconds."""

    def copied(model, processor):
        assert model is bert
        component = fp32[0].components["model"]
        parts = {"model": ExportedComponent(component.program.clone(), component.metadata)}
        return ExportedModel(parts, fp32[0].export_format, config=copy.deepcopy(fp32[0].config)), dict(fp32[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemes, "export_openvino", copied)
        yield


@pytest.fixture(scope="module")
def int8(bert, rows, shared):
    return make_openvino_int8(bert, tiny.tokenizer(), ["classifier"], calibration=rows, smoothing=False)


@pytest.fixture(scope="module")
def int4(bert, shared):
    return make_openvino_int4(bert, tiny.tokenizer(), ["classifier"], group_size=8)


def weights(exported, modules, module):
    """The float weights that the graph computes with for one module, unpacked by OpenVINO itself."""
    for node in exported.program.get_ordered_ops():
        if modules.get(node.get_friendly_name()) == module:
            value = node.input_value(WEIGHT_PORTS[node.get_type_name()])
            unpacked = openvino.Core().compile_model(openvino.Model([value], []), "CPU", FLOAT32)
            return next(iter(unpacked({}).values()))
    raise AssertionError(module)


def weighted(model):
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "depth"), [("gpt2", {"n_layer": 1}), ("resnet", {})])
def test_float_export_equals_the_model_and_every_weight_has_its_module(family, depth):
    """gpt2 ties its table to its head and holds transposed weights; resnet's are scaled by batch normalization."""
    model = tiny.model(family, **depth)
    exported, modules = export_openvino(model)
    exported.to("cpu", config=FLOAT32)
    inputs = random_inputs(model, 3, 11, pairs=True)
    assert torch.allclose(exported(**inputs).logits, tiny.logits(model, inputs), atol=1e-4)
    assert set(modules.values()) == weighted(model)
    with pytest.raises(SettingError, match="There is nothing to quantize: no MatMul, Convolution"):
        _quantize(exported, modules, sorted(weighted(model)), None)


def test_every_weight_of_an_encoder_has_its_module(bert, fp32):
    assert set(fp32[1].values()) == weighted(bert)


def test_sentence_pairs_come_out_right(bert, fp32):
    exported = fp32[0].to("cpu", config=FLOAT32)
    expected = tiny.logits(bert, PAIRS)
    assert torch.allclose(exported(**PAIRS).logits, expected, atol=1e-5)
    first = {**PAIRS, "token_type_ids": torch.zeros_like(PAIRS["token_type_ids"])}
    assert not torch.allclose(exported(**first).logits, expected, atol=1e-3)


def test_the_float_scheme_is_the_export(bert, shared):
    exported, changed, results = make_openvino_fp32(bert, tiny.tokenizer(), [])
    assert (changed, results) == ([], {"precision": "f32"})
    assert exported.config is not bert.config
    assert torch.allclose(exported(**PAIRS).logits, tiny.logits(bert, PAIRS), atol=1e-5)


def precision(exported):
    return exported.runners["model"].compiled_model.get_property("INFERENCE_PRECISION_HINT")


def test_exports_run_in_float32(int8):
    assert precision(int8[0]) == openvino.Type.f32


def test_from_model_to_folder_and_back(bert, shared, tmp_path):
    rows = Dataset.from_dict({"text": ["a good film", "bad", "the sun is warm"] * 2, "label": [0, 1, 2] * 2})
    settings = {"calibration": rows, "processor": tiny.tokenizer(), "smoothing": False}
    written = quantize(bert, "openvino-int8", output_dir=tmp_path / "small", **settings)
    again, processor = load(tmp_path / "small")
    assert precision(written) == precision(again) == openvino.Type.f32
    assert torch.equal(again(**PAIRS).logits, written(**PAIRS).logits)
    step = report(tmp_path / "small").steps[-1]
    assert step.results["activations"] == "static"
    assert step.results["parity"]["rows"] == 6
    assert step.skipped == {"classifier": "task head"}
    assert evaluate(again, rows, processor=processor).main.examples == 6
    found = profile(again, sequence_length=8, batch_sizes=(1,), repeats=1, processor=processor, memory=False)
    assert found.latency[0].runtime == "openvino"


def test_int8_is_close_to_the_model(bert, int8):
    expected = tiny.logits(bert, PAIRS)
    error = (int8[0](**PAIRS).logits - expected).abs().max()
    assert 0 < error < 0.1 * expected.abs().max()


def test_weights_and_embeddings_are_int8_and_the_head_is_float(int8, fp32):
    exported, changed, results = int8
    kinds = {module: kind for _, module, kind in weight_types(exported.program, fp32[1])}
    assert kinds.pop("classifier") == "f32"
    assert set(kinds.values()) <= {"i8", "u8"}
    assert sorted(kinds) == changed
    assert "bert.embeddings.word_embeddings" in changed
    assert results == {"precision": "f32", "activations": "static", "modules_by_bits": {"8": 6 + 1 + 3}, "samples": 12}
    inputs = [n for n in exported.program.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    assert inputs  # activations are quantized too


def test_int8_weights_lie_within_half_a_step_of_the_float_ones(bert, int8, fp32):
    """Symmetric with 254 or 255 steps per output channel."""
    for name in ("bert.encoder.layer.0.intermediate.dense", "bert.embeddings.word_embeddings"):
        weight = bert.get_submodule(name).weight.detach().numpy()
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(weights(int8[0], fp32[1], name) - weight) <= 0.51 * step)


def test_four_bit_weights_lie_within_half_a_step_of_their_group(bert, int4, fp32):
    exported, changed, results = int4
    assert results == {"precision": "f32", "group_size": 8, "modules_by_bits": {"4": 7, "8": 3}}
    assert "classifier" not in changed
    name = "bert.encoder.layer.0.output.dense"
    weight = bert.get_submodule(name).weight.detach().numpy()
    groups = weight.reshape(16, 3, 8)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    error = np.abs(weights(exported, fp32[1], name).reshape(groups.shape) - groups)
    assert np.all(error <= 1.1 * ((high - low) / 15)[..., None])  # the zero point is rounded as well
    assert error.max() > 0


def test_four_bit_answers_are_close(bert, int4):
    expected = tiny.logits(bert, PAIRS)
    assert 0 < (int4[0](**PAIRS).logits - expected).abs().max() < 0.2 * expected.abs().max()


def test_ratio_leaves_the_most_sensitive_layers_at_eight_bits_and_nothing_is_printed(bert, rows, shared, capfd):
    bits = make_openvino_int4(
        bert, tiny.tokenizer(), ["classifier"], group_size=8, ratio=0.5, calibration=rows, improve=["scale_estimation"]
    )[2]
    assert bits["modules_by_bits"]["8"] > 3
    assert bits["modules_by_bits"]["4"] > 1
    assert bits["samples"] == 12
    assert capfd.readouterr() == ("", "")


def test_folders_reload_to_the_same_answers_and_are_smaller(int8, fp32, tmp_path):
    int8[0].save_pretrained(tmp_path / "int8")
    fp32[0].save_pretrained(tmp_path / "fp32")
    loaded = ExportedModel.from_pretrained(tmp_path / "int8", device="cpu", config=FLOAT32)
    assert torch.equal(loaded(**PAIRS).logits, int8[0](**PAIRS).logits)
    sizes = {name: (tmp_path / name / "openvino_model.bin").stat().st_size for name in ("int8", "fp32")}
    assert sizes["int8"] < 0.6 * sizes["fp32"]  # at this width scales and biases weigh a lot


def test_int8_without_calibration_stores_weights_in_8_bits_and_leaves_activations(bert, fp32, shared):
    exported, changed, results = make_openvino_int8(bert, tiny.tokenizer(), ["classifier"])
    assert results == {"precision": "f32", "activations": "dynamic", "modules_by_bits": {"8": 6 + 1 + 3}}
    assert set(changed) == weighted(bert) - {"classifier"}
    assert not [n for n in exported.program.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    name = "bert.encoder.layer.0.attention.self.query"
    weight = bert.get_submodule(name).weight.detach().numpy()
    step = np.ptp(np.pad(weight, ((0, 0), (0, 1))), axis=1, keepdims=True) / 255
    assert np.all(np.abs(weights(exported, fp32[1], name) - weight) <= 1.1 * step)
    assert torch.allclose(exported(**PAIRS).logits, tiny.logits(bert, PAIRS), atol=0.02)


def test_group_sizes_have_to_divide_gpt2s_transposed_layers_too():
    with pytest.raises(SettingError, match="c_attn has 16, got 5"):
        make_openvino_int4(tiny.model("gpt2"), None, [], group_size=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0}, r"ratio must lie in \(0, 1\], got 0"),
        ({"improve": ["gptq"]}, "gptq of openvino-int4 needs calibration="),
        ({"improve": "awq"}, r"improve must be a list with any of scale_estimation, gptq, awq, got 'awq'"),
        ({"improve": ["hqq"]}, r"got \['hqq'\]"),
        ({"group_size": 5}, r"group_size must divide .*query has 16, got 5"),
        ({"group_size": 0}, "got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bert, settings, words):
    with pytest.raises(SettingError, match=words):
        make_openvino_int4(bert, None, ["classifier"], **settings)
