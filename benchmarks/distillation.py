"""Does distillation help? Students of equal size and equally many steps, with and without a teacher, on five subjects.

Every run (student, signal, learning rate, seed) keeps its result and the scores of every test row in runs/distillation
and is skipped when it is there, so that the script can be stopped and started again. Each arm takes the signal and the
rate that do best on the validation rows with seed 0; the test rows choose nothing. One thread per process: two
processes with different `--only` use two cores.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import distillation_data as data
import distillation_made as made
import numpy as np
import transformers
from common import ROOT, be_quiet
from distillation_table import Arm, render
from transformers import Trainer, TrainingArguments

import hfshrink
from hfshrink.distillation import DecoupledLoss, FeatureMapLoss, HiddenLoss, LogitLoss, RelationLoss, cache_teacher
from hfshrink.evaluation.measures import resolve_measures

RUNS = ROOT / "runs" / "distillation"
LABELS = "labels"  # the signal of a student without a teacher
NONE = "no distillation"


@dataclass(frozen=True)
class Task:
    """One kind of student, taught in several ways.

    Attributes:
        name: In tables.
        subject: () -> the data and their teacher.
        student: (teacher, subject) -> a student that has not been trained.
        steps: Optimizer steps of every student.
        rates: Learning rates to choose from.
        arms: Title -> signals to choose from; the first is what the others are compared with.
        seeds: Number of seeds; each has its own teacher, student and order of rows.
        shares: Task of the same students, whose runs it shares.
    """

    name: str
    subject: Callable[[], data.Subject]
    student: Callable[[Any, data.Subject], Any]
    steps: int
    rates: tuple[float, ...]
    arms: dict[str, tuple[str, ...]]
    seeds: int = 3
    shares: str | None = None


def cut(layers):
    """Students of some of the teacher's layers."""
    return lambda teacher, subject: hfshrink.make_student(teacher, num_layers=layers)


def small_resnet(teacher, subject):
    return data.resnet(subject.names, widths=(24, 48, 96), depth=1)


PLAIN = {NONE: (LABELS,), "logits": ("logits",)}
RELATIONS = {"logits + features": ("relations",)}
MORE = {"logits + transfer data": ("transfer",)}
DKD = {"decoupled (DKD)": ("decoupled-2", "decoupled-8")}
MAPS = {"logits + feature maps": ("maps-1", "maps-0.1")}
MADE = {
    "teacher alone, real rows": ("unlabelled",),
    "teacher alone, generated rows": ("generated",),
    "logits + augmented rows": ("augmented",),
}
TASKS = (
    Task("movie-3", data.movie, cut(3), 240, (1e-4, 2e-4), {**PLAIN, **RELATIONS, **MORE}),
    Task("movie-1", data.movie, cut(1), 180, (1e-4, 3e-4), {**PLAIN, **RELATIONS, **MORE}),
    Task("bbc", data.bbc, cut(3), 40, (1e-4, 2e-4), {**PLAIN, **DKD, **RELATIONS, **MORE}),
    Task("addresses", data.tagged_addresses, cut(3), 100, (2e-4, 4e-4), {**PLAIN, **RELATIONS}),
    Task("garments", data.garments, small_resnet, 300, (2e-3, 5e-3), {**PLAIN, **MAPS, **MORE}),
    Task("smollm2", data.language, cut(15), 300, (2e-4,), {NONE: (LABELS,), "logits": ("words",)}, seeds=1),
    Task("movie-1-made", data.movie, cut(1), 180, (1e-4, 3e-4), {**PLAIN, **MADE}, shares="movie-1"),
)


def signal(name):
    """Extra arguments of `DistillationTrainer`: what the student is asked to match."""
    logits = LogitLoss(temperature=2.0)
    losses = {
        "words": [LogitLoss(temperature=1.0)],
        "relations": [logits, RelationLoss()],
        "hidden": [logits, HiddenLoss()],
        "maps-1": [logits, FeatureMapLoss()],
        "maps-0.1": [logits, FeatureMapLoss(weight=0.1)],
        "decoupled-2": [DecoupledLoss(temperature=2.0, other_weight=2.0)],
        "decoupled-8": [DecoupledLoss(temperature=2.0, other_weight=8.0)],
    }
    return {"losses": losses.get(name, [logits]), "label_weight": 0.0 if name in ("unlabelled", "generated") else 0.5}


OTHER_ROWS = {
    "transfer": lambda rows: data.join(rows["train"], rows["unlabelled"]),
    "unlabelled": lambda rows: rows["unlabelled"],
    "augmented": lambda rows: made.augmented_reviews(),
    "generated": lambda rows: made.generated_reviews(),
}
"""Signal -> the rows that it is given on, where these are not the labelled ones."""


@lru_cache(maxsize=1)
def taught_rows(subject_of, name, seed):
    """Rows with the teacher's logits, which is not run again in every epoch; `name` is of `OTHER_ROWS` or "train"."""
    rows = subject_of().rows
    rows = OTHER_ROWS[name](rows) if name in OTHER_ROWS else rows[name]
    return cache_teacher(rows, teacher_of(subject_of, seed)).with_format(rows.format["type"])


