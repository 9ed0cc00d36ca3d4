"""The command line: thin, helpful, and one line per error."""

import subprocess
import sys

import pytest
from datasets import Dataset
from typer.testing import CliRunner

import tiny
from hfshrink import load, report
from hfshrink.cli import app, main
from hfshrink.pruning.units.groups import find_units
from hfshrink.pruning.units.weights import prunable


@pytest.fixture
def teacher(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    Dataset.from_dict({"text": ["a good film", "a bad film"] * 3, "label": [1, 0] * 3}).save_to_disk(tmp_path / "rows")
    return tmp_path / "teacher"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "command", ["quantize", "distill", "cache-teacher", "prune", "sensitivity", "evaluate", "report"]
)
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


def test_quantize_takes_options_of_the_scheme(teacher, tmp_path):
    words = ["quantize", teacher, tmp_path / "small", "--scheme"]
    done = run(*words, "nf4", "--option", "double_quantisation=false")
    assert "Did you mean double_quantization" in str(done.exception)
    assert "--option takes name=value" in str(run(*words, "nf4", "--option", "group_size").exception)
    done = run(*words, "int8", "--option", 'max_shard_size="4KB"')
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1


def test_quantize_says_why_auto_chose(teacher, tmp_path):
    assert "auto took onnx-int8" in run("quantize", teacher, tmp_path / "small").stdout


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


def test_prune_cuts_by_search_and_saves_the_tokenizer(teacher, tmp_path):
    words = ["prune", teacher, tmp_path / "small", "--sparsity", 0.4, "--structure", "heads+neurons"]
    done = run(*words, "--calibration", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    assert "search" in done.stdout
    model, tokenizer = load(tmp_path / "small")
    assert tokenizer("a good film")["input_ids"] == tiny.tokenizer()("a good film")["input_ids"]
    assert model.num_parameters() < tiny.model("bert").num_parameters()
    assert run(*words).exit_code == 1  # not empty
    assert run(*words, "--overwrite", "--cost", "macs", "--calibration", tmp_path / "rows").exit_code == 0


def test_prune_leaves_zeros_where_asked_to(teacher, tmp_path):
    words = ["prune", teacher, tmp_path / "small", "--sparsity", 0.5, "--structure", "neurons"]
    done = run(*words, "--method", "random", "--seed", 1, "--scope", "module", "--zeros-only")
    assert done.exit_code == 0, done.output
    assert "neither the file nor the latency" in report(tmp_path / "small").steps[-1].results["note"]
    model, _ = load(tmp_path / "small")
    assert (model.bert.encoder.layer[0].output.dense.weight == 0).all(dim=0).sum() == 12


def test_prune_trims_the_vocabulary_and_saves_the_trimmed_tokenizer(teacher, tmp_path):
    done = run("prune", teacher, tmp_path / "small", "--structure", "vocabulary", "--calibration", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    assert "trim_vocabulary" in done.stdout
    model, tokenizer = load(tmp_path / "small")
    assert sorted(tokenizer.get_vocab()) == sorted([*tiny.SPECIAL, "a", "bad", "film", "good"])
    assert model.config.vocab_size == 9


def test_prune_drops_layers(teacher, tmp_path):
    done = run("prune", teacher, tmp_path / "small", "--sparsity", 0.5, "--structure", "layers")
    assert done.exit_code == 0, done.output
    model, _ = load(tmp_path / "small")
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == 1


def test_prune_takes_a_pattern_without_a_sparsity(teacher, tmp_path):
    done = run("prune", teacher, tmp_path / "small", "--structure", "2:4")
    assert done.exit_code == 0, done.output
    model, _ = load(tmp_path / "small")
    for name, module in prunable(model).items():
        assert ((module.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all(), name


def test_prune_saves_latency_where_asked_to(teacher, tmp_path):
    wide = tiny.model("bert", hidden_size=128, intermediate_size=512)  # latency follows width only where there is some
    wide.save_pretrained(teacher)
    words = ["prune", teacher, tmp_path / "small", "--sparsity", 0.3, "--structure", "heads+neurons"]
    done = run(*words, "--cost", "latency", "--calibration", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    results = report(tmp_path / "small").steps[-1].results
    assert results["latency_ms_after"] <= 0.7 * results["latency_ms_before"] * 1.001
    model, _ = load(tmp_path / "small")
    assert {group.units for group in find_units(model, "heads+neurons")} != {4, 512}
    assert model.num_parameters() < wide.num_parameters()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", 50], "For 50 percent give 0.5"),
        (["--sparsity", 0.5, "--method", "wanda"], "needs data"),
        (["--sparsity", 0.5, "--calibration", "./nowhere"], "Can't read the data set"),
        (["--structure", "vocabulary"], "takes the texts in --calibration"),
        (["--structure", "vocabulary", "--calibration", "rows", "--zeros-only"], "got --zeros-only"),
    ],
)
def test_prune_leaves_nothing_behind_when_it_fails(teacher, tmp_path, words, message):
    before = sorted(tmp_path.iterdir())
    done = run("prune", teacher, tmp_path / "small", *words)
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert sorted(tmp_path.iterdir()) == before


def test_sensitivity_prints_the_table_and_plots(teacher, tmp_path):
    words = ["sensitivity", teacher, tmp_path / "rows", "--structure", "neurons", "--samples", 4]
    done = run(*words, "--plot", tmp_path / "rises.png")
    assert done.exit_code == 0, done.output
    assert "prune neurons by magnitude, 4 examples" in done.stdout
    assert "bert.encoder.layer.1.neurons" in done.stdout
    assert (tmp_path / "rises.png").read_bytes().startswith(b"\x89PNG")


def test_sensitivity_of_quantization(teacher, tmp_path):
    words = ["sensitivity", teacher, tmp_path / "rows", "--split", "train", "--samples", 4, "--scheme", "nf4"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "bert.encoder.layer.0.output.dense" in done.stdout
    assert "Give one of --structure" in str(run(*words, "--structure", "heads").exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "rises.gif"], "ending in .png or .svg"),
        (["--plot", "nowhere/rises.png"], "folder that exists"),
        (["--method", "taylor"], "method must be one of magnitude, random"),
    ],
)
def test_sensitivity_tells_what_is_wrong_before_it_measures(teacher, tmp_path, words, message):
    done = run("sensitivity", teacher, tmp_path / "rows", *words)
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert not done.stdout


def test_errors_are_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "hfshrink.cli", "report", "./nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_errors_speak_of_options_not_of_keywords(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hfshrink", "prune", str(teacher), str(teacher), "--sparsity", "0.5"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "pass --overwrite to replace it" in said
    assert "overwrite=" not in said
