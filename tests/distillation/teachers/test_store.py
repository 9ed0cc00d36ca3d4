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
DRAWS = 6
SPARSE = {**DENSE, "signal": "sampled", "entries": DRAWS, "parts": {"widths": "U8", "ids": "U16", "counts": "U8"}}
LARGEST = {**SPARSE, "signal": "top_k", "parts": {"widths": "U8", "ids": "U16", "probabilities": "F16"}}


def settings(answers=DENSE, **teacher):
    teacher = {"name": "a", "revision": None, "weights": "w", **teacher}
    return {"hfshrink": "1", "teacher": teacher, "tokenizer": {"class": "T"}, "answers": answers}


def key(number):
    return number.to_bytes(16, "little")


def dense(number, positions=1):
    return {"logits": np.arange(3 * positions, dtype=np.float32).reshape(positions, 3) + 10 * number}


def sparse(number):
    """`number` positions of 1, 2, … entries; the last entry has most of the draws."""
    widths = np.arange(1, number + 1, dtype=np.uint8)
    ids = np.arange(widths.sum(), dtype=np.uint16) % 3
    counts = np.concatenate([[1] * (n - 1) + [DRAWS + 1 - n] for n in range(1, number + 1)]).astype(np.uint8)
    return {"widths": widths, "ids": ids, "counts": counts}


def largest(number):
    row = sparse(number)
    row["probabilities"] = (row.pop("counts") / DRAWS).astype(np.float16)
    return row


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
        (LARGEST, {n: largest(n + 1) for n in range(5)}),
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


def test_leftovers_of_tables_and_manifests_are_swept_away(tmp_path):
    fill(tmp_path, {1: dense(1)})
    (tmp_path / "tables").mkdir()
    left = [tmp_path / ".cache.json.x1y2z3ab", tmp_path / "tables" / ".00ff.arrow.4711"]
    for file in left:
        file.write_bytes(b"half")
    (tmp_path / "tables" / "00ff.arrow").write_bytes(b"whole")
    fill(tmp_path, {})
    assert not any(file.exists() for file in left)
    assert (tmp_path / "tables" / "00ff.arrow").exists()


def test_kill_at_the_first_manifest_is_survived(tmp_path):
    (tmp_path / ".cache.json.x1y2z3ab").write_text("{")
    fill(tmp_path, {1: dense(1)})
    assert {file.name for file in tmp_path.iterdir() if not file.name.startswith("shard")} <= {".lock", "cache.json"}
    assert same(read(tmp_path, 1)[0], dense(1))


def test_open_shard_keeps_numbers_per_row_only(tmp_path):
    """A row of a language model has thousands of positions, and hundreds of shards are open."""
    fill(tmp_path, {n: sparse(6) for n in range(3)}, SPARSE)
    (path,) = shards(tmp_path)
    identity = json.loads((tmp_path / "cache.json").read_text())["identity"]
    arrays = [value for value in vars(room.open_shard(path, identity, SPARSE)).values() if hasattr(value, "shape")]
    assert [len(array) for array in arrays] == [3, 4, 4]


def test_links_are_refused(tmp_path):
    fill(tmp_path / "a", {1: dense(1)})
    (path,) = shards(tmp_path / "a")
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"{path.name} is a link or no file"):
        read(tmp_path / "a", 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{path.name} is a link or no file"):
        read(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".00ff.arrow.4711").write_text("mine")
    (tmp_path / "a" / "tables").symlink_to(tmp_path / "b")
    with pytest.raises(CheckpointError, match="tables is a link"):
        fill(tmp_path / "a", {})
    assert (tmp_path / "b" / ".00ff.arrow.4711").exists()


def test_one_writes_while_the_other_waits(tmp_path, caplog):
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
    assert caplog.text.count("is in use; waiting for the other process") == 1


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
        (SPARSE, lambda t: t["counts"].fill(0), "row 0 holds counts that do not add up to 6 draws"),
        (SPARSE, lambda t: t["counts"].fill(2), "row 0 holds counts that do not add up to 6 draws"),
        (LARGEST, lambda t: t["probabilities"].fill(np.nan), r"row 0 holds probabilities outside 0\.\.1"),
        (LARGEST, lambda t: t["probabilities"].fill(-0.5), r"row 0 holds probabilities outside 0\.\.1"),
        (LARGEST, lambda t: t["probabilities"].fill(1.5), r"row 0 holds probabilities outside 0\.\.1"),
    ],
)
def test_broken_shards_are_named(tmp_path, answers, change, message):
    rows = {1: dense(1), 2: dense(2, positions=2)}
    if answers is SPARSE:
        rows = {1: sparse(1), 2: sparse(2)}
    if answers is LARGEST:
        rows = {1: largest(1), 2: largest(2)}
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
