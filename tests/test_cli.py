"""The command line: thin, helpful, and one line per error."""

import subprocess
import sys

import pytest
from datasets import Dataset
from typer.testing import CliRunner

import tiny
from hfshrink.cli import app


@pytest.fixture
def teacher(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    Dataset.from_dict({"text": ["a good film", "a bad film"] * 3, "label": [1, 0] * 3}).save_to_disk(tmp_path / "rows")
    return tmp_path / "teacher"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("command", ["quantize", "evaluate", "report"])
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


def test_errors_are_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "hfshrink.cli", "report", "./nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
