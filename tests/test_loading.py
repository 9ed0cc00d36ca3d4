"""`load`: the right Auto class from the architecture, never a guess, and clear errors."""

import json

import pytest
import transformers

import tiny
from hfshrink import load
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.loading import TASKS, infer_task

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


def test_encoder_decoder():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert infer_task(transformers.T5ForConditionalGeneration(config)) == "text2text-generation"


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


def test_no_model_at_all():
    with pytest.raises(SettingError, match="Expected a transformers model.* got list"):
        load([1, 2])
