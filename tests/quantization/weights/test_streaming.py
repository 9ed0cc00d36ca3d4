"""File to file: the same tensors as loading, quantizing and saving; errors before work."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from hfshrink import load
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.quantization.weights import packing
from hfshrink.quantization.weights.bits import load_bits
from hfshrink.quantization.weights.casting import cast_weights
from hfshrink.quantization.weights.streaming import CASTS, stream_weights

WIDE = {
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64},
    "vit": {"hidden_size": 64, "intermediate_size": 128},  # transformers renames its keys while loading and saving
}
SCHEMES = [("int8", True), ("nf4", True), ("nf4", False), ("fp4", True), ("bf16", True), ("fp16", True)]


def needs(scheme):
    if scheme not in CASTS:
        pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def source(tmp_path):
    tiny.model("bert", **WIDE["bert"]).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces for each tensor, as large ones have."""
    monkeypatch.setattr(packing, "PIECE", 2048)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(("scheme", "double"), SCHEMES)
def test_files_equal_those_of_load_quantize_save(family, scheme, double, tmp_path):
    needs(scheme)
    tiny.model(family, **WIDE[family]).save_pretrained(tmp_path / "source", max_shard_size="50KB")
    if scheme in CASTS:
        model, _, _ = cast_weights(load(tmp_path / "source")[0], dtype=CASTS[scheme])
    else:
        model, _, _ = load_bits(tmp_path / "source", scheme, double_quantization=double)
    model.save_pretrained(tmp_path / "memory")
    results = stream_weights(
        tmp_path / "source", tmp_path / "stream", scheme, double_quantization=double, max_shard_size="40KB"
    )
    expected, found = tensors(tmp_path / "memory"), tensors(tmp_path / "stream")
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in found)
    assert config(tmp_path / "stream") == config(tmp_path / "memory")
    assert results["size_bytes"] == sum(tensor.nbytes for tensor in found.values())
    assert results["unused"] == []
    assert results["shards"] == len(list((tmp_path / "stream").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("scheme", ["nf4", "fp16"])
def test_a_checkpoint_in_bf16_is_rounded_as_from_pretrained_does(scheme, tmp_path):
    needs(scheme)
    tiny.model("llama", **WIDE["llama"]).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    settings = config(tmp_path / "source")
    stream_weights(tmp_path / "source", tmp_path / "stream", scheme)
    if scheme == "nf4":
        load_bits(tmp_path / "source", scheme)[0].save_pretrained(tmp_path / "memory")
        expected, found = tensors(tmp_path / "memory"), tensors(tmp_path / "stream")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in found)
    else:
        assert (settings["dtype"], config(tmp_path / "stream")["dtype"]) == ("bfloat16", "float16")


def test_a_cast_that_changes_nothing_raises(tmp_path):
    tiny.model("bert").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    with pytest.raises(SettingError, match="no weights to cast: all are in bf16 already"):
        stream_weights(tmp_path / "source", tmp_path / "stream", "bf16")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_result_loads_in_plain_transformers_and_runs(family, tmp_path):
    needs("nf4")
    model = tiny.model(family, **WIDE[family])
    model.save_pretrained(tmp_path / "source")
    stream_weights(tmp_path / "source", tmp_path / "stream", "nf4")
    plain, info = type(model).from_pretrained(tmp_path / "stream", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tiny.inputs(family)
    expected = tiny.logits(load_bits(tmp_path / "source", "nf4")[0], batch)
    assert torch.equal(tiny.logits(plain, batch), expected)


def test_a_base_model_s_checkpoint_and_legacy_names_are_read(tmp_path):
    """Keys without the base model's prefix, gamma for weight, and keys that the model does not know."""
    model = tiny.model("bert", **WIDE["bert"])
    state = {key.removeprefix("bert."): tensor for key, tensor in model.state_dict().items()}
    state["embeddings.LayerNorm.gamma"] = state.pop("embeddings.LayerNorm.weight")
    state["cls.unknown"] = torch.zeros(1)
    (tmp_path / "source").mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "source")
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    results = stream_weights(tmp_path / "source", tmp_path / "stream", "bf16")
    assert results["unused"] == ["cls.unknown"]
    model.bfloat16()
    plain = type(model).from_pretrained(tmp_path / "stream")
    assert torch.equal(tiny.logits(plain, tiny.inputs("bert")), tiny.logits(model, tiny.inputs("bert")))


def test_exclude_and_heads(source, tmp_path):
    needs("int8")
    results = stream_weights(source, tmp_path / "one", "int8")
    assert results["skipped"] == {"classifier": "task head"}
    results = stream_weights(source, tmp_path / "other", "int8", exclude="*attention*")
    assert results["skipped"]["bert.encoder.layer.0.attention.self.key"] == "excluded"
    assert "classifier" in results["modules"]


def test_no_space_is_told_before_the_start(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(CheckpointError, match=r"bf16 writes [\d,]+ bytes to .*where 1,000 are free"):
        stream_weights(source, tmp_path / "stream", "bf16")
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_output_folder_that_is_full_or_holds_the_source(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="not empty"):
        stream_weights(source, tmp_path / "full", "bf16")
    stream_weights(source, tmp_path / "full", "bf16", overwrite=True)
    assert not (tmp_path / "full" / "file").exists()
    for folder in (source, tmp_path):
        with pytest.raises(SettingError, match="holds the model that is read"):
            stream_weights(source, folder, "bf16", overwrite=True)
    assert (source / "config.json").is_file()


@pytest.mark.parametrize(("scheme", "value"), [("nf4", float("nan")), ("bf16", float("inf")), ("fp16", 65520.0)])
def test_values_that_do_not_fit_are_named(scheme, value, tmp_path):
    needs(scheme)
    model = tiny.model("bert", **WIDE["bert"])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[-1, -1] = value
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(SettingError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight has"):
        stream_weights(tmp_path / "source", tmp_path / "stream", scheme, max_shard_size="30KB")
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_already_quantized_and_wrong_settings(source, tmp_path):
    needs("int8")
    stream_weights(source, tmp_path / "int8", "int8")
    with pytest.raises(UnsupportedModelError, match="quantized by bitsandbytes already"):
        stream_weights(tmp_path / "int8", tmp_path / "stream", "nf4")
    with pytest.raises(SettingError, match=r"Streaming makes int8, .*got 'onnx-int8'"):
        stream_weights(source, tmp_path / "stream", "onnx-int8")
    with pytest.raises(SettingError, match="takes no exclude"):
        stream_weights(source, tmp_path / "stream", "bf16", exclude="classifier")
    with pytest.raises(SettingError, match="max_shard_size must be bytes or a size"):
        stream_weights(source, tmp_path / "stream", "bf16", max_shard_size="5")
    with pytest.raises(CheckpointError, match="no model of that name can be read"):
        stream_weights("nobody/nothing here", tmp_path / "stream", "bf16")


def test_a_tied_weight_stored_under_the_head_s_name_is_found(tmp_path):
    model = tiny.model("llama", **WIDE["llama"])
    model.save_pretrained(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    stream_weights(tmp_path / "source", tmp_path / "stream", "bf16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stream")
    reference, _, _ = cast_weights(model, dtype=torch.bfloat16)
    assert torch.equal(tiny.logits(plain, tiny.inputs("llama")), tiny.logits(reference, tiny.inputs("llama")))
