"""What is written is found again, by content; what is foreign or broken is named."""

import json
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hfshrink.distillation.teachers import store as room
from hfshrink.distillation.teachers.store import open_store
from hfshrink.errors import CheckpointError

DENSE = {"signal": "full", "entries": None, "seed": None, "classes": 3, "parts": {"logits": "F32"}}
SPARSE = {**DENSE, "signal": "sampled", "parts": {"widths": "U8", "ids": "U16", "counts": "U8"}}


def settings(answers=DENSE, **teacher):
    teacher = {"name": "a", "revision": None, "weights": "w", **teacher}
    return {"hfshrink": "1", "teacher": teacher, "tokenizer": {"class": "T"}, "answers": answers}


def key(number):
    return number.to_bytes(16, "little")


def dense(number, positions=1):
    return {"logits": np.arange(3 * positions, dtype=np.float32).reshape(positions, 3) + 10 * number}


def sparse(number):
    """`number` positions of 1, 2, … entries."""
    widths = np.arange(1, number + 1, dtype=np.uint8)
    ids = np.arange(widths.sum(), dtype=np.uint16) % 3
    return {"widths": widths, "ids": ids, "counts": np.full(len(ids), number, np.uint8)}


def fill(folder, rows, answers=DENSE):
    with open_store(folder, settings(answers)) as store:
        for number, row in rows.items():
            store.add(key(number), row)


def read(folder, number, answers=DENSE):
    with open_store(folder, settings(answers)) as store:
        store.find([key(number)])
        return store.read([key(number)])


def interrupted(folder):
    with open_store(folder, settings()) as store:
        store.add(key(1), dense(1))
        raise KeyboardInterrupt


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("answers", "rows"),
    [
        (DENSE, {n: dense(n, positions=n + 1) for n in range(5)}),
        (SPARSE, {n: sparse(n + 1) for n in range(5)}),
    ],
)
def test_rows_are_read_back_in_any_order(tmp_path, answers, rows, monkeypatch):
    monkeypatch.setattr(room, "SHARD_BYTES", 40)  # several shards
    fill(tmp_path, rows, answers)
    assert len(shards(tmp_path)) > 1
    with open_store(tmp_path, settings(answers)) as store:
        wanted = [3, 0, 4, 3, 1]
        assert store.find(map(key, [*wanted, 99])) == {key(n) for n in wanted}
        assert all(same(row, rows[n]) for n, row in zip(wanted, store.read(list(map(key, wanted))), strict=True))


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SHARD_BYTES", 1)
    monkeypatch.setattr(room, "OPEN_SHARDS", 2)
    fill(tmp_path, {n: dense(n) for n in range(6)})
    assert len(shards(tmp_path)) == 6
    with open_store(tmp_path, settings()) as store:
        store.find(map(key, range(6)))
        assert [row["logits"][0, 0] for row in store.read(list(map(key, range(6))))] == [0, 10, 20, 30, 40, 50]
        assert len(store._open) == 2


def test_finished_rows_survive_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    with open_store(tmp_path, settings()) as store:
        assert store.find([key(1), key(2)]) == {key(1)}


def test_a_killed_writers_half_is_swept_away(tmp_path):
    fill(tmp_path, {1: dense(1)})
    half = tmp_path / ".shard-00.safetensors"
    half.write_bytes(b"half")
    with open_store(tmp_path, settings()) as store:
        assert store.find([key(1)])
    assert not half.exists()


def test_one_writes_while_the_other_waits(tmp_path):
    inside, order = threading.Event(), []

    def second():
        inside.wait()
        with open_store(tmp_path, settings()) as store:
            order.append(store.find([key(1)]))

    thread = threading.Thread(target=second)
    thread.start()
    with open_store(tmp_path, settings()) as store:
        inside.set()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        store.add(key(1), dense(1))
        order.append("first is done")
    thread.join(timeout=5)
    assert order == ["first is done", {key(1)}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["teacher"].update(weights="v"), "teacher.weights is 'w' there, 'v' here"),
        (lambda s: s["tokenizer"].update({"class": "U"}), "tokenizer.class is 'T' there, 'U' here"),
        (
            lambda s: s.update(answers=SPARSE),
            "answers.parts.counts is None there, 'U8' here.*answers.signal is 'full'",
        ),
        (lambda s: s["teacher"].update(weights="v", name="b"), "the teacher is 'a' there, 'b' here"),
    ],
)
def test_other_settings_are_named_on_both_sides(tmp_path, change, message):
    fill(tmp_path, {1: dense(1)})
    other = json.loads(json.dumps(settings()))
    change(other)
    with pytest.raises(CheckpointError, match=message), open_store(tmp_path, other):
        pass


