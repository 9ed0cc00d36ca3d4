"""Tables of the distillation benchmark: means over seeds, and paired intervals against no distillation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import save

from hfshrink.evaluation.measures import resolve_measures
from hfshrink.terminal import table

PERCENT = ("accuracy", "token_accuracy", "f1")  # differences are shown in points


@dataclass(frozen=True)
class Arm:
    """One way of teaching, with the candidates that it was chosen from.

    Attributes:
        title: In the table.
        candidates: (signal, learning rate) of each.
        validation: The main metric of each on the validation rows, seed 0.
        chosen: The candidate that did best there; None for teachers, which choose nothing.
        results: Result of the chosen one, per seed.
        folders: Where they are kept, per seed.
    """

    title: str
    candidates: list[tuple[str, float]]
    validation: list[float]
    chosen: tuple[str, float] | None
    results: list[dict[str, Any]]
    folders: list[Path]

    def rows(self, metric):
        """Statistics of every test row, (seeds, rows, k)."""
        return np.stack([np.load(folder / "rows.npz")[metric] for folder in self.folders])


def paired_difference(measure, metric, before, after, resamples=2000, seed=0):
    """Mean over seeds of a metric's difference, with a 95 % interval of resampled seeds and rows, both paired.

    Args:
        measure: A measure of `hfshrink.evaluation.measures`, a function of sums over rows.
        metric: Which of its values.
        before: Its statistics of every row, (seeds, rows, k).
        after: The same of the other arm, seed by seed and row by row.
        resamples: Number of resampled means.
        seed: Of the resampling.
    """
    seeds, rows, _ = before.shape
    generator = np.random.default_rng(seed)
    drawn = generator.integers(seeds, size=(resamples, seeds))
    weights = np.stack([np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(resamples)])
    everywhere = np.ones((1, rows))

    def values(statistics, weights):
        sums = np.einsum("br,srk->bsk", weights, statistics, optimize=True)
        return np.asarray(measure.reduce(sums)[metric])  # (resamples, seeds)

    difference = values(after, weights) - values(before, weights)
    low, high = np.percentile(np.take_along_axis(difference, drawn, axis=1).mean(1), [2.5, 97.5])
    mean = (values(after, everywhere) - values(before, everywhere)).mean()
    return float(mean), float(low), float(high)


def render(tasks):
    """Write results/distillation.json and .md for [(task, arms)]; the first arm is the baseline."""
    found, parts = {}, []
    for task, arms in tasks:
        subject = task.subject()
        found[task.name], lines = _numbers(task, subject, arms)
        metrics = [f"{metric}, {task.seeds} seed{'s' * (task.seeds > 1)} (range)" for metric in subject.metrics]
        header = ("arm", "signal, rate", *metrics, "parameters", f"{subject.metrics[0]} − baseline [95 %]")
        sizes = f"{len(subject.rows['test']):,} test rows, {task.steps} steps of {subject.batch} rows"
        parts.append(f"## {task.name}: {subject.title}\n\n{sizes}.\n\n{table(header, lines)}")
        if task.seeds == 1:
            parts.append(
                "One seed and one rate, not chosen from several, prove nothing about others: "
                "the interval resamples test rows."
            )
    parts.append(
        "The baseline is the same student without distillation, trained for as many steps. Signal and learning rate "
        "of each arm were chosen on the validation rows with seed 0; the test rows chose nothing. Intervals resample "
        "seeds and test rows, paired. Accuracies' and F1's differences are in points."
    )
    save("distillation", {"tasks": found}, "\n\n".join(parts))


def _numbers(task, subject, arms):
    """(what goes into the JSON, rows of the table) of one task."""
    metric = subject.metrics[0]
    measure = resolve_measures(metric, subject.kind)[0]
    found, lines = {}, []
    for arm in arms:
        values = {name: [result["test"][name] for result in arm.results] for name in subject.metrics}
        interval = None
        if arm is not arms[0]:
            interval = paired_difference(measure, metric, arms[0].rows(metric), arm.rows(metric))
        tried = [
            {"signal": name, "rate": rate, "validation": score}
            for (name, rate), score in zip(arm.candidates, arm.validation, strict=True)
        ]
        found[arm.title] = {
            "test": values,
            "parameters": arm.results[0]["parameters"],
            "steps": arm.results[0]["steps"],
            "tried": tried,
            "chosen": arm.chosen,
            "minus_baseline": interval,
            "seconds": [result["seconds"] for result in arm.results],
        }
        shown = [f"{np.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in values.values()]
        chosen = "" if arm.chosen is None else f"{arm.chosen[0]}, {arm.chosen[1]:g}"
        size = f"{arm.results[0]['parameters'] / 1e6:.2f} M"
        lines.append((arm.title, chosen, *shown, size, _shown(interval, metric)))
    return {"title": subject.title, "seeds": task.seeds, "arms": found}, lines


def _shown(interval, metric):
    if interval is None:
        return "baseline"
    scale = 100 if metric in PERCENT else 1
    mean, low, high = (scale * value for value in interval)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
