"""From files to files: nothing lost, shards of the right size, resumed after a kill, errors before work."""

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import tiny
from hfshrink import load
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.streaming import shards
from hfshrink.streaming.shards import Plan, partial_folder, split, to_bytes, write_checkpoint, write_config
from hfshrink.streaming.skeleton import read_skeleton


def negated(source, output_dir, *, size=30_000, settings=(), fail=None, **kwargs):
    """Write all tensors with the other sign; the results that were told at the end."""
    skeleton, told = read_skeleton(source), {}
    sizes = {name: place.size_bytes for name, place in skeleton.places.items()}
    plan = Plan("minus", skeleton, sizes, size, list(settings))

    def finish(folder, results):
        write_config(skeleton.model, folder)
        told.update(results)
        if fail is not None:
            raise fail

    write_checkpoint(plan, output_dir, lambda name, tensor: {skeleton.places[name].key: -tensor}, finish, **kwargs)
    return told


@pytest.fixture
def source(tmp_path):
    tiny.model("bert", hidden_size=64, intermediate_size=64).save_pretrained(
        tmp_path / "source", max_shard_size="100KB"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def equal_to_source(folder, source):
    found, expected = tensors(folder), tensors(source)
    return found.keys() == expected.keys() and all(torch.equal(found[key], -expected[key]) for key in found)


def test_all_tensors_arrive_and_the_index_names_them(source, tmp_path):
    told = negated(source, tmp_path / "out", size=20_000)
    assert equal_to_source(tmp_path / "out", source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    sizes = {name: sum(tensor.nbytes for tensor in parts.values()) for name, parts in files.items()}
    assert max(size for name, size in sizes.items() if len(files[name]) > 1) <= 20_000
    assert index["metadata"]["total_size"] == told["size_bytes"] == told["source_bytes"] == sum(sizes.values())
    assert index["weight_map"] == {key: name for name, parts in files.items() for key in parts}
    assert told["shards"] == len(files)


def test_tokenizer_and_settings_come_along_and_nothing_is_left_behind(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "model.py").write_text("")
    negated(source, tmp_path / "out", size=10**6)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} <= names
    assert not {"model.safetensors.index.json", "pytorch_model.bin", "streaming.json", "model.py"} & names
    assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}
    model, tokenizer = load(tmp_path / "out")
    assert torch.equal(model.classifier.weight, -load(source)[0].classifier.weight)
    assert tokenizer is not None


