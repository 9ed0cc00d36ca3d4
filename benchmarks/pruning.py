"""Gradual pruning of MiniLM-L6 on movie reviews: what is left of the accuracy, with and without the dense teacher.

Each run (arm, learning rate, seed) keeps its result, its model and the scores of every test row in runs/pruning and is
skipped when it is there, so that the script can be stopped and started again. Rates are chosen on the validation rows
with seed 0. One thread per process: two processes with different `--only` use two cores. What is pruned without
training is in pruning_oneshot.py.
"""

import argparse
import copy
import json
import logging
import os
import time
import warnings
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import datasets
import numpy as np
import torch
import transformers
from common import ROOT
from distillation_data import movie

import hfshrink
from distillation import fit, measure, taught_rows, teacher_of
from hfshrink import CompressionTrainer, LogitLoss, Pruning

RUNS = ROOT / "runs" / "pruning"
EPOCH = 94  # steps of 32 rows
RATES = (5e-5, 1e-4)


@dataclass(frozen=True)
class Arm:
    """One way of pruning.

    Attributes:
        name: Of its folder.
        title: In the table.
        pruning: Settings of `Pruning`; None trains the dense model on.
        epochs: Passes over the 3,000 labelled rows.
        seeds: How many.
        taught: Whether the dense model teaches.
        rates: Learning rates to choose from.
    """

    name: str
    title: str
    pruning: dict | None
    epochs: int = 5
    seeds: int = 1
    taught: bool = True
    rates: tuple[float, ...] = RATES


HALF, THIRD = {"sparsity": 0.5, "structure": "heads+neurons"}, {"sparsity": 2 / 3, "structure": "heads+neurons"}
ARMS = (
    Arm("half-taylor", "half of all heads and neurons, taylor", {**HALF, "method": "taylor"}, seeds=3),
    Arm("half-magnitude", "half of all heads and neurons, magnitude", {**HALF}, rates=(1e-4,)),
    Arm(
        "half-alone",
        "half of all heads and neurons, taylor",
        {**HALF, "method": "taylor"},
        taught=False,
        rates=(1e-4,),
    ),
    Arm("third-taylor", "two thirds of all heads and neurons, taylor", {**THIRD, "method": "taylor"}, rates=(1e-4,)),
    Arm("weights-70", "70 % of the weights, magnitude", {"sparsity": 0.7}, rates=(1e-4,)),
    Arm("weights-90", "90 % of the weights, magnitude", {"sparsity": 0.9}, 10, 3, rates=(1e-4,)),
    Arm("movement-90", "90 % of the weights, movement", {"sparsity": 0.9, "method": "movement"}, 10, 3, rates=(1e-4,)),
    Arm("dense", "nothing, trained on in the same way", None, rates=(1e-4,)),
)


def folder_of(arm, rate, seed):
    return RUNS / arm.name / f"{rate:g}" / f"seed-{seed}"


def run(arm, rate, seed):
    """The result of one run, trained if it is not there."""
    folder = folder_of(arm, rate, seed)
    if not (folder / "result.json").is_file():
        subject, start = movie(), time.perf_counter()
        teacher = teacher_of(movie, seed)
        rows, how = subject.rows["train"], {"trainer": CompressionTrainer}
        if arm.taught:
            rows = taught_rows(movie, "train", seed)
            how |= {"teacher": teacher, "losses": [LogitLoss(temperature=2.0)], "label_weight": 0.5}
        if arm.pruning is not None:
            how["pruning"] = Pruning(**arm.pruning)
        transformers.set_seed(seed)
        model = fit(copy.deepcopy(teacher).requires_grad_(True), rows, subject, seed, rate, arm.epochs * EPOCH, **how)
        model.save_pretrained(folder / "model")
        sparsity = [step.results["sparsity"] for step in hfshrink.report(model).steps if step.technique == "prune"]
        facts = {"rate": rate, "steps": arm.epochs * EPOCH, "seed": seed, "sparsity": sparsity}
        measure(model, subject, folder, **facts, seconds=round(time.perf_counter() - start))
        print(f"{arm.name} {rate:g} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads((folder / "result.json").read_text())


def choose(arm):
    """The rate that does best on the validation rows with seed 0, and all scores."""
    scores = {rate: run(arm, rate, 0)["validation"]["accuracy"] for rate in arm.rates}
    return max(scores, key=lambda rate: scores[rate]), scores


def correct(folders):
    """Which test rows each seed got right: (seeds, rows)."""
    return np.stack([np.load(folder / "rows.npz")["accuracy"][:, 0] > 0.5 for folder in folders])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    torch.set_num_threads(1)
    for arm in ARMS:
        if arm.name in options.only:
            rate, _ = choose(arm)
            for seed in range(arm.seeds):
                run(arm, rate, seed)


if __name__ == "__main__":
    main()
