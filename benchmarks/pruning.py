"""Gradual pruning of MiniLM-L6 on movie reviews: what is left of the accuracy, with and without the dense teacher.

Each run (arm, learning rate, seed) keeps its result, its model and the scores of every test row in runs/pruning and is
skipped when it is there, so that the script can be stopped and started again. Rates are chosen on the validation rows
with seed 0. One thread per process: two processes with different `--only` use two cores. What is pruned without
training is in pruning_oneshot.py.
"""

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import transformers
from common import ROOT, be_quiet, save
from distillation_data import movie
from distillation_table import paired_difference

import hfshrink
from distillation import RUNS as TAUGHT
from distillation import fit, measure, taught_rows, teacher_of
from hfshrink import CompressionTrainer, LogitLoss, Pruning
from hfshrink.evaluation.measures import resolve_measures
from hfshrink.evaluation.profiling import count_macs
from hfshrink.inputs import random_inputs
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "pruning"
TEACHERS = TAUGHT / "teachers" / "movie"
EPOCH = 94  # steps of 32 rows
RATES = (5e-5, 1e-4)


@dataclass(frozen=True)
class Arm:
    """One way of pruning.

    Attributes:
        name: Of its folder.
        title: In the table.
        pruning: Settings of `Pruning`; None trains the dense model on.
        epochs: Passes over the 3,000 labelled rows, or as many steps on more rows.
        seeds: How many.
        taught: Whether the dense model teaches.
        rates: Learning rates to choose from.
        rows: What it learns from: "train", the labelled rows, or "transfer", rows without labels as well.
    """

    name: str
    title: str
    pruning: dict | None
    epochs: int = 5
    seeds: int = 1
    taught: bool = True
    rates: tuple[float, ...] = RATES
    rows: str = "train"


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
    Arm("weights-90-faster", "90 % of the weights, magnitude", {"sparsity": 0.9}, 10, 3, rates=(3e-4, 5e-4)),
    Arm(
        "weights-90-transfer",
        "90 % of the weights, magnitude",
        {"sparsity": 0.9},
        10,
        rates=(3e-4,),
        rows="transfer",
    ),
    Arm(
        "weights-90-even",
        "90 % of the weights of each layer, magnitude",
        {"sparsity": 0.9, "scope": "module"},
        10,
        rates=(3e-4,),
    ),
    Arm(
        "movement-90-faster",
        "90 % of the weights, movement from magnitudes",
        {"sparsity": 0.9, "method": "movement"},
        10,
        rates=(3e-4,),
    ),
    Arm(
        "movement-90",
        "90 % of the weights, movement from magnitudes",
        {"sparsity": 0.9, "method": "movement"},
        10,
        3,
        rates=(1e-4,),
    ),
    Arm(
        "movement-zero-90",
        "90 % of the weights, movement from zero",
        {"sparsity": 0.9, "method": "movement", "initial_scores": "zero"},
        10,
        rates=(1e-4,),
    ),
    Arm("dense", "nothing, trained on in the same way", None, rates=(1e-4,)),
)


PAIRS = (
    ("movement-90", "weights-90"),
    ("weights-90-faster", "weights-90"),
    ("movement-90-faster", "weights-90-faster"),
    ("weights-90-transfer", "weights-90-faster"),
    ("weights-90-even", "weights-90-faster"),
    ("movement-zero-90", "weights-90"),
    ("half-taylor", "half-alone"),
    ("half-taylor", "half-magnitude"),
    ("half-taylor", "dense"),
    ("third-taylor", "dense"),
    ("weights-70", "dense"),
)
"""What is compared besides each arm with the dense model."""


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
            rows = taught_rows(movie, arm.rows, seed)
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


def is_complete(arm):
    """Whether all runs of an arm are there, so that it can be shown without training."""
    if not all((folder_of(arm, rate, 0) / "result.json").is_file() for rate in arm.rates):
        return False
    return all((folder_of(arm, choose(arm)[0], seed) / "result.json").is_file() for seed in range(arm.seeds))


def folders(arm):
    return [folder_of(arm, choose(arm)[0], seed) for seed in range(arm.seeds)]


