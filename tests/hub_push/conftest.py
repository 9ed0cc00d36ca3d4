"""A Hub for each test, and this process made to believe that it is the real one."""

import dataclasses
import json

import pytest
from huggingface_hub import HfApi, close_session

import tiny
from hfshrink.measurement import Measurement, Score
from hfshrink.record import StepRecord, append_step, report
from hub.client import work_on
from hub.server import running_hub


@pytest.fixture
def waits(monkeypatch):
    """What would have been waited for, in seconds."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    """A fresh Hub that huggingface_hub and transformers of this process talk to."""
    with running_hub(tmp_path / "hub") as hub:
        work_on(hub, monkeypatch, tmp_path / "home")
        yield hub
        close_session()


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def with_record(model, *, base=None, technique="prune", method="magnitude", **settings):
    """The model with one step and one score in its record."""
    step = StepRecord(technique, method, settings, after=Measurement(parameters=8), seconds=1.0)
    append_step(model, step, base_model=base, task="text-classification")
    score = Score("accuracy", 0.9, 0.8, 0.95, "org/rows", "test", 100)
    dataclasses.replace(report(model), compressed=Measurement(parameters=8, scores=(score,))).attach(model)
    return model


def write_export(folder, *, model_type="bert", text=b"graph", **config):
    """A folder that looks like an ONNX export with a record; no runtime can read its graph."""
    folder.mkdir(parents=True)
    made = with_record(tiny.model("bert", num_labels=2), technique="quantize", method="onnx-int8")
    made.config.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "model_type": model_type, **config}))
    (folder / "model.onnx").write_bytes(text)
    (folder / "model.onnx.data").write_bytes(b"weights")
    manifest = {"schema_version": 1, "export_format": "onnx", "components": {"model": {"file": "model.onnx"}}}
    (folder / "export.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def model():
    return with_record(tiny.model("bert", num_labels=2))


@pytest.fixture
def folder(model, tmp_path):
    """A saved model with its tokenizer."""
    model.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def log(hub, repo_id="tester/small", revision="main", kind="models"):
    """Messages of the commits, the newest first, without the one that the Hub makes itself."""
    return hub.git(repo_id, "log", "--format=%s", revision, kind=kind).splitlines()[:-1]


def files(hub, repo_id="tester/small", revision="main", kind="models"):
    """Names of all files but the Hub's own."""
    names = hub.git(repo_id, "ls-tree", "-r", "--name-only", revision, kind=kind).splitlines()
    return set(names) - {".gitattributes"}