def test_an_output_inside_the_source_leaves_the_source_as_it_was(source):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    negated(source, source / "small")
    assert equal_to_source(source / "small", source)
    assert before == {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    assert [file.name for file in source.iterdir() if file.is_dir()] == ["small"]


def killed_after(monkeypatch, number, error):
    write, written = shards._write_shard, []

    def one_more(path, parts):
        if len(written) == number:
            raise error
        written.append(path)
        return write(path, parts)

    monkeypatch.setattr(shards, "_write_shard", one_more)


def begin(source, target, monkeypatch, **how):
    with monkeypatch.context() as patch:
        killed_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            negated(source, target, **how)


def test_a_killed_call_goes_on_where_it_stood(source, tmp_path, monkeypatch):
    target, partial = tmp_path / "out", partial_folder(tmp_path / "out")
    negated(source, tmp_path / "whole")
    begin(source, target, monkeypatch)
    assert not target.exists()
    (partial / "model-00003-of-00009.part").write_bytes(b"half")
    first = {file.name: file.stat().st_ino for file in partial.glob("*.safetensors")}
    assert len(first) == 2
    assert negated(source, target)["resumed_shards"] == 2
    assert {name: (target / name).stat().st_ino for name in first} == first
    names = sorted(file.name for file in target.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert all((target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    assert not partial.exists()


def test_settings_are_compared_as_they_are_read_back(source, tmp_path, monkeypatch):
    how = {"settings": [("a", 1), {"b": (2, 3)}, None, 0.1]}
    begin(source, tmp_path / "out", monkeypatch, **how)
    assert negated(source, tmp_path / "out", **how)["resumed_shards"] == 2


def test_a_call_that_fails_at_its_very_end_keeps_its_shards(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        negated(source, tmp_path / "out", fail=KeyboardInterrupt())
    assert not (tmp_path / "out").exists()
    told = negated(source, tmp_path / "out")
    assert told["resumed_shards"] == told["shards"] > 2
    assert equal_to_source(tmp_path / "out", source)


@pytest.mark.parametrize("change", ["size", "settings", "source", "shard"])
def test_what_was_begun_with_other_settings_or_files_is_done_anew(change, source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    begin(source, target, monkeypatch)
    how = {"size": {"size": 31_000}, "settings": {"settings": [0.5]}}.get(change, {})
    if change == "source":
        model = tiny.model("bert", seed=1, hidden_size=64, intermediate_size=64)
        model.save_pretrained(source, max_shard_size="100KB")
    elif change == "shard":
        next(partial_folder(target).glob("*.safetensors")).write_bytes(b"half")
    assert negated(source, target, **how)["resumed_shards"] == (1 if change == "shard" else 0)
    assert equal_to_source(target, source)


@pytest.mark.parametrize("text", ["no json", "[]", '{"key": 1}'])
def test_a_manifest_that_is_not_ours_is_ignored(text, source, tmp_path):
    (tmp_path / ".out.streaming").mkdir()
    (tmp_path / ".out.streaming" / "streaming.json").write_text(text)
    assert negated(source, tmp_path / "out")["resumed_shards"] == 0


def test_no_space_is_told_before_the_start(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(CheckpointError, match=r"minus writes [\d,]+ bytes to .*where 1,000 are free"):
        negated(source, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_a_disk_that_fills_up_is_told_and_what_is_finished_stays(source, tmp_path, monkeypatch):
    import safetensors.torch

    save = safetensors.torch.save_file

    def full(parts, path, metadata):
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(parts, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*the same call goes on from there"):
            negated(source, tmp_path / "out")
    assert negated(source, tmp_path / "out")["resumed_shards"] == 2


def test_a_full_folder_is_replaced_only_when_asked(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="not empty"):
        negated(source, tmp_path / "out")
    negated(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "file").exists()


def test_after_a_value_that_does_not_fit_nothing_is_kept(source, tmp_path):
    skeleton = read_skeleton(source)
    plan = Plan("", skeleton, {name: place.size_bytes for name, place in skeleton.places.items()}, 30_000)

    def convert(name, tensor):
        if name.endswith("layer.1.output.dense.weight"):
            raise SettingError("NaN")
        return {name: tensor.clone()}

    with pytest.raises(SettingError, match="NaN"):
        write_checkpoint(plan, tmp_path / "out", convert, lambda *_: None)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_splitting_keeps_the_order_and_a_large_tensor_stands_alone():
    assert split({"a": 1, "b": 1, "c": 7, "d": 1, "e": 1, "f": 1}, 2) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert split({}, 2) == []


def test_sizes():
    assert (to_bytes("5GB"), to_bytes("500KB"), to_bytes(7)) == (5 * 10**9, 500_000, 7)
    for size in ("5", "GB", 0, -1, True, "0GB", None):
        with pytest.raises(SettingError, match="max_shard_size must be bytes or a size"):
            to_bytes(size)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, _: entry.pop("tensor_bytes"),
        lambda entry, _: entry.update(tensor_bytes="many"),
        lambda entry, _: entry.update(keys=["other"]),
        lambda entry, _: entry.pop("keys"),
        lambda entry, _: entry.update(keys=[1, "a"]),
        lambda entry, file: file.write_bytes(b"x" * entry["file_bytes"]),
    ],
    ids=["no bytes", "bytes of a word", "other keys", "no keys", "keys of two types", "no safetensors"],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_made_again(change, source, tmp_path, monkeypatch):
    begin(source, tmp_path / "out", monkeypatch)
    partial = partial_folder(tmp_path / "out")
    manifest = json.loads((partial / shards.MANIFEST).read_text())
    name = min(manifest["shards"])
    change(manifest["shards"][name], partial / name)
    (partial / shards.MANIFEST).write_text(json.dumps(manifest))
    assert negated(source, tmp_path / "out")["resumed_shards"] < 2
    assert equal_to_source(tmp_path / "out", source)


def test_a_manifest_that_is_nested_too_deeply_is_ignored(source, tmp_path, monkeypatch):
    begin(source, tmp_path / "out", monkeypatch)
    (partial_folder(tmp_path / "out") / shards.MANIFEST).write_text("[" * 10**6)
    assert negated(source, tmp_path / "out")["resumed_shards"] == 0


def test_two_calls_at_once_do_not_mix(source, tmp_path):
    """The second is told, the first goes on; a lock that a killed process left does not count."""
    tmp_path.joinpath(".out.lock").touch()

    def again(_):
        with pytest.raises(CheckpointError, match=r"Another process writes to .*\.out\.streaming now"):
            negated(source, tmp_path / "out")

    skeleton = read_skeleton(source)
    plan = Plan("minus", skeleton, {name: place.size_bytes for name, place in skeleton.places.items()}, 30_000)

    def convert(name, tensor):
        if name == "classifier.bias":
            again(name)
        return {skeleton.places[name].key: -tensor}

    write_checkpoint(plan, tmp_path / "out", convert, lambda folder, _: write_config(skeleton.model, folder))
    assert equal_to_source(tmp_path / "out", source)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}
