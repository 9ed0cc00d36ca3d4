"""The command line: thin, helpful, and one line per error."""

import subprocess
import sys

import pytest
from datasets import Dataset
from typer.testing import CliRunner

import tiny
from hfshrink import load
from hfshrink.cli import app


@pytest.fixture
def teacher(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    Dataset.from_dict({"text": ["a good film", "a bad film"] * 3, "label": [1, 0] * 3}).save_to_disk(tmp_path / "rows")
    return tmp_path / "teacher"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("command", ["quantize", "distill", "cache-teacher", "evaluate", "report"])
def test_help_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example: hfshrink {command} " in done.stdout


def test_quantize_then_evaluate_then_report(teacher, tmp_path):
    done = run("quantize", teacher, tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "onnx-int8" in done.stdout
    assert "accuracy" in run("evaluate", tmp_path / "small", tmp_path / "rows").stdout
    assert "quantize" in run("report", tmp_path / "small").stdout


def test_distill_writes_a_plain_folder(teacher, tmp_path):
    words = ["distill", teacher, tmp_path / "rows", tmp_path / "small", "--num-layers", 1, "--epochs", 1]
    done = run(*words, "--teacher-cache", tmp_path / "answers", "--eval-data", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    assert "make_student" in done.stdout
    assert "distill" in done.stdout
    model, tokenizer = load(tmp_path / "small")
    assert model.config.num_hidden_layers == 1
    assert tokenizer is not None
    assert (tmp_path / "answers" / "cache.json").is_file()


def test_distill_leaves_nothing_behind_when_it_fails(teacher, tmp_path):
    done = run("distill", teacher, tmp_path / "rows", tmp_path / "small")
    assert "Give one of --student and --num-layers" in str(done.exception)
    done = run("distill", teacher, tmp_path / "nowhere", tmp_path / "small", "--num-layers", 1)
    assert "Can't read the data set" in str(done.exception)
    assert not (tmp_path / "small").exists()


def test_cache_teacher_tells_the_bytes_per_row(teacher, tmp_path):
    done = run("cache-teacher", teacher, tmp_path / "rows", tmp_path / "answers")
    assert done.exit_code == 0, done.output
    assert "6 rows" in done.stdout
    assert "per row" in done.stdout


def test_errors_are_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "hfshrink.cli", "report", "./nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
