"""The helpers of examples/assets.py, without the network."""

import gzip
import hashlib
import io
import subprocess
import tarfile

import datasets
import numpy as np
import pytest

import assets

CONTENT = b"a package"
KNOWN = assets.Asset("toy==1", "toy-1.whl", hashlib.sha256(CONTENT).hexdigest(), "MIT")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "CACHE", tmp_path)
    return tmp_path


def pretend_download(monkeypatch, content):
    calls = []

    def run(command, check, cwd):
        calls.append(command)
        (assets.Path(cwd) / KNOWN.file).write_bytes(content)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def table(rows):
    return assets._table(rows, {"text": datasets.Value("string"), "label": datasets.Value("int64")}, "toy")


def test_a_package_is_downloaded_once_and_its_licence_printed_each_time(cache, monkeypatch, capsys):
    calls = pretend_download(monkeypatch, CONTENT)
    assert assets.fetch(KNOWN) == assets.fetch(KNOWN) == cache / "toy-1.whl"
    assert len(calls) == 1
    assert capsys.readouterr().out.count("toy==1: MIT") == 2


def test_another_sha256_is_not_used(cache, monkeypatch):
    pretend_download(monkeypatch, b"something else")
    with pytest.raises(SystemExit, match="another sha256"):
        assets.fetch(KNOWN)
    assert not (cache / "toy-1.whl").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("wheel", ["--only-binary", ":all:"]), ("sdist", ["--no-binary", ":all:"]), ("deb", ["apt-get", "download"])],
)
def test_each_kind_of_package_has_its_command(kind, words):
    command = assets._download(assets.Asset("toy==1", "f", "0", "MIT", kind=kind), "folder")
    assert set(words) < set(command)
    assert "toy==1" in command


def test_a_split_takes_every_row_once_and_hides_the_labels_of_the_rest():
    rows = table([{"text": str(i), "label": i} for i in range(10)])
    parts = assets._split(rows, {"test": 4, "validation": 2, "train": 3}, seed=0)
    assert [len(part) for part in parts.values()] == [4, 2, 3, 1]
    assert sorted(text for part in parts.values() for text in part["text"]) == [str(i) for i in range(10)]
    assert parts["unlabelled"].column_names == ["text"]


def test_the_test_rows_do_not_depend_on_the_other_sizes():
    rows = table([{"text": str(i), "label": i} for i in range(10)])
    small, large = (assets._split(rows, {"test": 4, "train": size}, seed=0) for size in (2, 6))
    assert small["test"]["text"] == large["test"]["text"]
    assert "unlabelled" not in large


def test_more_rows_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="There are 1 rows of toy, not 3"):
        assets._split(table([{"text": "a", "label": 0}]), {"test": 3}, seed=0)


def test_images_and_labels_are_read_after_their_headers():
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for part, data in (("images-idx3", bytes(16) + images.tobytes()), ("labels-idx1", bytes(8) + b"\x03\x09")):
            packed = gzip.compress(data)
            member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/train-{part}-ubyte.gz")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        read, labels = assets._idx_files(archive, "train")
    assert (read == images).all()
    assert labels.tolist() == [3, 9]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_texts_of_either_encoding_are_read(encoding):
    assert assets._decoded("£1m".encode(encoding)) == "£1m"
