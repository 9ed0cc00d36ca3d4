"""Which rows are worth training on? Every method of `select` at eight sizes of subset, on three data sets, five seeds.

A run is (data set, seed, method): it picks subsets of all sizes, trains logistic regression and a small network on
their frozen embeddings, and keeps what both say of every test row in runs/selection/grid. It is skipped when it is
there, so that the script can be stopped and started again. Validation rows choose the heads' settings; the test rows
choose nothing, and no score or embedding is fitted to them. Embeddings are made once per data set, scores (probes)
once per data set and seed. Methods that draw nothing differ from seed to seed by the training rows.

Fine-tuning of the whole encoder is in selection_training.py, label errors and rare groups in selection_dangers.py,
a million rows in selection_scale.py.
"""

import argparse
import json
import os
import time
from functools import lru_cache

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
from common import be_quiet
from selection_data import DATA, RUNS, logistic, network
from selection_table import Grid, render

from hfshrink.selection import select
from hfshrink.selection.methods import METHODS
from hfshrink.selection.probing import train_probes

FRACTIONS = (0.01, 0.05, 0.1, 0.3, 0.5)
PER_CLASS = (5, 10, 20)
SEEDS = 5
FULL, UNSTRATIFIED = "full", "random, not stratified"
ARMS = ("random", UNSTRATIFIED, *(name for name in METHODS if name != "random"), "auto", FULL)


def sizes_of(data):
    """Title of a size -> rows to keep, smallest first."""
    classes = len(data.names)
    found = {f"{count} a class": count * classes for count in PER_CLASS}
    found |= {f"{fraction:.0%}": round(fraction * data.drawn) for fraction in FRACTIONS}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def folder_of(name, seed):
    return RUNS / "grid" / name / f"seed-{seed}"


@lru_cache(maxsize=1)
def probes_of(name, seed):
    """The passes that all scores of a data set and seed come from, and the CPU seconds they took."""
    rows, vectors, labels = DATA[name]().training(seed)
    start = time.process_time()
    return train_probes(vectors, labels, dataset=rows, seed=seed), time.process_time() - start


def pick(name, seed, arm, size):
    """(row numbers among the training rows, method that ran, CPU seconds), without the time of probes."""
    rows, vectors, _ = DATA[name]().training(seed)
    if arm == FULL:
        return np.arange(len(rows)), FULL, 0.0
    how = {"seed": seed, "coverage": False}
    if arm == UNSTRATIFIED:
        how["stratify"] = None
    method = "random" if arm == UNSTRATIFIED else arm
    if method == "auto" or METHODS[method].embeddings:
        how["embeddings"] = vectors
    if method == "auto" or METHODS[method].measure:
        how["data_map"] = probes_of(name, seed)[0]
    start = time.process_time()
    subset = select(rows, size=size, method=method, **how)
    return subset.indices, subset.report.used, time.process_time() - start


def try_heads(data, vectors, labels, seed):
    """Head -> (what it was set to, accuracy on the validation rows, its classes of the test rows)."""
    tried = data.vectors["validation"], data.labels("validation")
    heads = {
        "logistic": logistic(vectors, labels, tried),
        "network": network(vectors, labels, tried, len(data.names), seed),
    }
    return {head: (chosen, score, predict(data.vectors["test"])) for head, (predict, chosen, score) in heads.items()}


def run(name, seed, arm, is_small=False):
    """All sizes of one method; `result.json` comes last."""
    folder = folder_of(name, seed) / arm
    if (folder / "result.json").is_file():
        return
    data, result, kept, start = DATA[name](), {}, {}, time.process_time()
    _, vectors, labels = data.training(seed)
    sizes = {"100%": data.drawn} if arm == FULL else sizes_of(data)
    for title, size in list(sizes.items())[: 2 if is_small else None]:
        indices, used, seconds = pick(name, seed, arm, size)
        found = {"rows": len(indices), "used": used, "seconds": seconds}
        for head, (chosen, score, answers) in try_heads(data, vectors[indices], labels[indices], seed).items():
            found[head] = {"chosen": chosen, "validation": score}
            kept[f"{title}/{head}"] = answers.astype(np.uint8)
        result[title] = found
    spent = time.process_time() - start
    if is_small:
        print(f"{name} seed {seed} {arm}: {json.dumps(result)}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "answers.npz", **kept)
        text = json.dumps({"sizes": result, "cpu_seconds": spent, "probe_seconds": probe_seconds(name, seed, arm)})
        (folder / "result.json").write_text(text + "\n")
    print(f"{name} seed {seed} {arm}: {spent:.1f} s of CPU", flush=True)


def probe_seconds(name, seed, arm):
    """CPU seconds of the probes, which are shared; None where the method needs none."""
    needs = arm == "auto" or (arm in METHODS and METHODS[arm].measure is not None)
    return probes_of(name, seed)[1] if needs else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=DATA, default=list(DATA), help="these data sets")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="these methods")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="so many, in the tables too")
    parser.add_argument("--small", action="store_true", help="try the two smallest sizes and keep nothing")
    parser.add_argument("--render", action="store_true", help="train nothing: write the tables of what is complete")
    options = parser.parse_args()
    be_quiet()
    if not options.render:
        for seed in range(options.seeds):
            for name in options.only:
                for arm in options.arms:
                    run(name, seed, arm, options.small)
    if not options.small:
        render([read(name, options.seeds) for name in DATA if is_complete(name, options.seeds)])


def is_complete(name, seeds=SEEDS):
    """Whether every method and seed of a data set is there."""
    return all((folder_of(name, seed) / arm / "result.json").is_file() for seed in range(seeds) for arm in ARMS)


def read(name, seeds=SEEDS):
    """All runs of a data set that is complete."""
    results, answers = {}, {}
    for arm in ARMS:
        folders = [folder_of(name, seed) / arm for seed in range(seeds)]
        results[arm] = [json.loads((folder / "result.json").read_text()) for folder in folders]
        files = [dict(np.load(folder / "answers.npz")) for folder in folders]
        answers[arm] = {key: np.stack([file[key] for file in files]) for key in files[0]}
    return Grid(name, DATA[name]().labels("test"), results, answers)


if __name__ == "__main__":
    main()
