"""From the outcomes of the runs to a `Proof`: means over the seeds, intervals, and what is left to note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.proof.intervals import (
    Floats,
    class_recalls,
    draw_seeds,
    interval,
    resampled_scores,
    run_scores,
    seed_means,
    verdict,
)
from hfshrink.proof.request import Request
from hfshrink.proof.results import METRICS, Arm, Difference, Interval, Proof, Scores
from hfshrink.proof.store import Key, Outcome
from hfshrink.proof.training import Training
from hfshrink.selection.caching import array_digest

SEED = 0  # of the intervals
COMPARED = ("accuracy", "f1")
FEW_SEEDS = 3
ArmKey = tuple[str, str | None]  # an arm's data, and what is equal


def summarize(
    request: Request,
    outcomes: Mapping[Key, Outcome],
    training: Training,
    *,
    trainer: str,
    selection_seconds: float | None,
    machine: dict[str, Any],
) -> Proof:
    """The proof of finished runs.

    Args:
        request: What was asked for.
        outcomes: Of every run.
        training: How they were trained.
        trainer: Name of the class.
        selection_seconds: Of picking the subset.
        machine: Where they were trained.
    """
    arms: dict[ArmKey, list[Outcome]] = {}
    for key, outcome in outcomes.items():
        arms.setdefault((key.data, key.equal), []).append(outcome)
    samples = {name: {arm: Sample(runs, name, request) for arm, runs in arms.items()} for name in request.held_out}
    built = tuple(_arm(arm, runs, arms["full", None], samples, request) for arm, runs in arms.items())
    facts = {name: side.facts for name, side in request.held_out.items()}
    return Proof(
        task=request.networks.task,
        model=request.networks.title,
        trainer=trainer,
        rows=len(request.full),
        size=len(request.subset),
        subset=None if request.indices is None else array_digest(request.indices),
        seeds=tuple(int(seed) for seed in request.settings.seeds),
        resamples=request.settings.resamples,
        arms=built,
        differences=tuple(_differences(samples, len(request.settings.seeds))),
        test=facts["test"],
        out_of_distribution=facts.get("out_of_distribution", {}),
        settings=training.settings(),
        selection_seconds=selection_seconds,
        machine=machine,
        notes=tuple(_notes(request, built, training)),
    )


class Sample:
    """The scores of one arm on one held-out data set: of all rows, and of resampled seeds and rows.

    Args:
        runs: Of the arm, one a seed.
        name: `"test"` or `"out_of_distribution"`.
        request: What was asked for.
    """

    def __init__(self, runs: list[Outcome], name: str, request: Request) -> None:
        references, resamples = request.held_out[name].references, request.settings.resamples
        predictions: NDArray[np.int64] = np.stack([getattr(run, name) for run in runs])
        drawn = draw_seeds(len(runs), resamples, SEED)
        self.by_seed: Floats = run_scores(predictions, references)
        self.means: Floats = seed_means(resampled_scores(predictions, references, resamples, SEED), drawn)
        self.recalls = class_recalls(predictions, references, request.classes)
        self.worst = int(np.nanargmin(self.recalls))

    def scores(self, class_name: str) -> Scores:
        """For the record, the worst class by its name."""
        found = {name: self.interval(name) for name in METRICS}
        return Scores(**found, worst_class=class_name, worst_recall=float(self.recalls[self.worst]))

    def interval(self, metric: str) -> Interval:
        """The mean over the seeds of one metric."""
        return interval(self.by_seed[:, METRICS.index(metric)].mean(), self.means[:, METRICS.index(metric)])

    def minus(self, other: Sample, metric: str) -> Interval:
        """The paired difference of one metric."""
        column = METRICS.index(metric)
        value = (self.by_seed - other.by_seed)[:, column].mean()
        return interval(value, self.means[:, column] - other.means[:, column])


def _arm(
    key: ArmKey,
    runs: list[Outcome],
    full: list[Outcome],
    samples: Mapping[str, Mapping[ArmKey, Sample]],
    request: Request,
) -> Arm:
    scores = {name: found[key].scores(request.class_name(found[key].worst)) for name, found in samples.items()}
    seconds = float(np.mean([run.seconds for run in runs]))
    known = [run.train_accuracy for run in runs if run.train_accuracy is not None]
    trained = float(np.mean(known)) if len(known) == len(runs) else None
    saves = key[0] != "full"
    by_seed = samples["test"][key].by_seed
    return Arm(
        data=key[0],
        equal=key[1],
        rows=runs[0].rows,
        epochs=runs[0].epochs,
        steps=runs[0].steps,
        seconds=seconds,
        steps_saved=full[0].steps - runs[0].steps if saves else None,
        seconds_saved=float(np.mean([run.seconds for run in full])) - seconds if saves else None,
        train_accuracy=trained,
        gap=None if trained is None else trained - scores["test"].accuracy.value,
        test=scores["test"],
        out_of_distribution=scores.get("out_of_distribution"),
        runs=tuple(
            {
                "seed": int(seed),
                "steps": run.steps,
                "seconds": run.seconds,
                **{name: float(row[METRICS.index(name)]) for name in COMPARED},
            }
            for seed, run, row in zip(request.settings.seeds, runs, by_seed, strict=True)
        ),
    )


def _differences(samples: Mapping[str, Mapping[ArmKey, Sample]], seeds: int) -> list[Difference]:
    found = []
    for equal in dict.fromkeys(key[1] for key in samples["test"] if key[0] == "subset"):
        others: list[tuple[str, ArmKey]] = [("random", ("random", equal)), ("full", ("full", None))]
        for against, key in others:
            for name, arms in samples.items():
                for metric in COMPARED if key in arms else ():
                    difference = arms["subset", equal].minus(arms[key], metric)
                    found.append(Difference(against, str(equal), name, metric, difference, verdict(difference, seeds)))
    return found


def _notes(request: Request, arms: tuple[Arm, ...], training: Training) -> list[str]:
    notes, seeds = list(request.notes), len(request.settings.seeds)
    if seeds == 1:
        notes.append("One seed: the intervals resample test rows alone and say nothing about other seeds.")
    elif seeds < FEW_SEEDS:
        notes.append(f"{seeds} seeds: intervals over so few are too narrow; take three or more for a claim.")
    if not request.settings.random_subsets:
        notes.append("No random subsets were trained on: what the choice of rows is worth was not measured.")
    classes = 0 if request.labels is None else len(np.unique(request.labels))
    if request.settings.random_subsets and (not classes or len(request.subset) < classes):
        notes.append("The random subsets were drawn from all rows alike, not class by class.")
    if classes and classes < request.classes:
        notes.append(f"The model has {request.classes} classes, the training rows have {classes} of them.")
    notes += _lacking(request)
    removed = {name: side.facts["removed"] for name, side in request.held_out.items() if side.facts["removed"]}
    notes += [f"{count:,} {name} rows that are training rows too were left out." for name, count in removed.items()]
    short = [arm.title for arm in arms if training.arguments.get_warmup_steps(arm.steps) >= arm.steps]
    if short:
        notes.append(f"The learning rate was still rising when these runs ended: {'; '.join(short)}.")
    return notes


def _lacking(request: Request) -> list[str]:
    """Of each held-out data set, the classes that it has no row of."""
    notes, labels = [], request.labels if request.labels is not None else np.arange(0)
    for name, side in request.held_out.items():
        lacking = np.setdiff1d(labels, side.references).tolist()
        if lacking:
            shown = ", ".join(map(request.class_name, lacking[:5]))
            notes.append(
                f"The {name} rows have none of {len(lacking)} classes ({shown}): means over classes leave them out, "
                "or count 0 where a model predicts them."
            )
    return notes
