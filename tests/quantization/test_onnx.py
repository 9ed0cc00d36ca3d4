"""`quantize`: the export equals the model, int8 is close to it, heads stay float, folders reload."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.exporters import ExportedModel

import tiny
from hfshrink import quantize, report
from hfshrink.errors import CheckpointError, MissingDependencyError, SettingError, UnsupportedModelError
from hfshrink.quantization.graphs.dynamic import quantize_dynamic
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.parity import check_parity


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert", num_labels=3)


@pytest.fixture(scope="module")
def int8(bert):
    return quantize(bert, "onnx-int8", processor=tiny.tokenizer())


@pytest.fixture(scope="module")
def fp32(bert):
    return quantize(bert, "onnx-fp32", processor=tiny.tokenizer())


PAIRS = tiny.tokenizer()(
    ["a good film", "the very long boring movie was not good", "bad"],
    ["not bad", "a dull plot", "the sun is warm and the story is short"],
    padding=True,
    return_tensors="pt",
)


def initializers(exported):
    graph = exported.program.graph
    return {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama", "vit", "resnet"])
def test_float_export_equals_the_model(family):
    model = tiny.model(family)
    parity = report(quantize(model, "onnx-fp32")).steps[-1].results["parity"]
    assert parity["max_difference"] < 1e-4
    assert parity["agreement"] == 1.0


def test_sentence_pairs_come_out_right(bert, fp32):
    """A tokenizer input that is not traced would be dropped: the second sentence would become part of the first."""
    expected = tiny.logits(bert, PAIRS)
    assert torch.allclose(fp32(**PAIRS).logits, expected, atol=1e-5)
    first = {**PAIRS, "token_type_ids": torch.zeros_like(PAIRS["token_type_ids"])}
    assert not torch.allclose(fp32(**first).logits, expected, atol=1e-3)


def test_int8_is_close_to_the_model(bert, int8):
    expected = tiny.logits(bert, PAIRS)
    error = (int8(**PAIRS).logits - expected).abs().max()
    assert 0 < error < 0.1 * expected.abs().max()


def test_weights_and_embeddings_are_int8_and_the_head_is_float(int8):
    kinds = {name: value.numpy().dtype for name, value in initializers(int8).items() if value.numpy().size >= 64}
    words = [name for name in kinds if "word_embeddings" in name]
    assert words
    assert all(kinds[name] in (np.int8, np.uint8) for name in words)
    ops = [node.op_type for node in int8.program.graph]
    assert ops.count("MatMulInteger") == 2 * 6 + 1  # q, k, v, o, up, down of two layers, and the pooler
    assert {node.op_type for node in int8.program.graph if "classifier" in str(node.metadata_props)} <= {
        "Gemm",
        "MatMul",
        "Add",
    }
    assert any(
        value.numpy().dtype == np.float32 and value.numpy().size == 3 * 16 for value in initializers(int8).values()
    )


def test_record_says_what_was_done(bert, int8):
    step = report(int8).steps[-1]
    assert (step.technique, step.method) == ("quantize", "onnx-int8")
    assert step.skipped == {"classifier": "task head"}
    assert "bert.encoder.layer.1.output.dense" in step.modules
    assert "bert.embeddings.word_embeddings" in step.modules
    assert step.results["parity"]["inputs"] == "seeded random inputs"
    assert step.before.parameters == step.after.parameters == sum(p.numel() for p in bert.parameters())


def test_model_is_left_as_it_was(bert, int8):
    assert not hasattr(bert.config, "hfshrink")
    assert int8.config is not bert.config


def test_per_channel_scales_follow_the_weights():
    """The int8 weight times its scale is the float weight, within half a step per output channel."""
    model = tiny.model("bert", num_hidden_layers=1)
    exported = quantize(model, "onnx-int8")
    found = {name: value.numpy() for name, value in initializers(exported).items()}
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach().numpy().T  # (in, out)
    close = []
    for name, codes in found.items():
        if codes.dtype == np.int8 and codes.shape == weight.shape:
            scale = found[name.replace("_quantized", "_scale")]
            close.append((np.abs(codes * scale - weight) <= 0.5001 * scale).all())
            assert scale.shape == (weight.shape[1],)
    assert any(close)


def test_exclude_keeps_modules_in_float(bert):
    step = report(quantize(bert, "onnx-int8", exclude=["*.layer.0.*", "*embeddings"])).steps[-1]
    assert not any(".layer.0." in name or name.endswith("embeddings") for name in step.modules)
    assert "classifier" in step.modules
    assert step.skipped["bert.encoder.layer.0.output.dense"] == "excluded"
    assert step.settings["exclude"] == ["*.layer.0.*", "*embeddings"]


def test_exclude_nothing_takes_the_head_too(bert):
    assert "classifier" in report(quantize(bert, "onnx-int8", exclude=())).steps[-1].modules


def test_folder_to_folder(bert, tmp_path):
    bert.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    exported = quantize(tmp_path / "model", "onnx-int8", output_dir=tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "export.json", "tokenizer.json"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]
    again = ExportedModel.from_pretrained(tmp_path / "small")
    assert torch.equal(again(**PAIRS).logits, exported(**PAIRS).logits)
    step = report(tmp_path / "small").steps[-1]
    files = [tmp_path / "small" / "model.onnx", tmp_path / "small" / "model.onnx.data"]
    assert step.after.size_bytes == sum(path.stat().st_size for path in files)
    assert step.before.size_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size


def test_graph_is_named_as_transformers_names_it(fp32):
    graph = fp32.program.graph
    assert {value.name for value in graph.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert [value.name for value in graph.outputs] == ["logits"]


def test_calibration_rows_are_used_and_named(bert):
    rows = Dataset.from_dict({"text": ["a good film", "bad", "the sun is warm"], "label": [0, 1, 2]})
    exported = quantize(bert, "onnx-int8", processor=tiny.tokenizer(), calibration=rows)
    parity = report(exported).steps[-1].results["parity"]
    assert (parity["inputs"], parity["rows"]) == ("calibration rows", 3)


def test_parity_finds_a_wrong_export(bert, fp32):
    other = tiny.model("bert", num_labels=3, seed=5)
    parity = check_parity(other, fp32, tiny.tokenizer(), "text-classification")
    assert parity["max_difference"] > 0.1
    assert parity["agreement"] < 1.0


def test_reduced_range_has_seven_bits(bert):
    exported, _ = quantize_dynamic(export_float(bert), reduce_range=True)
    codes = [v.numpy() for v in initializers(exported).values() if v.numpy().dtype == np.int8 and v.numpy().ndim == 2]
    assert codes
    assert max(np.abs(c.astype(int)).max() for c in codes) <= 64


def test_history_is_carried_along(bert, tmp_path):
    from hfshrink import make_student

    student = make_student(bert, num_layers=1)
    found = report(quantize(student, "onnx-int8", output_dir=tmp_path / "small"))
    assert [step.technique for step in found.steps] == ["make_student", "quantize"]
    assert found.details["task"] == "text-classification"


def test_compressed_layers_export(bert):
    from hfshrink.checkpoint import set_layers
    from hfshrink.layers import LowRankLinear

    model = tiny.model("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    dense = model.get_submodule(name)
    u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    set_layers(model, {name: LowRankLinear.from_dense(dense, u[:, :8] * s[:8], v[:8])})
    exported = quantize(model, "onnx-fp32")
    assert report(exported).steps[-1].results["parity"]["max_difference"] < 1e-4
    assert not hasattr(exported.config, "quantization_config")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scheme": "int3"}, "scheme must be one of auto, .*onnx-int8.*, got 'int3'"),
        ({"scheme": "onnx-int8", "exclude": "nothing.*"}, r"wildcard 'nothing\.\*' matches none of"),
        ({"scheme": "onnx-int8", "exclude": "*"}, "There is nothing to quantize"),
    ],
)
def test_bad_settings(bert, kwargs, message):
    with pytest.raises(SettingError, match=message):
        quantize(bert, **kwargs)


def test_convolutional_networks_need_another_scheme():
    with pytest.raises(SettingError, match="nothing to quantize.*convolutional networks need a static scheme"):
        quantize(tiny.model("resnet"), "onnx-int8")


def test_nan_weights_are_found(tmp_path):
    model = tiny.model("bert")
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(SettingError, match="PyTorch model's outputs hold NaN or infinity"):
        quantize(model, "onnx-int8", output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exports_are_not_quantized_again(int8):
    with pytest.raises(UnsupportedModelError, match="is an export already"):
        quantize(int8, "onnx-int8")


def test_full_folder_is_not_touched(bert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="out .*overwrite=True"):
        quantize(bert, "onnx-int8", output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_missing_runtime_names_the_extra(bert, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"'onnxruntime'.*pip install 'hfshrink\[onnx\]'"):
        quantize(bert, "onnx-int8")


def test_manifest_is_plain_json(bert, tmp_path):
    quantize(bert, "onnx-fp32", output_dir=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["export_format"] == "onnx"


def test_source_is_never_replaced(bert, tmp_path):
    bert.save_pretrained(tmp_path / "all" / "model")
    for target in (tmp_path / "all" / "model", tmp_path / "all"):
        with pytest.raises(SettingError, match="holds the model that is read"):
            quantize(tmp_path / "all" / "model", "onnx-int8", output_dir=target, overwrite=True)
    assert (tmp_path / "all" / "model" / "model.safetensors").is_file()


def test_half_precision_folders_are_read_as_float32(bert, tmp_path):
    tiny.model("bert").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert report(quantize(tmp_path / "model", "onnx-int8")).steps[-1].modules
    with pytest.raises(SettingError, match=r"model is in torch.bfloat16; .* model.float\(\)"):
        quantize(tiny.model("bert").to(torch.bfloat16), "onnx-int8")


@pytest.mark.parametrize("output", ["start_logits", "end_logits"])
def test_parity_looks_at_every_row_and_output_of_question_answering(output):
    model = tiny.model("bert", "question-answering")
    exported = export_float(model)
    assert check_parity(model, exported, None, "question-answering")["agreement"] == 1.0

    class Wrong:
        components, device = exported.components, exported.device

        def __call__(self, **inputs):
            outputs = exported(**inputs)
            outputs[output] = -outputs[output]
            return outputs

    parity = check_parity(model, Wrong(), None, "question-answering")
    assert parity["agreement"] < 0.7
    assert parity["max_difference"] > 0.1


def test_parity_of_as_many_labels_as_tokens():
    """Logits (batch, 16) of rows of 16 tokens are classes, not positions."""
    model = tiny.model("bert", num_labels=16)
    parity = check_parity(model, export_float(model), None, "text-classification")
    assert (parity["agreement"], parity["rows"]) == (1.0, 1 + 2 + 3)


def test_calibration_without_an_input_of_the_graph(fp32, bert):
    with pytest.raises(SettingError, match="lacks .*token_type_ids"):
        check_parity(bert, fp32, None, "text-classification", [{"input_ids": torch.tensor([[5, 6]])}])


def test_record_names_files_without_their_path(bert, tmp_path):
    data = {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]], "token_type_ids": [[0, 0, 1]]}
    Dataset.from_dict(data).save_to_disk(tmp_path / "rows")
    step = report(quantize(bert, "onnx-fp32", calibration=str(tmp_path / "rows"))).steps[-1]
    assert step.settings["calibration"] == "rows"
    assert str(tmp_path) not in json.dumps(step.settings)
