"""What the cards of model_cards/ tell of: for each the base, the compressed model, and the rows both are tried on.

Models come from the other benchmarks' runs, and are made there where they are missing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distillation_data
import main_job
import numpy as np
import pruning_oneshot
import quantization_generation as generation
import transformers
from common import ROOT
from pruning_language import dense_model, test_rows

import assets
import factorization
import hfshrink
import quantization
from distillation import RUNS as TAUGHT
from distillation import teacher_of
from hfshrink.digests import digest_of
from hfshrink.selection.partitions import cross, divide_by_label, divide_by_length

RUNS = ROOT / "runs" / "cards"
PROVED = ROOT / "runs" / "dataset_distillation"  # of examples/dataset_distillation.py
KEPT = 0.3  # of the movie reviews


@dataclass(frozen=True)
class Case:
    """A model before and after.

    Attributes:
        base: Its folder; in the runtime of the compressed one, so that their times compare.
        compressed: Folder of the compressed model.
        rows: Test rows, which chose nothing.
        groups: (rows,) name of each row's group.
        tokens: Length of the inputs that are timed.
        batch_size: Rows of a pass of the evaluation.
        repeats: Timed passes.
        used: Name -> rows or texts, of which the record keeps the fingerprint.
    """

    base: Path
    compressed: Path
    rows: Any
    groups: Any = None
    tokens: int = 128
    batch_size: int = 32
    repeats: int = 40
    used: dict[str, Any] = field(default_factory=dict)


def reviews(train):
    """The movie reviews as texts, and the group of each test row."""
    parts = assets.movie_reviews(train=train)
    groups = cross(divide_by_label(parts["test"]), divide_by_length(parts["test"])).row_names()
    return parts, [f"{group} characters" for group in groups]


def distilled():
    folder = ROOT / "runs" / "main_job" / "seed-0"
    main_job.run_seed(0, folder)
    parts, groups = reviews(6000)
    used = {"training rows": parts["train"], "calibration rows": parts["validation"], "test rows": parts["test"]}
    return Case(folder / "teacher-onnx", folder / "int8", parts["test"], groups, used=used)


def pruned():
    pruning_oneshot.run("units-50", "search", 0)
    folder = pruning_oneshot.folder_of("units-50", "search", 0) / "model"
    return _of_teacher(folder, pruning_oneshot.SEARCHED)


def factored():
    arm = factorization.BY_NAME["70-budget"]
    factorization.run(arm, 0.0, 0)
    return _of_teacher(factorization.folder_of(arm, 0.0, 0) / "model", factorization.SAMPLES["movie"])


def _of_teacher(folder, samples):
    """A model made of the movie reviews' teacher, without training."""
    teacher_of(distillation_data.movie, 0)
    parts, groups = reviews(3000)
    used = {"calibration rows": parts["train"].select(range(samples)), "test rows": parts["test"]}
    rows = distillation_data.movie().rows["test"]
    return Case(TAUGHT / "teachers" / "movie" / "seed-0", folder, rows, groups, used=used)


def language():
    """SmolLM2 as a graph with a key-value cache, as floats and as int8."""
    generation.RUNS.mkdir(parents=True, exist_ok=True)
    generation.loaded("onnx-fp32", dense_model())
    folder = RUNS / "smollm2-int8" / "model"
    if not (folder / "config.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
        hfshrink.quantize(dense_model(), "onnx-int8", output_dir=folder, processor=tokenizer, overwrite=True)
    rows = test_rows()
    rows.info.dataset_name = "NYT editorials"
    return Case(generation.RUNS / "onnx-fp32", folder, rows, batch_size=1, repeats=10, used={"test rows": rows})


def vision():
    for variant in ("onnx-fp32", "onnx-int8-static"):
        quantization.run("garments", variant)
    folder, parts = quantization.RUNS / "garments", distillation_data.garments().rows
    names = np.array(assets.GARMENTS)[np.asarray(parts["test"]["labels"])]
    used = {"calibration rows": parts["train"].select(range(quantization.SAMPLES)), "test rows": parts["test"]}
    return Case(folder / "onnx-fp32" / "model", folder / "onnx-int8-static" / "model", parts["test"], names, used=used)


CASES: dict[str, Callable[[], Case]] = {
    "minilm-movie-distilled-int8": distilled,
    "minilm-movie-pruned": pruned,
    "minilm-movie-factored": factored,
    "smollm2-int8": language,
    "resnet-garments-int8": vision,
}


def fingerprints(case):
    """Of the content of the rows, as far as the case uses them."""
    return {name: digest_of(rows.with_format(None).to_dict()) for name, rows in case.used.items()}


def subset_report():
    """The report of the movie reviews worth training on."""
    parts = assets.movie_reviews(train=3000)
    how = {"model": assets.minilm(), "held_out": parts["test"], "cache_dir": PROVED / "embeddings"}
    return hfshrink.select(parts["train"], KEPT, **how).report.to_dict()


def proof_of(report):
    """What training on the same subset came to, where the example has measured it: {"proof": …} or nothing."""
    path = PROVED / "subset" / "report.json"
    known = json.loads(path.read_text()) if path.is_file() else {"details": {}}
    same = all(known.get(name) == report[name] for name in ("method", "used", "rows", "size", "settings", "columns"))
    return {"proof": known["details"]["proof"]} if same and "proof" in known["details"] else {}
