"""An ONNX export is evaluated, compared and profiled as the model that it came from."""

import copy

import numpy as np
import pytest

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation import compare, evaluate, measure_latencies, profile
from hfshrink.inputs import random_inputs

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    return tiny.model("bert")


@pytest.fixture(scope="module")
def export(model):
    from transformers.exporters import OnnxConfig, OnnxExporter

    source = copy.deepcopy(model)
    return OnnxExporter().export(source, random_inputs(source, 2, 9), OnnxConfig(dynamic=True))


def test_export_equals_torch(model, export, sentences, tokenizer):
    ours, theirs = (evaluate(side, sentences, processor=tokenizer) for side in (model, export))
    assert ours.scores == theirs.scores
    np.testing.assert_allclose(ours.output.confidences, theirs.output.confidences, atol=1e-5)
    found = compare(model, export, sentences, processor=tokenizer)
    assert (found.difference, found.agreement) == (0, 1)


def test_inputs_beyond_the_traced_ones_are_left_out_silently(export, sentences, tokenizer, caplog):
    extra = sentences.map(lambda row: {**tokenizer(row["text"]), "position": 3, "labels": row["label"]})
    assert evaluate(export, extra.remove_columns("label")).main.examples == 40
    assert "Dropping inputs" not in caplog.text


def test_a_traced_input_that_is_missing(export, sentences, tokenizer):
    rows = sentences.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]})
    with pytest.raises(SettingError, match="the data set lacks token_type_ids"):
        evaluate(export, rows)


def test_export_with_several_graphs(export, sentences):
    from transformers.exporters import ExportedModel

    part = export.components["model"]
    double = ExportedModel({"prefill": part, "decode": part}, export.export_format, config=export.config)
    with pytest.raises(UnsupportedModelError, match="graphs prefill, decode"):
        evaluate(double, sentences)


def test_profile_of_an_export(export, tmp_path):
    runners = export.runners
    found = profile(export, sequence_length=8, batch_sizes=(1, 2), repeats=3, memory=False)
    assert export.runners is runners
    assert (found.parameters, found.nonzero_parameters, found.macs, found.memory_bytes) == (None,) * 4
    assert [x.runtime for x in found.latency] == ["onnxruntime"] * 2
    export.save_pretrained(tmp_path / "export")
    files = [file for file in (tmp_path / "export").iterdir() if ".onnx" in file.name]
    assert found.size_bytes == sum(file.stat().st_size for file in files)


def test_memory_of_a_saved_export(export, tmp_path):
    export.save_pretrained(tmp_path / "export")
    found = profile(tmp_path / "export", sequence_length=8, batch_sizes=(1,), repeats=1)
    assert found.peak_memory_bytes >= found.loaded_bytes > 0


def test_torch_and_export_are_timed_in_one_run(model, export):
    found = measure_latencies({"torch": model, "onnx": export}, sequence_length=6, batch_sizes=(1,), repeats=3)
    assert [found[name][0].runtime for name in ("torch", "onnx")] == ["torch", "onnxruntime"]