def fit(model, rows, subject, seed, rate, steps, trainer=Trainer, **how):
    """Train in place, every model in the same way."""
    args = TrainingArguments(
        output_dir=str(ROOT / "runs" / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=subject.batch,
        learning_rate=rate,
        train_sampling_strategy="group_by_length" if subject.has_text else "random",
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    fitter = trainer(model, args, train_dataset=rows, data_collator=subject.collator, **how)
    fitter.remove_callback(transformers.PrinterCallback)
    fitter.train()
    return model.eval()


def measure(model, subject, folder, **facts):
    """Score a model on validation and test rows, and keep the scores of every test row; `result.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    result, kept = {**facts, "parameters": sum(p.numel() for p in model.parameters())}, {}
    for split in ("validation", "test"):
        found = hfshrink.evaluate(model, subject.rows[split], list(subject.metrics))
        result[split] = {score.metric: score.value for score in found.scores if score.metric in subject.metrics}
        if split == "test":
            for metric in subject.metrics:
                statistics = resolve_measures(metric, subject.kind)[0].statistics
                kept[metric] = statistics(found.predictions, found.references)
    np.savez_compressed(folder / "rows.npz", **kept)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


@lru_cache(maxsize=1)
def teacher_of(subject_of, seed):
    """The subject's teacher of a seed, trained on the labelled rows (if at all); kept in its folder."""
    subject, start = subject_of(), time.perf_counter()
    folder = RUNS / "teachers" / subject.name / f"seed-{seed}"
    if (folder / "config.json").is_file() and (folder / "result.json").is_file():
        return hfshrink.load(folder)[0]
    transformers.set_seed(seed)
    model = subject.new_teacher()
    if subject.teacher_steps:
        fit(model, subject.rows["train"], subject, seed, subject.teacher_rate, subject.teacher_steps)
        model.save_pretrained(folder)
    if not (folder / "result.json").is_file():
        facts = {"rate": subject.teacher_rate, "steps": subject.teacher_steps, "seed": seed}
        measure(model, subject, folder, **facts, seconds=round(time.perf_counter() - start))
    return model.eval()


def folder_of(task, name, rate, seed):
    return RUNS / (task.shares or task.name) / name / f"{rate:g}" / f"seed-{seed}"


def is_done(task, name, rate, seed):
    return (folder_of(task, name, rate, seed) / "result.json").is_file()


def run(task, name, rate, seed):
    """The result of one run, trained if it is not there."""
    folder = folder_of(task, name, rate, seed)
    if not is_done(task, name, rate, seed):
        subject, teacher = task.subject(), teacher_of(task.subject, seed)
        start = time.perf_counter()
        rows, how = subject.rows["train"], {}
        if name != LABELS:
            how = {"trainer": hfshrink.DistillationTrainer, "teacher": teacher, **signal(name)}
            if subject.kind != "language" and all(loss.name in ("logits", "decoupled") for loss in how["losses"]):
                rows = taught_rows(task.subject, name if name in OTHER_ROWS else "train", seed)
        transformers.set_seed(seed)
        student = task.student(teacher, subject)
        fit(student, rows, subject, seed, rate, task.steps, **how)
        facts = {"rate": rate, "steps": task.steps, "batch": subject.batch, "rows": len(rows), "seed": seed}
        measure(student, subject, folder, **facts, seconds=round(time.perf_counter() - start))
        print(f"{task.name} {name} {rate:g} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    result = json.loads((folder / "result.json").read_text())
    if result["steps"] != task.steps:
        sys.exit(f"{folder} was trained for {result['steps']} steps, not {task.steps}. Remove it to train it anew.")
    return result


def rates_of(task, title):
    """The learning rates that an arm chooses from."""
    if title in PLAIN or "logits" not in task.arms:
        return task.rates
    return (choose(task, "logits", task.arms["logits"])[2][1],)


def choose(task, title, names):
    """All (signal, rate), their scores on the validation rows with seed 0, and the best.

    Labels and logits choose their rates; whatever else is learned from the teacher takes that of the logits.
    """
    metric = task.subject().metrics[0]
    candidates = list(itertools.product(names, rates_of(task, title)))
    scores = [run(task, *candidate, 0)["validation"][metric] for candidate in candidates]
    return candidates, scores, candidates[int(np.argmin(scores) if metric == "perplexity" else np.argmax(scores))]


def run_arm(task, title, names):
    """Choose a signal and a rate, then run the other seeds."""
    candidates, scores, best = choose(task, title, names)
    results = [run(task, *best, seed) for seed in range(task.seeds)]
    return Arm(title, candidates, scores, best, results, [folder_of(task, *best, seed) for seed in range(task.seeds)])


def teacher_arm(task):
    """What the teachers reach."""
    folders = [RUNS / "teachers" / task.subject().name / f"seed-{seed}" for seed in range(task.seeds)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    return Arm("teacher", [], [], None, results, folders)


def is_complete(task):
    """Whether all runs of a task are there, so that its arms can be read without training."""
    for title, names in task.arms.items():
        if not all(is_done(task, *candidate, 0) for candidate in itertools.product(names, rates_of(task, title))):
            return False
        best = choose(task, title, names)[2]
        if not all(is_done(task, *best, seed) for seed in range(task.seeds)):
            return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [task.name for task in TASKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these tasks only")
    parser.add_argument("--render", action="store_true", help="train nothing: write the tables of what is complete")
    options = parser.parse_args()
    be_quiet()
    if not options.render:
        for task in TASKS:
            if task.name in options.only:
                for title, signals in task.arms.items():
                    run_arm(task, title, signals)
    finished = [task for task in TASKS if is_complete(task)]
    render([(task, [*(run_arm(task, *arm) for arm in task.arms.items()), teacher_arm(task)]) for task in finished])


if __name__ == "__main__":
    main()
