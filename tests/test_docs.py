"""Snippets and examples run, and generated pages are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent


def snippets(language, page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_snippets(page):
    """Run a page's snippets from top to bottom; their names, and how many there are."""
    shared, blocks = {}, snippets("python", page)
    for block in blocks:
        exec(compile(block, page, "exec"), shared)
    return shared, len(blocks)


@pytest.mark.slow
def test_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """In a folder that holds a small teacher under the name that the README uses."""
    tiny.model("bert", num_hidden_layers=4).save_pretrained(tmp_path / "path/to/teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "path/to/teacher")
    monkeypatch.chdir(tmp_path)
    shared, number = run_snippets("README.md")
    assert number == 8
    assert len(shared["subset"]) == 3
    assert [step.technique for step in shared["report"]("path/to/int8").steps] == [
        "make_student",
        "distill",
        "quantize",
    ]
    assert shared["card"].data.library_name == "onnx"
    assert "McNemar" in capsys.readouterr().out
    shared["test"].save_to_disk("path/to/test-data")
    shared["reviews"].save_to_disk("path/to/rows")
    commands = next(block for block in snippets("bash") if block.startswith("hfshrink")).splitlines()
    for command in commands:
        words = command.split()
        done = subprocess.run(
            [sys.executable, "-m", "hfshrink.cli", *words[1:]], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip()


def test_the_page_on_pruning_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    tiny.model("bert", num_hidden_layers=4).save_pretrained(tmp_path / "path/to/model")
    tiny.tokenizer().save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    shared, number = run_snippets("docs/pruning.md")
    assert number == 7
    sizes = {name: shared[name].num_parameters() for name in ("dense", "model", "thin", "half", "small", "reader")}
    assert all(size < sizes["dense"] for name, size in sizes.items() if name != "dense")
    assert shared["sparse"].num_parameters() == sizes["dense"]
    assert shared["thin"].config.num_hidden_layers == 2
    assert shared["thin"].config.intermediate_size == 12
    assert "prune neurons by magnitude" in capsys.readouterr().out


def test_the_page_on_factorization_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    tiny.model("bert").save_pretrained(tmp_path / "path/to/model")
    tiny.tokenizer().save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    shared, number = run_snippets("docs/factorization.md")
    assert number == 2
    assert shared["up"].shape[1] == 4
    step = shared["report"]("path/to/factored").steps[-1]
    assert (step.technique, step.method) == ("factorize", "activation")
    assert step.after.parameters < step.before.parameters
    assert "bert.encoder.layer.0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_on_quantization_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name, family in (("model", "bert"), ("causal-lm", "llama")):
        tiny.model(family).save_pretrained(tmp_path / "path/to" / name)
        tiny.tokenizer().save_pretrained(tmp_path / "path/to" / name)
    monkeypatch.chdir(tmp_path)
    shared, number = run_snippets("docs/quantization.md")
    assert number == 7
    assert shared["tokens"].shape == (1, 7)
    history = {
        name: shared[name].config.hfshrink["history"][-1] for name in ("exported", "static", "bounded", "model")
    }
    assert [step["method"] for step in history.values()] == ["onnx-int8", "onnx-int8-static", "onnx-int8", "mixed"]
    assert shared["learned"].config.hfshrink["history"][-1]["results"]["ranges_from"] == "training"
    assert (tmp_path / "path/to/int8/model.safetensors").is_file()


@pytest.mark.slow
def test_the_page_on_selection_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    tiny.model("bert").save_pretrained(tmp_path / "path/to/model")
    tiny.tokenizer().save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    shared, number = run_snippets("docs/selection.md")
    assert number == 5
    assert len(shared["subset"]) == len(shared["hardest"]) == 8
    assert len(shared["proof"].arms) == 5
    assert "teacher_logits" in shared["taught"].dataset.column_names
    assert sorted(shared["few"].dataset["label"]) == [0, 0, 1, 1]
    assert "equal steps" in (tmp_path / "path/to/subset/README.md").read_text()
    assert "total variation" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(("name", "shown"), [("pruning", 3), ("factorization", 4), ("dataset_distillation", 10)])
def test_the_example_runs(name, shown):
    """On real weights and rows, of which there must be a copy or a package index."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == shown


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    # bitsandbytes, which peft imports, says which kernels it lacks
    said = [line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line]
    assert (done.returncode, said) == (0, [])


def test_changelog_names_every_public_verb():
    import hfshrink

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    verbs = [name for name in hfshrink.__all__ if name.islower()]
    assert [name for name in verbs if f"`{name}`" not in text and f"`{name}" not in text] == []
