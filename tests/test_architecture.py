"""The plan of the house: who may import whom, the public names, and how light the import is."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hfshrink

ROOT = Path(hfshrink.__file__).parent
GROUND = {"errors", "terminal", "measurement", "record", "saving", "modules", "loading", "labels", "data", "blocks"}
GROUND |= {"generation", "mixins", "inputs", "histograms", "calibration", "layers", "checkpoint", "sensitivity"}
GROUND |= {"layerwise", "streaming", "digests"}
TECHNIQUES = {"distillation", "factorization", "pruning", "quantization", "selection"}
MAY_IMPORT = {
    "errors": set(),
    "terminal": set(),
    "measurement": {"terminal"},
    "saving": {"errors"},
    "record": {"errors", "measurement", "saving", "terminal"},
    "modules": {"errors", "measurement", "record"},
    "blocks": {"errors", "modules"},
    "layers": {"errors"},
    "generation": {"errors"},
    "loading": {"errors", "generation", "modules", "record", "saving"},
    "labels": {"errors", "record"},
    "digests": {"errors"},
    "inputs": {"errors", "modules", "record"},
    "data": {"errors", "labels", "modules", "record", "terminal"},
    "mixins": {"data", "errors", "hub", "loading"},
    "histograms": {"errors"},
    "calibration": {"data", "errors", "histograms", "loading", "modules", "record"},
    "checkpoint": {"errors", "layers", "loading", "measurement", "modules", "record", "saving"},
    "sensitivity": {"calibration", "data", "errors", "inputs", "labels", "loading", "modules", "record", "terminal"},
    "layerwise": {"calibration", "data", "errors", "labels", "loading", "modules"},
    "streaming": {"errors", "loading", "record", "saving"},
    "evaluation": GROUND - {"blocks", "calibration", "layers", "checkpoint", "sensitivity", "layerwise", "streaming"},
    "distillation": GROUND | {"evaluation"},
    "pruning": GROUND | {"evaluation"},
    "quantization": GROUND | {"evaluation"},
    "factorization": GROUND | {"evaluation"},
    "selection": GROUND | {"evaluation"},
    "trainer": GROUND | {"distillation", "pruning", "quantization"},
    "proof": GROUND | {"distillation", "evaluation", "selection"},
    "taught": GROUND | {"distillation", "selection"},
    "cards": {"errors", "loading", "measurement", "record", "saving", "terminal"},
    "hub": {"cards", "checkpoint", "errors", "loading", "measurement", "record", "saving", "terminal"},
    "cli": GROUND | TECHNIQUES | {"cards", "evaluation", "hub", "proof", "taught"},
    "__init__": {"checkpoint"},
}
"""room -> the rooms that it may import; techniques never import each other."""


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfshrink"):
            names = [node.module] if node.module != "hfshrink" else [f"hfshrink.{alias.name}" for alias in node.names]
            yield from (name.split(".")[1] for name in names if "." in name)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hfshrink."))


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms_import_only_what_lies_below(file):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert set(imports_of(file)) - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_small(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    if file.name == "__init__.py" and file.parent != ROOT:
        assert text.count("\n") <= 40
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 40, node.name


def test_public_names():
    assert hfshrink.__all__ == [
        "AttentionLoss",
        "CompressionReport",
        "CompressionTrainer",
        "CrossTokenizerLoss",
        "DataMapCallback",
        "DecoupledLoss",
        "DeepToShallowLoss",
        "DistillationMixin",
        "DistillationTrainer",
        "FeatureMapLoss",
        "HfshrinkError",
        "HiddenLoss",
        "LogitLoss",
        "OnPolicy",
        "Pruning",
        "PruningMixin",
        "PruningTrainer",
        "QAT",
        "QATMixin",
        "QATTrainer",
        "RelationLoss",
        "Subset",
        "add_soft_labels",
        "augment",
        "cache_teacher",
        "compare",
        "dataset_card",
        "distill",
        "evaluate",
        "evaluate_subset",
        "factorize",
        "filter_by_teacher",
        "generate_texts",
        "load",
        "load_soft_labels",
        "make_student",
        "measure_sensitivity",
        "model_card",
        "mutate_texts",
        "profile",
        "prune",
        "push_to_hub",
        "quantize",
        "report",
        "save_soft_labels",
        "select",
        "synthesize",
        "to_dense",
        "trim_vocabulary",
    ]
    assert all(callable(getattr(hfshrink, name)) for name in hfshrink.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'shrink_everything'"):
        hfshrink.shrink_everything  # noqa: B018


def test_no_public_name_is_a_submodules_name():
    modules = {name.rpartition(".")[2] for _, name, _ in pkgutil.walk_packages([str(ROOT)], "hfshrink.")}
    public = set(hfshrink.__all__)
    for room in (
        "cards",
        "distillation",
        "evaluation",
        "factorization",
        "hub",
        "layers",
        "proof",
        "pruning",
        "quantization",
        "selection",
    ):
        public |= set(import_module(f"hfshrink.{room}").__all__)
    assert not modules & public


@pytest.mark.parametrize("name", hfshrink.__all__)
def test_public_names_are_documented(name):
    assert len((getattr(hfshrink, name).__doc__ or "").strip()) > 40


def test_pickle_is_nowhere():
    for file in ROOT.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            a.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names
        }
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}


@pytest.mark.slow
def test_import_is_lean():
    """`import hfshrink` costs little more than the registration that it needs, and pulls in no optional package."""
    code = (
        "import sys, time; import {before}; "
        "start = time.process_time(); import {after}; took = time.process_time() - start;"
        "heavy = [m for m in ('datasets', 'evaluate', 'onnx', 'onnxruntime', 'bitsandbytes', 'sklearn', 'scipy', "
        "'optuna','matplotlib', 'pandas', 'typer', 'jinja2', 'optimum', 'transformers.trainer') if m in sys.modules];"
        "print(took, heavy)"
    )
    needed = "transformers.quantizers.auto"

    def run(before, after):
        done = subprocess.run(
            [sys.executable, "-c", code.format(before=before, after=after)], capture_output=True, text=True, check=True
        )
        took, _, heavy = done.stdout.strip().partition(" ")
        return float(took), heavy

    bare, before_us = run("sys", needed)
    extra, with_us = run(needed, "hfshrink")
    assert extra <= 0.15 * bare
    assert with_us == before_us
