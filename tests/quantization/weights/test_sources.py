"""A checkpoint's files: found, named as the model names its tensors, read one at a time."""

import os

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import tiny
from hfshrink.errors import CheckpointError
from hfshrink.quantization.weights import sources
from hfshrink.quantization.weights.bits import empty_model
from hfshrink.quantization.weights.sources import (
    Place,
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