def test_names_and_versions_do_not_matter(tmp_path):
    fill(tmp_path, {1: dense(1)})
    other = {**settings(name="moved", revision="abc"), "hfshrink": "2", "tokenizer": None}
    with open_store(tmp_path, other) as store:
        assert store.find([key(1)])


def rewrite(path, change):
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def first_id(tensors, value):
    tensors["ids"][0] = value


@pytest.mark.parametrize(
    ("answers", "change", "message"),
    [
        (DENSE, lambda t: t.pop("lengths"), "it holds keys U8, logits F32, expected keys U8, lengths I32, "),
        (DENSE, lambda t: t.update(logits=t["logits"].astype(np.float16)), "it holds .* logits F16"),
        (DENSE, lambda t: t.update(logits=t["logits"][:, :2].copy()), "shapes do not fit"),
        (DENSE, lambda t: t.update(keys=t["keys"][:1].copy()), "shapes do not fit"),
        (DENSE, lambda t: t.update(lengths=t["lengths"] + 1), "rows have 5 positions, logits 3"),
        (DENSE, lambda t: t.update(lengths=np.array([-1, 4], np.int32)), "length is negative"),
        (DENSE, lambda t: t["logits"].fill(np.nan), "row 0 holds NaN"),
        (SPARSE, lambda t: t.update(widths=t["widths"] + np.uint8(1)), "positions have 7 entries, ids 4"),
        (SPARSE, lambda t: t.update(counts=t["counts"][:1].copy()), "shapes do not fit"),
        (SPARSE, lambda t: first_id(t, 3), r"row 0 holds ids outside 0\.\.2"),
    ],
)
def test_broken_shards_are_named(tmp_path, answers, change, message):
    rows = {1: sparse(1), 2: sparse(2)} if answers is SPARSE else {1: dense(1), 2: dense(2, positions=2)}
    fill(tmp_path, rows, answers)
    (path,) = shards(tmp_path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated or corrupt: .*{message}"):
        read(tmp_path, 1, answers)


def test_truncated_shard_is_named(tmp_path):
    fill(tmp_path, {1: dense(1)})
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with (
        pytest.raises(CheckpointError, match=f"{path.name} is truncated or corrupt.*Delete it"),
        open_store(tmp_path, settings()) as store,
    ):
        store.find([key(1)])


def test_shard_of_another_cache_is_named(tmp_path):
    fill(tmp_path / "one", {1: dense(1)})
    fill(tmp_path / "two", {2: dense(2)})
    (path,) = shards(tmp_path / "one")
    path.rename(tmp_path / "two" / path.name)
    with (
        pytest.raises(CheckpointError, match=f"{path.name} belongs to another cache"),
        open_store(tmp_path / "two", settings()) as store,
    ):
        store.find([key(1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON"),
        ("[" * 100_000, "can't be read as JSON"),
        ("[]", "format_version None; this hfshrink reads 1"),
        ('{"format_version": 2}', "format_version 2; this hfshrink reads 1"),
        ('{"format_version": 1}', "has no identity"),
    ],
)
def test_broken_manifests_are_named(tmp_path, text, message):
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"cache.json .*{message}"), open_store(tmp_path, settings()):
        pass


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"no cache.json but thesis.txt"), open_store(tmp_path, settings()):
        pass
    with pytest.raises(CheckpointError, match="is a file"), open_store(tmp_path / "thesis.txt", settings()):
        pass
    assert {file.name for file in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}


def test_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(CheckpointError, match="Can't write .* No space left"):
        fill(tmp_path, {1: dense(1)})
    assert not list(tmp_path.glob("*shard*"))
