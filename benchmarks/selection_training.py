"""Subsets of movie reviews for the fine-tuning of all of MiniLM-L6: auto, random rows and the best other method.

At 10 and 30 % of 6,000 rows each subset is trained on for as many epochs as all rows are, and for as many steps. The
other method is the one that does best on the validation rows in the grid of selection.py, which must have been run on
the movie reviews. Every run keeps its result and what it says of every test row in runs/selection/training and is
skipped when it is there. One thread per process: two processes with different `--seeds` use two cores.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import transformers
from common import be_quiet, save
from distillation_data import encoded_texts
from distillation_data import movie as encoded_movie
from distillation_table import paired_difference
from selection_data import RUNS, movie
from selection_table import HEADS, shown

import selection
from distillation import fit, measure
from hfshrink.evaluation.measures import resolve_measures
from hfshrink.terminal import table

KEPT = RUNS / "training"
SEEDS, BATCH, EPOCHS, RATE = 3, 32, 2, 5e-5
SIZES = ("10%", "30%")
METRICS = ("accuracy", "f1", "precision", "recall")
BUDGETS = ("as many epochs", "as many steps")


@cache
def other_of(size):
    """The method besides auto and random that the grid's validation rows prefer."""
    if not selection.is_complete("movie"):
        sys.exit("Run benchmarks/selection.py --only movie first: its validation rows choose the third method.")
    return selection.read("movie").best_other(size)


def arms():
    """(folder, method, size, budget) of all arms, the full data first."""
    found = [("full", "full", "100%", BUDGETS[0])]
    for size in SIZES:
        for method in ("random", "auto", other_of(size)):
            found += [(f"{size}/{method}/{budget}", method, size, budget) for budget in BUDGETS]
    return found


def steps_of(rows, budget):
    """Optimizer steps: those of the full data, or as many epochs of the rows."""
    count = movie().drawn if budget == BUDGETS[1] else rows
    return max(1, round(EPOCHS * count / BATCH))


@cache
def subject_of(seed):
    """A subject of distillation_data.py with the training rows of a seed."""
    data = movie()
    parts = {"train": data.training(seed)[0], "validation": data.rows["validation"], "test": data.rows["test"]}
    rows = {name: encoded_texts(part, 64).rename_column("label", "labels") for name, part in parts.items()}
    return dataclasses.replace(encoded_movie(), rows=rows, metrics=METRICS, batch=BATCH)


def run(folder, method, size, budget, seed):
    """The result of one run, trained if it is not there."""
    path = KEPT / folder / f"seed-{seed}"
    if not (path / "result.json").is_file():
        start, subject = time.process_time(), subject_of(seed)
        count = movie().drawn if method == "full" else selection.sizes_of(movie())[size]
        indices, used, _ = selection.pick("movie", seed, method, count)
        steps = steps_of(len(indices), budget)
        transformers.set_seed(seed)
        model = subject.new_teacher()
        fit(model, subject.rows["train"].select(indices), subject, seed, RATE, steps)
        trained = time.process_time() - start
        measure(model, subject, path, rows=len(indices), used=used, steps=steps, seed=seed, cpu_seconds=trained)
        print(f"{folder} seed {seed}: {trained:.0f} s of CPU", flush=True)
    return json.loads((path / "result.json").read_text())


def render():
    """Write results/selection_training.json and .md of the arms whose seeds are all there."""
    found, lines = {}, []
    measure_of = resolve_measures("accuracy", "single_label")[0]
    everything = arms()
    done = {arm[0]: [KEPT / arm[0] / f"seed-{seed}" for seed in range(SEEDS)] for arm in everything}
    done = {name: paths for name, paths in done.items() if all((path / "result.json").is_file() for path in paths)}
    for folder, method, size, budget in everything:
        if folder not in done:
            continue
        results = [json.loads((path / "result.json").read_text()) for path in done[folder]]
        values = {metric: [result["test"][metric] for result in results] for metric in METRICS}
        intervals = {}
        for other in ("full", f"{size}/random/{budget}"):
            if other in done and other != folder:
                pair = [correct(done[name]) for name in (other, folder)]
                intervals[other] = paired_difference(measure_of, "accuracy", *pair)
        first, seconds = results[0], [result["cpu_seconds"] for result in results]
        found[folder] = {"test": values, "minus": intervals, "cpu_seconds": seconds, "steps": first["steps"]}
        shares = [f"{100 * sum(v) / SEEDS:.1f}" for v in values.values()]
        compared = [shown(intervals[o]) if o in intervals else "" for o in (f"{size}/random/{budget}", "full")]
        name = method if method == first["used"] else f"{method} ({first['used']})"
        cost = f"{sum(seconds) / SEEDS:.0f}"
        lines.append((size, name, budget, f"{first['steps']:,}", *shares, *compared, cost))
    header = ("size", "method", "trained for", "steps", *METRICS, "accuracy − random [95 %]", "− full", "CPU seconds")
    text = (
        f"MiniLM-L6 fine-tuned on {movie().drawn:,} movie reviews or a subset of them, {SEEDS} seeds, batches of "
        f"{BATCH}, {EPOCHS} epochs of all rows; {len(movie().rows['test']):,} test rows. Values are in %; precision, "
        "recall and F1 are macro means. The third method was chosen on the validation rows of selection.py "
        f"({HEADS['logistic']}). Intervals resample seeds and test rows, paired."
    )
    save("selection_training", {"arms": found}, f"{text}\n\n{table(header, lines)}")


def correct(folders):
    """Statistics of every test row, (seeds, rows, k)."""
    return np.stack([np.load(folder / "rows.npz")["accuracy"] for folder in folders])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(SEEDS))
    parser.add_argument("--only", nargs="+", help="folders of arms, such as full or 10%%/random")
    parser.add_argument("--render", action="store_true", help="train nothing: write the table of what is there")
    options = parser.parse_args()
    be_quiet()
    for seed in () if options.render else options.seeds:
        for arm in arms():
            if not options.only or any(arm[0].startswith(name) for name in options.only):
                run(*arm, seed)
    render()


if __name__ == "__main__":
    main()
