"""`load`: the right Auto class from the architecture, never a guess, and clear errors."""

import json
import shutil

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

import tiny
from hfshrink import load
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.loading import TASKS, infer_task
from hub.client import work_on
from hub.server import running_hub

CASES = [
    ("bert", "text-classification", "BertForSequenceClassification"),
    ("bert", "token-classification", "BertForTokenClassification"),
    ("bert", "question-answering", "BertForQuestionAnswering"),
    ("bert", "fill-mask", "BertForMaskedLM"),
    ("bert", "feature-extraction", "BertModel"),
    ("llama", "text-generation", "LlamaForCausalLM"),
    ("gpt2", "text-generation", "GPT2LMHeadModel"),
    ("vit", "image-classification", "ViTForImageClassification"),
    ("resnet", "image-classification", "ResNetForImageClassification"),
]
SEQ2SEQ = {
    "T5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    "Bart": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    },
}


@pytest.mark.parametrize(("family", "task", "name"), CASES)
def test_folder_loads_in_its_own_class(family, task, name, tmp_path):
    model = tiny.model(family, task)
    model.save_pretrained(tmp_path)
    loaded, processor = load(tmp_path)
    assert type(loaded).__name__ == name
    assert not loaded.training
    assert processor is None
    assert infer_task(loaded) == infer_task(loaded.config) == infer_task(model) == task


@pytest.mark.parametrize("labels", [1, 3])
def test_number_of_labels_and_problem_type_survive(labels, tmp_path):
    tiny.model("bert", num_labels=labels, problem_type="multi_label_classification").save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert (loaded.config.num_labels, loaded.config.problem_type) == (labels, "multi_label_classification")


