"""The snippets of the card run as they stand, for each way in which a model is stored."""

import re

import pytest
import torch

import tiny
from hfshrink import CompressionReport, factorize, make_student, model_card, quantize
from hfshrink.cards.snippets import export_snippets, infer_tier, load_snippet
from hfshrink.measurement import Measurement
from hfshrink.record import StepRecord


def run(folder, monkeypatch, image=False):
    """Run the first snippet of a folder's card in that folder's place; its names."""
    card = model_card(folder).content
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    if image:
        from PIL import Image

        Image.new("RGB", (8, 8)).save("an-image.png")
    assert "path/to/this/model" in code
    exec(code.replace("path/to/this/model", str(folder)), names := {})
    return names


def test_native_models_of_text(tmp_path, monkeypatch):
    student = make_student(tiny.model("bert"), num_layers=1)
    student.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    names = run(tmp_path, monkeypatch)
    assert "hfshrink" not in names
    assert type(names["model"]) is type(student)
    with torch.no_grad():
        assert torch.equal(names["outputs"], student(**tiny.tokenizer()("An example.", return_tensors="pt")).logits)


@pytest.mark.parametrize("task", ["question-answering", "feature-extraction", "fill-mask", "token-classification"])
def test_native_models_of_each_task(task, tmp_path, monkeypatch):
    make_student(tiny.model("bert", task), num_layers=1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert run(tmp_path, monkeypatch)["outputs"].isfinite().all()


def test_native_models_of_images(tmp_path, monkeypatch):
    from transformers import ViTImageProcessor

    make_student(tiny.model("vit"), num_layers=1).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert run(tmp_path, monkeypatch, image=True)["outputs"].isfinite().all()


def test_native_language_models_generate(tmp_path, monkeypatch):
    make_student(tiny.model("llama"), num_layers=1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert isinstance(run(tmp_path, monkeypatch)["outputs"], str)


def test_models_with_a_layer_map_import_hfshrink_first(tmp_path, monkeypatch):
    factorize(tiny.model("bert"), 0.5, rank_multiple=1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    names = run(tmp_path, monkeypatch)
    assert names["hfshrink"].__name__ == "hfshrink"
    assert any(type(module).__name__ == "LowRankLinear" for module in names["model"].modules())


def test_models_of_bitsandbytes(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    quantize(tiny.model("bert", hidden_size=64, intermediate_size=64), "nf4", output_dir=tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    names = run(tmp_path / "small", monkeypatch)
    assert names["model"].config.quantization_config.quant_method == "bitsandbytes"
    assert "accelerate bitsandbytes" in model_card(tmp_path / "small").content


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "package"), [("onnx-int8", "onnxruntime"), ("openvino-int8", "nncf")])
def test_exports_run_in_their_runtime(scheme, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    model = tiny.model("bert")
    tiny.tokenizer().save_pretrained(tmp_path / "processor")
    quantize(model, scheme, output_dir=tmp_path / "small", processor=tiny.tokenizer())
    names = run(tmp_path / "small", monkeypatch)
    assert "torch" not in names
    assert torch.as_tensor(names["outputs"]).isfinite().all()


@pytest.mark.slow
def test_exports_of_language_models_generate(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    quantize(tiny.model("llama"), "onnx-int8", output_dir=tmp_path / "small", processor=tiny.tokenizer())
    assert isinstance(run(tmp_path / "small", monkeypatch)["outputs"], str)


@pytest.mark.slow
def test_exports_of_executorch(tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    quantize(tiny.model("bert"), "executorch-int8", output_dir=tmp_path / "small", processor=tiny.tokenizer())
    assert torch.as_tensor(run(tmp_path / "small", monkeypatch)["outputs"]).isfinite().all()


def step(technique, method="x", before=None, after=None, **settings):
    sides = Measurement(parameters=before), Measurement(parameters=after)
    return StepRecord(technique, method, settings, *sides)


@pytest.mark.parametrize(
    ("steps", "tier"),
    [
        ([], "native"),
        ([step("make_student"), step("distill")], "native"),
        ([step("factorize")], "layer-map"),
        ([step("factorize"), step("to_dense")], "native"),
        ([step("factorize"), step("quantize", "onnx-fp32")], "onnx"),
        ([step("quantize", "executorch-int8")], "executorch"),
        ([step("quantize", "nf4")], "bitsandbytes"),
        ([step("quantize", "mixed")], "layer-map"),
        ([step("quantize", "qat-w8a8")], "native"),
        ([step("prune", before=9, after=9, structure="heads")], "native"),
        ([step("prune", before=9, after=8, structure="heads")], "layer-map"),
        ([step("prune", before=9, after=8, structure="layers")], "native"),
    ],
)
def test_the_tier_follows_the_steps(steps, tier):
    assert infer_tier(CompressionReport(steps=tuple(steps))) == tier


def test_a_recorded_tier_goes_before_a_guess_but_not_before_an_export():
    cut = step("prune", before=9, after=8, structure="heads")
    assert infer_tier(CompressionReport(steps=(cut,), details={"tier": "native"})) == "native"
    assert infer_tier(CompressionReport(steps=(cut,), details={"tier": ["x"]})) == "layer-map"
    export = step("quantize", "onnx-int8")
    assert infer_tier(CompressionReport(steps=(export,), details={"tier": "native"})) == "onnx"


def test_the_repository_stands_in_the_snippet():
    report = CompressionReport("a/b", (step("quantize", "onnx-int8"),), details={"task": "text-generation"})
    code = model_card(report, repo_id="me/small", exports=["onnx/onnx-int8"]).content
    assert 'hfshrink.load("me/small")' in code
    assert 'ExportedModel.from_pretrained("me/small", subfolder="onnx/onnx-int8")' in code
    assert "path/to/this/model" not in code


def test_code_stays_code_whatever_the_folder_is_called():
    for snippet in (*export_snippets("fill-mask", ['x"); import os #\n```']), load_snippet("no task", "native")):
        compile(snippet.code, "snippet", "exec")
        assert "```" not in snippet.code
