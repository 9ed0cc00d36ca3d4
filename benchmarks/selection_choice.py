"""How `"auto"` was chosen at a tenth and at 30 % of the rows: candidates, fine-tuned, and judged by no test row.

MiniLM-L6 on subsets of the movie reviews, as in selection_training.py, but with draws of other seeds. The rows that
judge are the validation rows and those of the pool that a seed did not draw. Every run keeps which rows it got right
in runs/selection/choice and is skipped when it is there. One thread per process.
"""

import argparse
import dataclasses
import os

os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import numpy as np
import transformers
from common import be_quiet, save
from distillation_data import encoded_texts
from distillation_data import movie as encoded_movie
from selection_data import RUNS, movie
from selection_training import BATCH, EPOCHS, RATE

import hfshrink
import selection
from distillation import fit
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.coresets import herding, kmeans_subset
from hfshrink.selection.strata import ccs
from hfshrink.terminal import table

KEPT = RUNS / "choice"
WAYS = {
    "random": (0, "random"),
    "ccs": (None, "ccs"),
    "drop5": (0.05, "random"),
    "drop10": (0.1, "random"),
    "drop20": (0.2, "random"),
    "drop30": (0.3, "random"),
    "herding": (0, "herding"),
    "drop10-herding": (0.1, "herding"),
    "drop10-kmeans": (0.1, "kmeans"),
}
"""Candidate -> (share of each class's hardest rows, by EL2N, that leaves first; what picks among the others)."""
COUNTS = {
    0.3: dict.fromkeys(WAYS, 2) | {"random": 5, "ccs": 5, "drop5": 5},
    0.1: {"random": 2, "ccs": 2, "drop5": 1, "drop30": 1},
}
"""Share kept -> candidate -> seeds; the first runs told which were worth more."""
FIRST_SEED = 10  # none of the seeds of selection_training.py


def pick(way, size, seed):
    """Row numbers among the training rows of a seed."""
    _, vectors, labels = movie().training(seed)
    cutoff, method = WAYS[way]
    scores = selection.probes_of("movie", seed)[0].el2n if cutoff != 0 else np.zeros(len(labels))
    if method == "ccs":
        return ccs(scores, size, labels=labels, seed=seed)
    left = np.arange(len(labels))
    for label in np.unique(labels) if cutoff else ():
        rows = np.flatnonzero(labels == label)
        left = np.setdiff1d(left, rows[np.argsort(-scores[rows])[: int(cutoff * len(rows))]])
    picked = {
        "random": lambda: random_subset(len(left), size, seed, labels[left]),
        "herding": lambda: herding(vectors[left], size, labels=labels[left], seed=seed),
        "kmeans": lambda: kmeans_subset(vectors[left], size, labels=labels[left], seed=seed),
    }[method]()
    return left[picked]


def path_of(fraction, way, seed):
    return KEPT / f"{fraction}-{way}-{seed}.npy"


def run(fraction, way, seed):
    """Booleans (rows,): which of the judging rows a trained model got right."""
    path = path_of(fraction, way, seed)
    if not path.is_file():
        data = movie()
        indices = pick(way, round(fraction * data.drawn), seed)
        drawn = np.random.default_rng([seed, 7]).permutation(len(data.rows["pool"]))
        unseen = data.rows["pool"].select(drawn[data.drawn :])
        parts = {
            "train": data.training(seed)[0].select(indices),
            "judging": datasets.concatenate_datasets([data.rows["validation"], unseen]),
        }
        rows = {name: encoded_texts(part, 64).rename_column("label", "labels") for name, part in parts.items()}
        subject = dataclasses.replace(encoded_movie(), rows=rows, batch=BATCH)
        transformers.set_seed(seed)
        model = subject.new_teacher()
        fit(model, rows["train"], subject, seed, RATE, round(EPOCHS * len(indices) / BATCH))
        found = hfshrink.evaluate(model, rows["judging"], ["accuracy"])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.asarray(found.predictions) == np.asarray(found.references))
        print(f"{fraction:.0%} {way} seed {seed}: {100 * np.load(path).mean():.1f} %", flush=True)
    return np.load(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="train nothing: write the table of what is there")
    options = parser.parse_args()
    be_quiet()
    found, lines = {}, []
    for fraction, counts in COUNTS.items():
        for way, count in counts.items():
            seeds = range(FIRST_SEED, FIRST_SEED + count)
            paths = [path_of(fraction, way, seed) for seed in seeds]
            if options.render and not all(path.is_file() for path in paths):
                continue
            accuracy = [100 * float(run(fraction, way, seed).mean()) for seed in seeds]
            found[f"{fraction:.0%}/{way}"] = accuracy
            cutoff, method = WAYS[way]
            leave = "by its own rule" if cutoff is None else f"{cutoff:.0%}" if cutoff else ""
            drawn = found[f"{fraction:.0%}/random"][:count]  # the same seeds
            each = ", ".join(f"{one - other:+.1f}" for one, other in zip(accuracy, drawn, strict=True))
            means = (f"{np.mean(values):.1f}" for values in (accuracy, drawn))
            lines.append((f"{fraction:.0%}", leave, method, count, *means, "" if way == "random" else each))
    header = (
        "kept",
        "hardest rows that leave",
        "the others",
        "seeds",
        "accuracy",
        "of random rows",
        "each difference",
    )
    count = len(movie().rows["validation"]) + len(movie().rows["pool"]) - movie().drawn
    text = (
        f"MiniLM-L6 fine-tuned for {EPOCHS} epochs on movie reviews; mean accuracy in % on {count:,} rows that are in "
        "no training draw of the seed and no test rows. Hardest by EL2N of probes."
    )
    save("selection_choice", {"accuracy": found}, f"{text}\n\n{table(header, lines)}")


if __name__ == "__main__":
    main()