@pytest.mark.parametrize("family", list(SEQ2SEQ))
def test_encoder_decoder(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(vocab_size=20, **SEQ2SEQ[family])
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert type(loaded) is type(model)
    assert infer_task(loaded) == "text2text-generation"


def test_class_of_ones_own_is_asked_from_optimum(monkeypatch):
    from optimum.exporters.tasks import TasksManager

    class Mine(transformers.BertModel):
        pass

    monkeypatch.setattr(TasksManager, "infer_task_from_model", lambda model: "fill-mask")
    assert infer_task(Mine(tiny.model("bert").config)) == "fill-mask"


def test_tokenizer_comes_along(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert load(model)[0] is model
    assert load(model)[1].get_vocab() == tokenizer.get_vocab()


def test_image_processor_comes_along(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    tiny.model("vit").save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert load(tmp_path)[1].size["height"] == 8


def without_architectures(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_task_is_never_guessed(tmp_path):
    folder = without_architectures(tmp_path)
    with pytest.raises(UnsupportedModelError, match="names no architecture, so its task is unknown. Give task="):
        load(folder)
    assert type(load(folder, task="text-classification")[0]).__name__ == "BertForSequenceClassification"


def test_architecture_without_a_task_asks_for_it():
    model = transformers.BertForPreTraining(tiny.model("bert").config)
    with pytest.raises(UnsupportedModelError, match="BertForPreTraining fits no task that hfshrink knows. Give task="):
        infer_task(model)
    assert infer_task(model, "fill-mask") == "fill-mask"


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(SettingError, match="task must be one of text-classification, .* got 'sentiment'"):
        load("anything", task="sentiment")
    assert len(TASKS) == 8


def test_mismatched_sizes_are_never_ignored(tmp_path):
    with pytest.raises(SettingError, match="ignore_mismatched_sizes=True re-initializes"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_missing_folder():
    with pytest.raises(CheckpointError, match=r"There is no folder \./nowhere"):
        load("./nowhere")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file. Give the folder"):
        load(tmp_path / "model.safetensors")


def test_hub_id_without_network():
    with pytest.raises(CheckpointError, match="(?s)Can't load 'nobody/nothing': .*Check the name and the network"):
        load("nobody/nothing")


def test_folder_without_model(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(CheckpointError, match="is no model: it has no config.json"):
        load(tmp_path)


def test_config_without_weights(tmp_path):
    tiny.model("bert").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has a config.json but no weights"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    tiny.model("bert").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(CheckpointError, match="holds pickled weights only"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.weight", "classifier.weight"])
def test_missing_weights_are_never_filled_at_random(name, tmp_path):
    """Also what a checkpoint with parametrized weights looks like: `weight.original` instead of `weight`."""
    from safetensors.torch import load_file, save_file

    tiny.model("bert").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[f"{name}.original"] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 of its weights \\({name}, …\\), which would be random"):
        load(tmp_path)


def test_new_head_is_random_and_says_so(tmp_path, caplog):
    tiny.model("bert", "feature-extraction").save_pretrained(tmp_path)
    load(tmp_path, task="text-classification")
    assert "classifier.bias, classifier.weight are random until they are trained" in caplog.text


def test_pooler_that_a_masked_language_model_lacks_is_a_part_of_the_new_head(tmp_path, caplog):
    tiny.model("bert", "fill-mask").save_pretrained(tmp_path)
    model, _ = load(tmp_path, task="text-classification")
    assert model.bert.pooler is not None
    assert "bert.pooler.dense.weight, classifier.bias, classifier.weight are random until" in caplog.text


def test_weights_that_do_not_fit_their_config(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match="Can't load"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    with pytest.raises(CheckpointError, match="Can't load"):
        load(tmp_path)


def test_truncated_weights(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        load(tmp_path)


def test_half_written_export(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "export.json").write_text('{"export_format": "onnx", "components": {"model": {"file": "model.onnx"}}}')
    with pytest.raises(CheckpointError, match="export in .* half-written or corrupt"):
        load(tmp_path)


@pytest.fixture(scope="module")
def saved_export(tmp_path_factory):
    """A graph by hand: x -> Identity -> last_hidden_state."""
    onnx_ir = pytest.importorskip("onnx_ir")
    from transformers.exporters import ExportedComponent, ExportedModel
    from transformers.exporters.metadata import ExportMetadata

    kind = {"type": onnx_ir.TensorType(onnx_ir.DataType.INT64), "shape": onnx_ir.Shape(["rows", "tokens"])}
    taken = onnx_ir.Value(name="input_ids", **kind)
    weight = onnx_ir.Value(name="weight", const_value=onnx_ir.tensor([[1, 2, 3, 4] * 100], name="weight"))
    node = onnx_ir.node("Add", [taken, weight])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "last", kind["type"], kind["shape"]
    graph = onnx_ir.Graph([taken], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18})
    spec = pytree.treespec_dumps(pytree.tree_structure({"last_hidden_state": 0}))
    metadata = ExportMetadata(kwargs={"input_ids": {}}, out_spec=spec)
    parts = {"model": ExportedComponent(onnx_ir.Model(graph, ir_version=10), metadata)}
    folder = tmp_path_factory.mktemp("export")
    ExportedModel(parts, "onnx", tiny.model("bert").config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "export.json"])
def test_corrupt_files_of_an_export_are_named(file, saved_export, tmp_path):
    """protobuf, ONNX Runtime and json raise errors of their own."""
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(saved_export, tmp_path / "export")
    assert load(folder)[0].config.model_type == "bert"
    (folder / file).write_bytes(b"[]")
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        load(folder)


def test_keywords_of_a_model_are_refused_by_an_export(saved_export):
    with pytest.raises(SettingError, match="can't be loaded with these keywords: Unknown kwargs .'dtype'"):
        load(saved_export, dtype="float16")


def test_no_model_at_all():
    with pytest.raises(SettingError, match="Expected a transformers model.* got list"):
        load([1, 2])


def test_an_export_on_the_hub_loads_by_its_id(saved_export, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, close_session

    with running_hub(tmp_path / "hub") as hub:
        work_on(hub, monkeypatch, tmp_path / "home")
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("tester/alone")
        api.upload_folder(repo_id="tester/alone", folder_path=saved_export)
        api.upload_folder(repo_id="tester/alone", folder_path=saved_export, path_in_repo="onnx/int8")
        here = load(saved_export)[0]
        there, inside = (load("tester/alone", **where)[0] for where in ({}, {"subfolder": "onnx/int8"}))
        close_session()
    inputs = {"input_ids": torch.arange(400)[None]}
    for exported in (there, inside):
        assert type(exported) is type(here)
        assert torch.equal(exported(**inputs)["last_hidden_state"], here(**inputs)["last_hidden_state"])
