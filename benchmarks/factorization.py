"""Low-rank factorization of MiniLM-L6 on movie reviews and of a ResNet on Fashion-MNIST: what is left of the accuracy.

Each run (arm, learning rate, seed) keeps its result and the scores of every test row in runs/factorization and is
skipped when it is there, so that the script can be stopped and started again. Calibration and training see training
rows only; rates are chosen on the validation rows with seed 0. One thread per process: two processes with different
`--only` use two cores. Language models are in factorization_language.py, times in factorization_speed.py.
"""

import argparse
import copy
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import transformers
from common import ROOT, be_quiet, save
from distillation_data import garments, movie
from distillation_table import paired_difference

import hfshrink
from distillation import RUNS as TAUGHT
from distillation import fit, measure, taught_rows, teacher_of
from hfshrink import CompressionTrainer, LogitLoss
from hfshrink.evaluation.measures import resolve_measures
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "factorization"
SUBJECTS = {"movie": movie, "garments": garments}
SAMPLES = {"movie": 512, "garments": 2000}  # calibration rows
SEEDS = 3
EPOCH = 94  # steps of 32 rows
RATES = (5e-5, 1e-4)


@dataclass(frozen=True)
class Arm:
    """One way of factorizing.

    Attributes:
        name: Of its folder.
        how: Keywords of `factorize`; None keeps the dense model.
        subject: Key of `SUBJECTS`.
        epochs: Passes over the training rows afterwards.
        taught: Whether the dense model teaches then, beside the labels.
        rates: Learning rates to choose from, where there is training.
        like: Arm whose number of parameters is the budget.
    """

    name: str
    how: dict[str, Any] | None
    subject: str = "movie"
    epochs: int = 0
    taught: bool = True
    rates: tuple[float, ...] = (0.0,)
    like: str | None = None

    @property
    def title(self) -> str:
        words = {"none": "plain SVD", "fisher": "Fisher", "activation": "whitened", None: ""}
        weighting = words.get((self.how or {}).get("weighting"), (self.how or {}).get("weighting"))
        return "nothing" if self.how is None else f"{weighting}{', ranks by budget' * (self.like is not None)}"


PLAIN, FISHER, WHITE = {"weighting": "none"}, {"weighting": "fisher"}, {"weighting": "activation"}
WEIGHTINGS = {"plain": PLAIN, "fisher": FISHER, "whitened": WHITE}


def _one_shot(percent: int) -> list[Arm]:
    """All weightings at one ratio, and whitening with the same number of parameters spread by need."""
    arms = [Arm(f"{percent}-{name}", {"rank_ratio": percent / 100, **how}) for name, how in WEIGHTINGS.items()]
    return [*arms, Arm(f"{percent}-budget", WHITE, like=f"{percent}-whitened")]


FORMS = {
    "plain": {**PLAIN, "form": "channel"},
    "whitened": {**WHITE, "form": "channel"},
    "separable": {**PLAIN, "form": "separable"},
    "tucker": {**PLAIN, "form": "tucker"},
}
IMAGES = [Arm(f"garments-50-{name}", {"rank_ratio": 0.5, **how}, "garments") for name, how in FORMS.items()]
ARMS = (
    *(arm for percent in (80, 70, 50) for arm in _one_shot(percent)),
    Arm("50-budget-taught", WHITE, epochs=2, rates=RATES, like="50-whitened"),
    Arm("50-budget-alone", WHITE, epochs=2, taught=False, rates=RATES[1:], like="50-whitened"),
    Arm("50-plain-taught", {"rank_ratio": 0.5, **PLAIN}, epochs=2, rates=RATES[1:]),
    Arm("dense-taught", None, epochs=2, rates=RATES[1:]),
    *IMAGES,
    *(dataclasses.replace(arm, name=f"{arm.name}-tuned", epochs=1, rates=(1e-3,)) for arm in IMAGES),
    Arm("garments-dense-tuned", None, "garments", epochs=1, rates=(1e-3,)),
)
BY_NAME = {arm.name: arm for arm in ARMS}


def folder_of(arm, rate, seed):
    return RUNS / arm.name / f"{rate:g}" / f"seed-{seed}"


def calibration_of(arm):
    rows = SUBJECTS[arm.subject]().rows["train"]
    return rows.select(range(min(SAMPLES[arm.subject], len(rows))))


def smaller_model(arm, seed):
    """The factored model of an arm, before any training."""
    model = copy.deepcopy(teacher_of(SUBJECTS[arm.subject], seed)).requires_grad_(True)
    if arm.how is None:
        return model
    how = dict(arm.how)
    if arm.like is not None:
        how["max_parameters"] = run(BY_NAME[arm.like], 0.0, seed)["parameters"]
    if how["weighting"] != "none":
        how["calibration"] = calibration_of(arm)
    return hfshrink.factorize(model, **how)


