"""Low-rank factorization of SmolLM2-135M: perplexity without any training.

Calibration is 128 × 128 tokens of BBC news; settings were chosen on other BBC news (the column "validation"), and the
perplexity that counts is measured on editorials of the New York Times. Each arm is deterministic, keeps its result in
runs/factorization/language and is skipped when it is there. One thread.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import datasets
import numpy as np
import pruning_language as language
from common import be_quiet, save
from distillation_table import paired_difference

import assets
import hfshrink
from factorization import RUNS as ALL_RUNS
from hfshrink.evaluation.measures import resolve_measures
from hfshrink.terminal import table

RUNS = ALL_RUNS / "language"
CALIBRATION, VALIDATION = (128, 128), (16, 256)
WEIGHTINGS = {
    "plain": {"weighting": "none"},
    "fisher": {"weighting": "fisher"},
    "whitened": {"weighting": "activation"},
}
TITLES = {
    "plain": "plain SVD",
    "fisher": "Fisher",
    "whitened": "whitened",
    "updated": "whitened, inputs updated",
    "budget": "whitened, ranks by budget",
}
ARMS: dict[str, dict[str, Any]] = {"80-updated": {"rank_ratio": 0.8, "weighting": "activation", "update_inputs": True}}
for _percent in (80, 90, 70):
    ARMS |= {f"{_percent}-{name}": {"rank_ratio": _percent / 100, **how} for name, how in WEIGHTINGS.items()}
    ARMS[f"{_percent}-budget"] = {"weighting": "activation", "like": f"{_percent}-whitened"}
"""Arm -> keywords of `factorize`; `like` is the arm whose parameters are the budget."""


def calibration_rows():
    texts = assets.bbc_news()["train"]["text"]
    return [{"input_ids": part} for part in language.tokens(texts, *CALIBRATION).split(8)]


def validation_rows():
    """BBC news behind the calibration rows."""
    rows, length = VALIDATION
    skipped = CALIBRATION[0] * CALIBRATION[1] // length
    ids = language.tokens(assets.bbc_news()["train"]["text"], skipped + rows, length)[skipped:].tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def run(name):
    """The result of an arm, or of "dense", made if it is not there."""
    folder = RUNS / name
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    model, start = language.dense_model(), time.process_time()
    if name != "dense":
        how = dict(ARMS[name])
        like = how.pop("like", None)
        if like is not None:
            how["max_parameters"] = run(like)["parameters"]
        if how["weighting"] != "none":
            how["calibration"] = calibration_rows()
        hfshrink.factorize(model, **how)
    result = {
        "cpu_seconds": round(time.process_time() - start),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    result["validation"] = hfshrink.evaluate(model, validation_rows(), "perplexity").main.value
    found = hfshrink.evaluate(model, language.test_rows(), "perplexity")
    folder.mkdir(parents=True, exist_ok=True)
    statistics = resolve_measures("perplexity", "language")[0].statistics(found.predictions, found.references)
    np.savez_compressed(folder / "rows.npz", perplexity=statistics)
    result["perplexity"] = found.main.value
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {found.main.value:.2f}, {result['cpu_seconds']} CPU s", flush=True)
    return result


def interval(before, after):
    """Perplexity minus that of another arm, with a 95 % interval of resampled rows."""
    measure = resolve_measures("perplexity", "language")[0]
    rows = (np.load(RUNS / arm / "rows.npz")["perplexity"][None] for arm in (before, after))
    return list(paired_difference(measure, "perplexity", *rows))


def render(found):
    lines = []
    for name, result in found.items():
        percent, _, weighting = name.partition("-")
        kept, how = (f"{percent} %", TITLES[weighting]) if name in ARMS else ("100 %", "")
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*result["minus_dense"]) if name in ARMS else ""
        scores = f"{result['validation']:.2f}", f"{result['perplexity']:.2f}"
        ratio = f"{result['perplexity'] / found['dense']['perplexity']:.2f}×"
        lines.append(
            (kept, how, *scores, ratio, change, f"{result['parameters'] / 1e6:.1f} M", str(result["cpu_seconds"]))
        )
    header = ("kept", "factors", "validation", "perplexity", "÷ dense", "− dense [95 %]", "parameters", "CPU s")
    text = (
        f"{table(header, lines)}\n\nSmolLM2-135M, {language.ROWS} × {language.LENGTH} tokens of NYT editorials; "
        f"calibration {CALIBRATION[0]} × {CALIBRATION[1]} tokens of BBC news, validation on other BBC news; no "
        "training. Kept: parameters of the layers' Linears, as asked for; the tied embedding stays. By budget: as "
        "many parameters as whitened with one ratio. Deterministic, one run: intervals resample the rows."
    )
    save("factorization_language", {"arms": found}, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["dense", *ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    options = parser.parse_args()
    be_quiet()
    for name in options.only:
        run(name)
    done = [name for name in names if (RUNS / name / "result.json").is_file()]
    extra = {name: {} if name == "dense" else {"minus_dense": interval("dense", name)} for name in done}
    render({name: {**run(name), **extra[name]} for name in done})


if __name__ == "__main__":
    main()
