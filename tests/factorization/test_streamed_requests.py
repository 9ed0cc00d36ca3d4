"""`factorize` of a named checkpoint into a folder: file to file, with the record that a call in memory writes."""

from __future__ import annotations

import json
import logging

import pytest
from typer.testing import CliRunner

import tiny
from factored import batches
from hfshrink import load, report
from hfshrink.checkpoint import layer_map
from hfshrink.cli import app
from hfshrink.errors import BudgetError, CheckpointError, SettingError, UnsupportedModelError
from hfshrink.factorization import deciding, request
from hfshrink.factorization.run import factorize
from hfshrink.factorization.streamed_ranks import Notes
from hfshrink.factorization.streaming import stream_factors
from hfshrink.streaming.skeleton import read_skeleton

STREAMED = {"shards", "resumed_shards", "source_bytes", "size_bytes", "unused"}
"""Results that a call in memory does not have."""


@pytest.fixture
def source(tmp_path):
    tiny.model("bert", num_labels=3).save_pretrained(tmp_path / "source")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def no_load(monkeypatch):
    monkeypatch.setattr(request, "load", None)


@pytest.mark.parametrize("size", ["rank_ratio", "max_parameters"])
def test_the_record_is_the_one_of_a_call_in_memory(size, source, tmp_path):
    model = load(source)[0]
    value = 0.5 if size == "rank_ratio" else int(0.85 * model.num_parameters())
    how = {size: value, "rank_multiple": 1, "exclude": ["*pooler*"]}
    assert factorize(source, **how, output_dir=tmp_path / "small") == tmp_path / "small"
    factorize(model, **how)
    ours, theirs = report(tmp_path / "small"), report(model)
    step, other = ours.steps[-1], theirs.steps[-1]
    for name in ("technique", "method", "settings", "modules", "skipped", "source", "versions"):
        assert getattr(step, name) == getattr(other, name), name
    assert {name: value for name, value in step.results.items() if name not in STREAMED} == other.results
    assert (ours.base_model, theirs.base_model) == ("source", "source")
    assert (step.before.parameters, step.after.parameters) == (other.before.parameters, other.after.parameters)
    assert step.before.size_bytes == (source / "model.safetensors").stat().st_size
    assert step.after.size_bytes == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert step.seconds > 0
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"source", "small"}


def test_what_needs_the_model_in_memory_gets_it(source, tmp_path):
    factorize(source, 0.5, calibration=batches("bert"), rank_multiple=1, output_dir=tmp_path / "data")
    assert report(tmp_path / "data").steps[-1].method == "activation"
    model = factorize(source, 0.5, form="separable", rank_multiple=1, output_dir=tmp_path / "form")
    assert "shards" not in report(tmp_path / "form").steps[-1].results
    assert layer_map(model)
    again = factorize(tmp_path / "form", 0.9, include="*word_embeddings", rank_multiple=1, output_dir=tmp_path / "two")
    assert len(layer_map(again)) == len(layer_map(model)) + 1
    assert len(report(tmp_path / "two").steps) == 2


