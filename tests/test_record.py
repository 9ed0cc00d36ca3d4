"""The record: it survives JSON, configs and foreign hands."""

import json

import pytest

import tiny
from hfshrink import CompressionReport, report
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.measurement import Latency, Measurement, Score
from hfshrink.record import StepRecord, append_step, comparison_table, model_name
from hfshrink.terminal import table


def full_report():
    latency = Latency(1.5, 2.0, 1.4, "onnxruntime", "some processor", 1, 1, 128, 30)
    score = Score("accuracy", 0.84, 0.82, 0.86, "reviews", "test", 2000, 0)
    before = Measurement(parameters=10, nonzero_parameters=9, size_bytes=40_000_000, scores=(score,))
    after = Measurement(parameters=5, size_bytes=10_000_000, latency=(latency,), scores=(score,))
    step = StepRecord(
        "quantize", "onnx-int8", {"exclude": ["a"]}, before, after, ["x.y"], {"head": "task head"}, seconds=1.0
    )
    return CompressionReport("some/model", (step,), before, after, {"task": "text-classification"})


def test_json_round_trip_keeps_everything():
    made = full_report()
    assert CompressionReport.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_config_round_trip_keeps_everything(tmp_path):
    model = tiny.model("bert")
    full_report().attach(model)
    model.save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert report(again) == report(tmp_path / "two") == full_report()


def test_saving_into_a_folder_changes_nothing_else(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    full_report().save(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("hfshrink") == full_report().to_dict()
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_untouched_model_has_an_empty_report():
    assert report(tiny.model("bert")) == CompressionReport()
    assert str(report(tiny.model("bert"))).startswith("base model: unknown")


def test_steps_are_added_and_stale_measurements_dropped():
    model = tiny.model("bert")
    full_report().attach(model)
    append_step(model, StepRecord("distill", "logits"))
    found = report(model)
    assert [step.technique for step in found.steps] == ["quantize", "distill"]
    assert found.compressed == Measurement()
    assert found.base == full_report().base


def test_what_was_not_measured_is_not_zero():
    written = Measurement(parameters=0).rows()
    assert written == [("parameters", "0", "computed")]
    assert Measurement().rows() == []
    assert comparison_table(CompressionReport("a")) == ""
    text = comparison_table(CompressionReport("a", base=Measurement(size_bytes=1_000_000)))
    assert "| size_bytes | 1.0 MB | not measured | measured |" in text


def test_numbers_that_json_lacks_become_undefined():
    made = CompressionReport("a", compressed=Measurement(scores=(Score("pearson", float("nan")),)))
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert str(CompressionReport.from_dict(json.loads(text)).compressed.scores[0]) == "undefined"


def test_merging_keeps_what_the_other_lacks():
    one, two = Measurement(parameters=1, size_bytes=2), Measurement(size_bytes=3)
    assert one.merged(two) == Measurement(parameters=1, size_bytes=3)


def test_paths_stay_out_of_the_record(tmp_path):
    model = tiny.model("bert")
    model.save_pretrained(tmp_path / "my-model")
    again = type(model).from_pretrained(tmp_path / "my-model")
    assert model_name(again) == "my-model"
    again.config._name_or_path = "org/name"
    assert model_name(again) == "org/name"


def test_table_escapes_and_aligns():
    assert table(("a", "b"), [("x|y", "1\n2")]) == "| a    | b   |\n|------|-----|\n| x\\|y | 1 2 |"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "Expected a record with a list 'history', got list"),
        ({"history": 3}, "Expected a record with a list 'history'"),
        ({"history": [], "format_version": 99}, "record has format 99, this hfshrink reads 1"),
        ({"history": [{}] * 2000, "format_version": 1}, "claims 2000 steps"),
        ({"history": [{"technique": "prune"}], "format_version": 1}, "names no technique and method"),
        ({"history": [{"technique": 1}], "format_version": 1}, "technique='1', which is no technique"),
        ({"history": [], "format_version": 1, "base": {"parameters": "many"}}, "parameters='many', which is no param"),
        ({"history": [], "format_version": 1, "base": {"scores": 3}}, "scores='3', which is no scores"),
        ({"history": ["x"], "format_version": 1}, "Expected a StepRecord as a JSON object, got str"),
        ({"history": [], "format_version": 1, "base": 3}, "Expected a Measurement as a JSON object, got int"),
        ({"history": [], "format_version": 1, "base": {"latency": [{"cpu_ms": 1}]}}, "measurement is incomplete"),
    ],
)
def test_foreign_records_are_refused(data, message):
    with pytest.raises(CheckpointError, match=message):
        CompressionReport.from_dict(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "half-written or corrupt"), ("[]", "holds a list, expected a JSON object")],
)
def test_broken_folders_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        report(tmp_path)


def test_unknown_hub_id_without_network():
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no folder, and no model of that name can be read"):
        report("nobody/nothing")


def test_no_model():
    with pytest.raises(SettingError, match="Expected a transformers model, an export, a folder or a Hub id, got int"):
        report(3)