def teachers(count):
    return [TEACHERS / f"seed-{seed}" for seed in range(count)]


def difference(before, after):
    """Points of accuracy that one side has more, with a 95 % interval of resampled seeds and rows, both paired."""
    measure = resolve_measures("accuracy", "single_label")[0]
    rows = [np.stack([np.load(folder / "rows.npz")["accuracy"] for folder in side]) for side in (before, after)]
    return [100 * value for value in paired_difference(measure, "accuracy", *rows)]


def macs(folder):
    """Multiply-accumulate operations of 32 tokens in all layers, embeddings and heads left out."""
    model = hfshrink.load(folder)[0]
    inputs = random_inputs(model, 1, 32)
    return count_macs(model, inputs)


def numbers(arm, dense_macs):
    """What the table and the JSON say of an arm."""
    rate, tried = choose(arm)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(arm)]
    return {
        "title": arm.title,
        "pruning": arm.pruning,
        "taught": arm.taught,
        "rows": arm.rows,
        "epochs": arm.epochs,
        "seeds": arm.seeds,
        "rates": tried,
        "rate": rate,
        "accuracy": [result["test"]["accuracy"] for result in results],
        "minus_dense": difference(teachers(arm.seeds), folders(arm)),
        "parameters": results[0]["parameters"],
        "macs_ratio": dense_macs / macs(folders(arm)[0] / "model"),
        "seconds": [result["seconds"] for result in results],
    }


def shown(interval):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval)


def render(arms):
    dense_macs = macs(teachers(1)[0])
    found = {arm.name: numbers(arm, dense_macs) for arm in arms}
    dense = [json.loads((folder / "result.json").read_text())["test"]["accuracy"] for folder in teachers(3)]
    rows = [("nothing (the dense model)", "", "", f"{np.mean(dense):.4f}, 3 seeds", "", "22.71 M", "1.00")]
    for arm in found.values():
        how = "labels + dense model" if arm["taught"] else "labels"
        how += ", more rows" * (arm["rows"] == "transfer")
        score = f"{np.mean(arm['accuracy']):.4f}, {arm['seeds']} seed{'s' * (arm['seeds'] > 1)}"
        size = f"{arm['parameters'] / 1e6:.2f} M"
        epochs = f"{arm['epochs']}, {arm['rate']:g}"
        rows.append((arm["title"], how, epochs, score, shown(arm["minus_dense"]), size, f"{arm['macs_ratio']:.2f}"))
    header = ("what goes", "taught by", "epochs, rate", "accuracy", "points − dense [95 %]", "parameters", "MACs ÷")
    text = table(header, rows)
    pairs = {}
    for name, other in PAIRS:
        if name in found and other in found:
            count = min(found[name]["seeds"], found[other]["seeds"])
            one, two = (folders(next(arm for arm in arms if arm.name == n))[:count] for n in (name, other))
            pairs[f"{name} − {other}"] = [count, *difference(two, one)]
    lines = [f"{name}: {shown(found[1:])} points, {found[0]} seed(s)" for name, found in pairs.items()]
    text += "\n\n" + "\n".join(f"- {line}" for line in lines)
    text += (
        "\n\nMiniLM-L6 fine-tuned on 3,000 movie reviews, 2,000 test rows; batches of 32. Zeros of weights lie in "
        "dense tensors: parameters, file and MACs stay. Intervals resample seeds and rows, paired with the dense "
        "model of the same seed; with one seed they know nothing of other seeds. Rates were chosen on validation rows "
        "where several were tried. The dense model had 2 epochs: the last row shows what more training alone brings."
    )
    save("pruning", {"dense": dense, "arms": found, "pairs": pairs}, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    parser.add_argument("--render", action="store_true", help="train nothing: write the table of what is complete")
    options = parser.parse_args()
    be_quiet()
    for arm in () if options.render else ARMS:
        if arm.name in options.only:
            rate, _ = choose(arm)
            for seed in range(arm.seeds):
                run(arm, rate, seed)
    render([arm for arm in ARMS if is_complete(arm)])


if __name__ == "__main__":
    main()
