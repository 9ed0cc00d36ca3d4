"""README's snippets run, and generated pages are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent


def snippets(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """In a folder that holds a small teacher under the name that the README uses."""
    tiny.model("bert", num_hidden_layers=4).save_pretrained(tmp_path / "path/to/teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "path/to/teacher")
    monkeypatch.chdir(tmp_path)
    shared = {}
    blocks = snippets("python")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), shared)
    assert len(blocks) == 5
    assert [step.technique for step in shared["report"]("path/to/int8").steps] == [
        "make_student",
        "distill",
        "quantize",
    ]
    assert shared["card"].data.library_name == "onnx"
    assert "McNemar" in capsys.readouterr().out
    shared["test"].save_to_disk("path/to/test-data")
    commands = next(block for block in snippets("bash") if block.startswith("hfshrink")).splitlines()
    for command in commands:
        words = command.split()
        done = subprocess.run(
            [sys.executable, "-m", "hfshrink.cli", *words[1:]], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip()


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_changelog_names_every_public_verb():
    import hfshrink

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    verbs = [name for name in hfshrink.__all__ if name.islower()]
    assert [name for name in verbs if f"`{name}`" not in text and f"`{name}" not in text] == []