def test_a_step_is_added_to_those_that_are_there(source, tmp_path):
    """Dense weights with a history: those of a model that was distilled, say."""
    settings = json.loads((source / "config.json").read_text())
    held = {"format_version": 1, "base_model": "some/base", "history": [{"technique": "distill", "method": "logits"}]}
    (source / "config.json").write_text(json.dumps({**settings, "hfshrink": held}))
    factorize(source, rank=4, output_dir=tmp_path / "small")
    found = report(tmp_path / "small")
    assert (found.base_model, [step.technique for step in found.steps]) == ("some/base", ["distill", "factorize"])
    (source / "config.json").write_text(json.dumps({**settings, "hfshrink": {"format_version": 99, "history": []}}))
    with pytest.raises(CheckpointError, match="format 99"):
        factorize(source, rank=4, output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("no_load")
def test_little_gained_and_much_lost_are_said(source, tmp_path, caplog):
    factorize(source, energy=0.9999, rank_multiple=1, output_dir=tmp_path / "dense")
    assert "all 13 modules stay dense" in caplog.text
    assert report(tmp_path / "dense").steps[-1].modules == []
    assert layer_map(load(tmp_path / "dense")[0]) == {}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        factorize(source, 0.1, rank_multiple=1, output_dir=tmp_path / "thin")
    assert "lose more than half of their energy" in caplog.text


@pytest.mark.parametrize("unit", ["max_parameters", "max_size_bytes"])
def test_a_budget_out_of_reach_names_the_nearest_before_work(unit, source, tmp_path, monkeypatch):
    monkeypatch.setattr(deciding, "decompose", None)
    with pytest.raises(BudgetError, match=f"{unit}=1,000 can't be reached") as ours:
        factorize(source, **{unit: 1000}, output_dir=tmp_path / "small")
    with pytest.raises(BudgetError) as theirs:
        factorize(load(source)[0], **{unit: 1000})
    assert str(ours.value) == str(theirs.value)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_quantized_sources_and_paths_that_are_none(source, tmp_path):
    settings = json.loads((source / "config.json").read_text())
    for held in ({"quant_method": "gptq"}, {"bits": 4}, "gptq"):
        (source / "config.json").write_text(json.dumps({**settings, "quantization_config": held}))
        with pytest.raises(UnsupportedModelError, match="is quantized"):
            factorize(source, 0.5, output_dir=tmp_path / "small")
    with pytest.raises(CheckpointError):
        factorize(tmp_path / "nowhere", 0.5, output_dir=tmp_path / "small")
    with pytest.raises(SettingError, match="holds the model that is read"):
        factorize(source, 0.5, output_dir=source.parent, overwrite=True)


@pytest.mark.usefixtures("no_load")
def test_the_command_line_goes_file_to_file(source, tmp_path):
    done = CliRunner().invoke(app, ["factorize", str(source), str(tmp_path / "small"), "--rank", "4"])
    assert done.exit_code == 0, done.output
    assert "factorize" in done.output
    assert report(tmp_path / "small").steps[-1].results["shards"] == 1


def test_the_output_s_parents_are_made(source, tmp_path):
    stream_factors(source, tmp_path / "a" / "b", energy=0.6)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def test_errors_of_shards_that_were_finished_before_a_kill_are_in_the_record(source, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    how = {"rank_ratio": 0.5, "rank_multiple": 1, "max_shard_size": "2KB"}
    with pytest.raises(KeyboardInterrupt):
        stream_factors(source, tmp_path / "small", **how, record=stop)
    results = stream_factors(source, tmp_path / "small", **how)
    assert results["resumed_shards"] == results["shards"] > 3
    other = stream_factors(source, tmp_path / "whole", **how)
    assert results["relative_errors"] == other["relative_errors"]
    assert all(0 < error < 1 for error in results["relative_errors"].values())


@pytest.mark.parametrize(
    "lines",
    [
        "no json",
        '["tails"',
        '["tails", "bert.pooler.dense", [1.0, NaN]]',
        '["tails", "bert.pooler.dense", "many"]',
        '["tails", {"a": 1}, 1]',
        "[[], []]",
        "\x00\ufffd",
    ],
)
def test_notes_that_are_half_written_or_foreign_do_not_count(lines, source, tmp_path):
    expected = stream_factors(source, tmp_path / "whole", energy=0.6)
    notes = Notes.of(tmp_path / ".small.notes.jsonl", read_skeleton(source))
    notes.path.write_text(json.dumps(notes.key) + "\n" + lines + "\n")
    assert stream_factors(source, tmp_path / "small", energy=0.6)["ranks"] == expected["ranks"]
    notes.path.write_text(lines)
    assert stream_factors(source, tmp_path / "small", energy=0.6, overwrite=True)["ranks"] == expected["ranks"]


def test_notes_of_another_checkpoint_do_not_count(source, tmp_path):
    notes = Notes.of(tmp_path / "notes", read_skeleton(source))
    notes.add("error", "a", [2, 0.5])
    assert Notes.of(tmp_path / "notes", read_skeleton(source)).error("a", 2) == 0.5
    assert str(Notes.of(tmp_path / "notes", read_skeleton(source)).error("a", 3)) == "nan"
    tiny.model("bert", num_labels=4).save_pretrained(source)
    assert Notes.of(tmp_path / "notes", read_skeleton(source)).known == {}