def run(arm, rate, seed):
    """The result of one run, made if it is not there."""
    folder = folder_of(arm, rate, seed)
    if not (folder / "result.json").is_file():
        subject, start = SUBJECTS[arm.subject](), time.perf_counter()
        transformers.set_seed(seed)
        model = smaller_model(arm, seed)
        factoring = time.perf_counter() - start
        if arm.epochs:
            train(model, arm, rate, seed)
        if seed == 0:
            model.save_pretrained(folder / "model")
        facts = {"rate": rate, "seed": seed, "factoring_seconds": round(factoring, 1)}
        measure(model, subject, folder, **facts, seconds=round(time.perf_counter() - start))
        print(f"{arm.name} {rate:g} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads((folder / "result.json").read_text())


def train(model, arm, rate, seed):
    subject_of = SUBJECTS[arm.subject]
    subject, how = subject_of(), {}
    rows = subject.rows["train"]
    if arm.taught:
        rows = taught_rows(subject_of, "train", seed)
        losses = [LogitLoss(temperature=2.0)]
        how = {"teacher": teacher_of(subject_of, seed), "losses": losses, "label_weight": 0.5}
    steps = arm.epochs * (EPOCH if arm.subject == "movie" else 150)
    fit(model, rows, subject, seed, rate, steps, trainer=CompressionTrainer, **how)


def choose(arm):
    """The rate that does best on the validation rows with seed 0, and all scores."""
    scores = {rate: run(arm, rate, 0)["validation"]["accuracy"] for rate in arm.rates}
    return max(scores, key=lambda rate: scores[rate]), scores


def is_complete(arm):
    """Whether all runs of an arm are there, so that it can be shown without work."""
    if not all((folder_of(arm, rate, 0) / "result.json").is_file() for rate in arm.rates):
        return False
    return all((folder / "result.json").is_file() for folder in folders(arm))


def folders(arm):
    return [folder_of(arm, choose(arm)[0], seed) for seed in range(SEEDS)]


def teachers(arm):
    return [TAUGHT / "teachers" / SUBJECTS[arm.subject]().name / f"seed-{seed}" for seed in range(SEEDS)]


def difference(before, after):
    """Points of accuracy that one side has more, with a 95 % interval of resampled seeds and rows, both paired."""
    measures = resolve_measures("accuracy", "single_label")[0]
    rows = [np.stack([np.load(folder / "rows.npz")["accuracy"] for folder in side]) for side in (before, after)]
    return [100 * value for value in paired_difference(measures, "accuracy", *rows)]


def numbers(arm):
    """What the table and the JSON say of an arm."""
    rate, tried = choose(arm)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(arm)]
    found = {
        "title": arm.title,
        "how": arm.how,
        "subject": arm.subject,
        "epochs": arm.epochs,
        "taught": arm.taught and arm.epochs > 0,
        "rate": rate,
        "validation": {f"{one:g}": score for one, score in tried.items()},
        "accuracy": [result["test"]["accuracy"] for result in results],
        "minus_dense": difference(teachers(arm), folders(arm)),
        "parameters": [result["parameters"] for result in results],
        "factoring_seconds": [result["factoring_seconds"] for result in results],
    }
    if arm.like is not None and is_complete(BY_NAME[arm.like]):
        found["minus_uniform"] = difference(folders(BY_NAME[arm.like]), folders(arm))
    return found


def shown(interval):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval)


TITLES = {"movie": "MiniLM-L6, movie reviews", "garments": "ResNet, Fashion-MNIST"}


def render(arms):
    found, text = {arm.name: numbers(arm) for arm in arms}, []
    for subject, title in TITLES.items():
        of_subject = {name: arm for name, arm in found.items() if arm["subject"] == subject}
        if of_subject:
            text.append(f"**{title}**\n\n{_table(subject, of_subject)}")
    text.append(
        f"Means of {SEEDS} seeds; intervals resample seeds and test rows, paired with the dense model of the same "
        "seed. Kept: parameters of the factored weights over those of the dense ones, as asked for; the head and the "
        f"embeddings stay. Calibration: {SAMPLES['movie']:,} reviews or {SAMPLES['garments']:,} images of the "
        "training rows. By budget: as many parameters as the line with the same weighting and one ratio, spread over "
        "the modules; − uniform compares the two. Taught: labels and the dense model's logits, batches of 32 for the "
        "reviews; rates were chosen on validation rows."
    )
    save("factorization", {"arms": found}, "\n\n".join(text))


def _table(subject, found):
    one = next(arm for arm in ARMS if arm.subject == subject)
    dense = [json.loads((folder / "result.json").read_text()) for folder in teachers(one)]
    score = np.mean([result["test"]["accuracy"] for result in dense])
    size = f"{dense[0]['parameters'] / 1e6:.2f} M" if "parameters" in dense[0] else ""
    rows = [("100 %", "", "", f"{score:.4f}", "", "", size)]
    for name, arm in found.items():
        ratio = name.removeprefix("garments-").partition("-")[0]
        kept = f"{ratio} %" if ratio.isdigit() else "100 %"
        form = (arm["how"] or {}).get("form")
        how = arm["title"] + (f", {form}" if form else "")
        after = ""
        if arm["epochs"]:
            after = f"{arm['epochs']} epochs, {'labels + dense model' if arm['taught'] else 'labels'}, {arm['rate']:g}"
        uniform = shown(arm["minus_uniform"]) if "minus_uniform" in arm else ""
        score, size = f"{np.mean(arm['accuracy']):.4f}", f"{np.mean(arm['parameters']) / 1e6:.2f} M"
        rows.append((kept, how, after, score, shown(arm["minus_dense"]), uniform, size))
    header = ("kept", "factors", "trained after", "accuracy", "points − dense [95 %]", "− uniform", "parameters")
    return table(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    parser.add_argument("--render", action="store_true", help="run nothing: write the table of what is complete")
    options = parser.parse_args()
    be_quiet()
    for arm in () if options.render else ARMS:
        if arm.name in options.only:
            rate, _ = choose(arm)
            for seed in range(SEEDS):
                run(arm, rate, seed)
    render([arm for arm in ARMS if is_complete(arm)])


if __name__ == "__main__":
    main()
