"""A checkpoint's files: found, named as the model names its tensors, read one at a time."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, MixtralConfig, MixtralForCausalLM

import tiny
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.streaming import sources
from hfshrink.streaming.sources import (
    Place,
    check_outside,
    empty_model,
    find_folder,
    find_tensors,
    fingerprint,
    read_tensors,
    weight_files,
)


@pytest.fixture
def folder(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "bert", max_shard_size="20KB")
    return tmp_path / "bert"


def test_a_hub_id_is_downloaded_without_pickles_subfolders_and_code(folder, monkeypatch):
    asked = {}

    def download(source, **kwargs):
        asked.update(kwargs, source=source)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("some/model") == folder
    assert asked["source"] == "some/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.pt", "*.py", "*"} & set(asked["allow_patterns"])
    assert "*/*" in asked["ignore_patterns"]
    find_folder("some/model", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


@pytest.mark.parametrize("reopen", [0, 10**9])
def test_all_tensors_are_read_once_and_bit_by_bit(folder, reopen, monkeypatch):
    monkeypatch.setattr(sources, "REOPEN_BYTES", reopen)
    places, unused = find_tensors(weight_files(folder), empty_model(folder))
    found = {name: tensor.clone() for name, tensor in read_tensors(places.items())}
    expected = tiny.model("bert").state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not unused


def test_a_base_model_is_read_from_the_checkpoint_of_a_headed_one(folder):
    from hfshrink import load

    base = load(folder, "feature-extraction")[0]
    places, unused = find_tensors(weight_files(folder), empty_model(folder, "feature-extraction"))
    assert list(places) == list(base.state_dict())
    assert sorted(unused) == ["classifier.bias", "classifier.weight"]


def test_sizes_of_safetensors_types():
    for kind, width in {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}.items():
        assert Place(None, "", torch.Size((2, 3)), kind).size_bytes == 6 * width


def test_the_fingerprint_knows_names_sizes_times_and_headers(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    first = fingerprint([file])
    assert fingerprint([file]) == first
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    save_file({"b": torch.zeros(4)}, file)
    os.utime(file, ns=times)
    assert fingerprint([file]) != first
    save_file({"a": torch.zeros(4)}, file)
    os.utime(file, ns=(times[0], times[1] + 1))
    assert fingerprint([file]) != first
    file.write_bytes(b"ab")
    fingerprint([file])


def test_a_file_that_is_cut_while_it_is_read_is_named(folder):
    places, _ = find_tensors(weight_files(folder), empty_model(folder))
    name, place = next(iter(places.items()))
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        list(read_tensors([(name, Place(place.file, "no.such.key", place.shape, place.dtype))]))


def test_an_output_that_is_or_holds_the_source_is_refused(folder, monkeypatch):
    for output in (folder, folder.parent, folder / "inner" / ".."):
        with pytest.raises(SettingError, match="holds the model that is read"):
            check_outside(folder, output)
    check_outside(folder, folder / "inner")
    check_outside(folder, folder.parent / "bert-small")
    monkeypatch.chdir(folder.parent)
    check_outside("gpt2", "gpt2")  # a Hub id lies in the cache, not in a folder of that name


def found_in(folder, task=None):
    return find_tensors(weight_files(folder), empty_model(folder, task))


def test_legacy_names_and_a_base_model_s_names_are_those_of_the_model(tmp_path):
    """Keys without the base model's prefix, gamma for weight, and keys that the model does not know."""
    model = tiny.model("bert")
    state = {key.removeprefix("bert."): tensor for key, tensor in model.state_dict().items()}
    state["embeddings.LayerNorm.gamma"] = state.pop("embeddings.LayerNorm.weight")
    state["cls.unknown"] = torch.zeros(1)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    places, unused = found_in(tmp_path)
    assert list(places) == list(model.state_dict())
    assert places["bert.embeddings.LayerNorm.weight"].key == "embeddings.LayerNorm.gamma"
    assert unused == ["cls.unknown"]


def test_a_tied_weight_stored_under_the_head_s_name_is_found(tmp_path):
    tiny.model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    places, _ = found_in(tmp_path)
    assert places["model.embed_tokens.weight"].key == "lm_head.weight"
    assert "lm_head.weight" not in places


def test_corrupt_files_are_named(folder):
    files = sorted(folder.glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{files[1].name} can't be read; it is half-written or corrupt"):
        found_in(folder)
    files[1].write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        found_in(folder)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {files[1].name}, which is not there"):
        found_in(folder)


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"weight_map": {"a": "../elsewhere.safetensors"}}'])
def test_foreign_indices_are_refused(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        weight_files(folder)


def test_missing_weights_and_other_shapes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "wide")
    settings = BertConfig.from_pretrained(folder)
    settings.vocab_size += 1
    settings.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight of shape \(52, 16\).*\(53, 16\)"):
        found_in(tmp_path / "wide")
    for file in folder.glob("model-*"):
        parts = {key: tensor for key, tensor in load_file(file).items() if "pooler" not in key}
        save_file(parts, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 2 of the weights .*pooler\.dense"):
        found_in(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        found_in(folder)


def test_a_config_that_makes_no_model_is_named(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match="makes no model: .*unheard-of"):
        empty_model(folder)
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": None}))
    with pytest.raises(UnsupportedModelError, match="Give task="):
        empty_model(folder)
    empty_model(folder, "text-classification")


def test_families_whose_tensors_are_rebuilt_while_loading_are_refused(tmp_path):
    """transformers joins Mixtral's experts, one tensor each in the file, into one tensor of the model."""
    mixtral = MixtralConfig(
        vocab_size=20, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    MixtralForCausalLM(mixtral).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"rebuilds .*experts.*compress it in memory"):
        found_in(tmp_path)


def test_names_without_a_model_behind_them():
    with pytest.raises(CheckpointError, match="no model of that name can be read"):
        find_folder("nobody/nothing here")
