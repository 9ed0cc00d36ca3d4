"""Tables of the selection benchmark: accuracy by method and size, paired intervals, and what the targets say."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from common import save
from selection_data import DATA

from hfshrink.terminal import table

HEADS = {"logistic": "logistic regression", "network": "a network of 64 hidden units"}
HARDEST = ("el2n", "grand", "forgetting", "aum", "hard")
BASELINES = ("random", "random, not stratified", "auto", "full")
RESAMPLES = 2000
NOTES = """Accuracy in %, mean over seeds. + or −: the 95 % interval of the difference from random rows, stratified
by class, lies above or below 0; it resamples seeds and test rows, both paired. Of so many comparisons chance alone
turns up some: one in forty on either side. Settings of the heads are chosen on validation rows, for each run anew."""


@dataclass(frozen=True, eq=False)
class Grid:
    """All runs of one data set.

    Attributes:
        name: Key of `DATA`.
        truth: (rows,) classes of the test rows.
        results: arm -> what each seed's `result.json` holds.
        answers: arm -> "size/head" -> (seeds, rows) classes that the heads gave the test rows.
    """

    name: str
    truth: np.ndarray
    results: dict[str, list[dict[str, Any]]]
    answers: dict[str, dict[str, np.ndarray]]

    @property
    def sizes(self):
        """Titles of the sizes."""
        return list(self.results["random"][0]["sizes"])

    @cache  # noqa: B019 there are three of them
    def scores(self, arm, size, head):
        """Metric -> (resamples + 1, seeds)."""
        return scores(self.truth, self.answers[arm][f"{'100%' if arm == 'full' else size}/{head}"])

    def mean(self, arm, size, head, metric="accuracy"):
        return float(self.scores(arm, size, head)[metric][-1].mean())

    def minus(self, arm, other, size, head, metric="accuracy"):
        """(mean, low, high) of the difference."""
        return difference(self.scores(other, size, head)[metric], self.scores(arm, size, head)[metric])

    def best_other(self, size, head="logistic"):
        """The method besides random and auto that does best on the validation rows, over all seeds."""

        def validation(arm):
            return np.mean([result["sizes"][size][head]["validation"] for result in self.results[arm]])

        return max((arm for arm in self.results if arm not in BASELINES), key=validation)

    def used(self, size):
        """What auto was."""
        return ", ".join(sorted({result["sizes"][size]["used"] for result in self.results["auto"]}))


@cache
def row_weights(rows):
    """(resamples + 1, rows): how often each test row is drawn; the last line takes each once."""
    generator = np.random.default_rng(0)
    weights = [np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(RESAMPLES)]
    return np.vstack([*weights, np.ones(rows)]).astype(np.float32)


def scores(truth, answers):
    """Accuracy, macro F1 and the recall of the worst class of answers (seeds, rows): (resamples + 1, seeds) each."""
    weights, right = row_weights(len(truth)), answers == truth
    f1, recall = [], []
    for label in np.unique(truth):
        support = weights @ (truth == label).astype(np.float32)[:, None]
        found = weights @ (right & (truth == label)).T.astype(np.float32)
        claimed = weights @ (answers == label).T.astype(np.float32)
        f1.append(2 * found / np.maximum(claimed + support, 1))
        recall.append(found / np.maximum(support, 1))
    accuracy = weights @ right.T.astype(np.float32) / weights.sum(axis=1, keepdims=True)
    return {"accuracy": accuracy, "macro_f1": np.mean(f1, axis=0), "worst_class": np.min(recall, axis=0)}


def difference(before, after):
    """(mean, low, high) of after − before, both (resamples + 1, seeds): 95 % of resampled rows and seeds."""
    change = after - before
    seeds = np.random.default_rng(1).integers(change.shape[1], size=change[:-1].shape)
    low, high = np.percentile(np.take_along_axis(change[:-1], seeds, axis=1).mean(axis=1), [2.5, 97.5])
    return [float(change[-1].mean()), float(low), float(high)]


def shown(interval):
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def render(grids):
    """Write results/selection.json and .md."""
    if not grids:
        print("No data set is complete.")
        return
    found = {grid.name: _numbers(grid) for grid in grids}
    parts = [NOTES]
    for grid in grids:
        about = f"{len(grid.truth):,} test rows, {len(grid.results['random'])} seeds"
        parts.append(f"## {grid.name}: {DATA[grid.name]().title}; {about}")
        for head, title in HEADS.items():
            parts.append(f"### {grid.name}, {title}\n\n{_grid_table(grid, head, found[grid.name])}")
            parts.append(_auto_table(grid, head))
        parts.append(f"### {grid.name}, CPU seconds\n\n{_cost_table(found[grid.name])}")
    targets = _targets(grids)
    lines = [(name, "met" if met else "missed", text) for name, met, text in targets]
    parts.append(f"## Targets\n\n{table(('target', '', 'found'), lines)}")
    listed = [{"target": name, "met": bool(met), "found": text} for name, met, text in targets]
    save("selection", {"data": found, "targets": listed}, "\n\n".join(parts))


def _numbers(grid):
    """What goes into the JSON."""
    found = {}
    for arm, results in grid.results.items():
        sizes = {}
        for size, first in results[0]["sizes"].items():
            sizes[size] = {"rows": first["rows"], "used": sorted({r["sizes"][size]["used"] for r in results})}
            sizes[size]["cpu_seconds"] = [round(result["sizes"][size]["seconds"], 3) for result in results]
            for head in HEADS:
                values = grid.scores(arm, size, head)
                about = {metric: [round(float(v), 4) for v in value[-1]] for metric, value in values.items()}
                about["chosen"] = [result["sizes"][size][head]["chosen"] for result in results]
                about["validation"] = [round(result["sizes"][size][head]["validation"], 4) for result in results]
                for other in ("random", "full") if arm != "full" else ():
                    pairs = {metric: grid.minus(arm, other, size, head, metric) for metric in values}
                    about[f"minus_{other}"] = {key: [round(v, 4) for v in value] for key, value in pairs.items()}
                sizes[size][head] = about
        probes = [result["probe_seconds"] for result in results]
        found[arm] = {"sizes": sizes, "probe_seconds": probes, "cpu_seconds": [r["cpu_seconds"] for r in results]}
    seeds = len(grid.results["random"])
    return {"title": DATA[grid.name]().title, "test_rows": len(grid.truth), "seeds": seeds, "arms": found}


def _grid_table(grid, head, numbers):
    rows = {size: about["rows"] for size, about in numbers["arms"]["random"]["sizes"].items()}
    lines = []
    for arm in grid.results:
        if arm == "full":
            continue
        line = [arm]
        for size in grid.sizes:
            _, low, high = numbers["arms"][arm]["sizes"][size][head]["minus_random"]["accuracy"]
            mark = "+" if low > 0 else "−" if high < 0 else " "
            line.append(f"{100 * grid.mean(arm, size, head):.1f}{mark}")
        lines.append(line)
    full = f"All rows: {100 * grid.mean('full', '100%', head):.1f}."
    return table(("method", *(f"{size} ({count:,})" for size, count in rows.items())), lines) + f"\n\n{full}"


def _auto_table(grid, head):
    header = ("size", "auto is", "accuracy", "macro F1", "worst class", "accuracy − random [95 %]")
    lines = []
    for size in grid.sizes:
        values = [f"{100 * grid.mean('auto', size, head, m):.1f}" for m in ("accuracy", "macro_f1", "worst_class")]
        compared = [shown(grid.minus("auto", other, size, head)) for other in ("random", "full")]
        f1 = shown(grid.minus("auto", "random", size, head, "macro_f1"))
        lines.append((size, grid.used(size), *values, compared[0], f1, compared[1]))
    return table((*header, "macro F1 − random", "accuracy − full"), lines)


def _cost_table(numbers):
    """Picking alone, the mean over seeds; probes serve all methods that rank."""
    arms, lines = numbers["arms"], []
    sizes = list(arms["random"]["sizes"])
    for arm, about in arms.items():
        if arm != "full":
            seconds = [np.mean(about["sizes"][size]["cpu_seconds"]) for size in sizes]
            probes = "" if about["probe_seconds"][0] is None else f"{np.mean(about['probe_seconds']):.1f}"
            lines.append((arm, *(f"{value:.2f}" for value in seconds), probes))
    return table(("method", *sizes, "its probes, once"), lines)


def _targets(grids):
    """(target, whether it is met, what was found) of each target and data set."""
    found = []
    for grid in grids:
        cells = [(size, head, grid.minus("auto", "random", size, head)) for size in grid.sizes for head in HEADS]
        lost = [f"{size}, {head}: {shown(interval)}" for size, head, interval in cells if interval[2] < 0]
        text = "; ".join(lost) or f"none of {len(cells)}; the least is {shown(min(i for *_, i in cells))}"
        found.append((f"{grid.name}: auto nowhere below random beyond noise", not lost, text))
        found += _few_rows(grid)
        minus = {head: grid.minus("auto", "full", "30%", head) for head in HEADS}
        text = "; ".join(f"{head}: {shown(interval)}" for head, interval in minus.items())
        met = all(interval[0] >= -0.01 for interval in minus.values())
        found.append((f"{grid.name}: auto at 30 % within 1 point of all rows", met, text))
        minus = {arm: grid.minus(arm, "random", "10%", "logistic") for arm in HARDEST}
        text = "; ".join(f"{arm} {shown(interval)}" for arm, interval in minus.items())
        met = all(interval[2] < 0 for interval in minus.values())
        found.append((f"{grid.name}: hardest-first loses at 10 %", met, text))
    return found


def _few_rows(grid):
    """5 points over random rows at 5 to 20 a class, by k-means or auto."""
    found = []
    for arm in ("kmeans", "auto"):
        minus = {size: grid.minus(arm, "random", size, "logistic") for size in grid.sizes if "class" in size}
        text = "; ".join(f"{size} {shown(interval)}" for size, interval in minus.items())
        met = all(interval[0] >= 0.05 for interval in minus.values())
        found.append((f"{grid.name}: {arm} 5 points above random at 5, 10, 20 a class", met, text))
    return found
