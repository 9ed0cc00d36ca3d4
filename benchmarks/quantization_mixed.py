"""Mixed precision on MiniLM-L6, movie reviews: what measured plans lose against uniform bits at equal bytes.

The divergence KL(float, rounded) of each (module, precision) is measured on 256 training rows, and the knapsack's plan
under a byte budget is compared with one precision for all modules, and with random plans that fill the same budget.
All plans are measured on 1,000 other training rows, where the float model is at its best, and on the test rows. There
it is too sure of itself, and rounding may even lower the loss: the divergence KL(float, plan) counts. Neither chooses
anything. Scales are those of `scheme="mixed"`: one per 64 weights, per row at 8 bits; all else stays float; bytes are
those of the 37 weights and their scales. One thread. What was measured is kept in runs/quantization/mixed.
"""

import argparse
import json
import os
import random

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import torch
from common import ROOT, be_quiet, save
from distillation_data import movie
from torch import nn

from distillation import teacher_of
from hfshrink.calibration import batches
from hfshrink.modules import head_names
from hfshrink.quantization.search.plan import Together, make_plan, measure_rises, trial_of
from hfshrink.quantization.search.precisions import PRECISIONS, weight_bytes
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "quantization" / "mixed"
NAMES = ("int2", "int3", "int4", "int8")
BUDGETS = {
    "int4 everywhere": ("int4",),
    "half of int3 and int4": ("int3", "int4"),
    "int3 everywhere": ("int3",),
    "half of int2 and int3": ("int2", "int3"),
}
SAMPLES, OTHERS = 256, 1000
SEEDS = (0, 1, 2)


def trial(name):
    return trial_of(PRECISIONS[name])


def linears(model):
    heads = head_names(model)
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n not in heads}


def rises_on(model, rows):
    """Rises of each module and precision, measured once."""
    names, rises = list(linears(model)), {}
    RUNS.mkdir(parents=True, exist_ok=True)
    for precision in NAMES:
        file = RUNS / f"divergences_{precision}.json"
        if not file.is_file():
            found = measure_rises(model, rows, names, {precision: trial(precision)}, samples=SAMPLES)
            file.write_text(json.dumps(found, indent=1) + "\n")
        for name, row in json.loads(file.read_text()).items():
            rises.setdefault(name, {}).update(row)
    return rises


def random_plan(sizes, budget, seed):
    """Precisions drawn one by one: a random module gets the next larger one that fits, until none does."""
    draw = random.Random(seed)
    steps = {name: sorted(row, key=row.get) for name, row in sizes.items()}
    places = dict.fromkeys(sizes, 0)
    left = budget - sum(sizes[name][steps[name][0]] for name in sizes)
    while True:
        fitting = [
            name
            for name, place in places.items()
            if place + 1 < len(steps[name])
            and sizes[name][steps[name][place + 1]] - sizes[name][steps[name][place]] <= left
        ]
        if not fitting:
            return {name: steps[name][place] for name, place in places.items()}
        name = draw.choice(fitting)
        left -= sizes[name][steps[name][places[name] + 1]] - sizes[name][steps[name][places[name]]]
        places[name] += 1


def kendall_tau(first, second, groups=None):
    """Share of pairs in the same order less that of pairs in the other, of all pairs or of those in one group."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i) if groups is None or groups[i] == groups[j]]
    return float(np.mean([np.sign((first[i] - first[j]) * (second[i] - second[j])) for i, j in pairs]))


class Bench:
    """The model, its rows, and what was measured of plans."""

    def __init__(self):
        self.model, rows = teacher_of(movie, 0), movie().rows
        self.modules = linears(self.model)
        self.train = rows["train"]
        seen = {
            row * len(self.train) // SAMPLES for row in range(SAMPLES)
        }  # as hfshrink.calibration.batches takes them
        others = [row for row in range(len(self.train)) if row not in seen][:OTHERS]
        self.parts = {"train": _by_length(self.train.select(others)), "test": _by_length(rows["test"])}
        self.sizes = {
            name: {p: weight_bytes(tuple(module.weight.shape), PRECISIONS[p]) for p in NAMES}
            for name, module in self.modules.items()
        }
        self.logits = {part: self._answer(part, {})[0] for part in self.parts}
        file = RUNS / "plans.json"
        self.known = json.loads(file.read_text()) if file.is_file() else {}

    def bytes_of(self, precisions):
        return sum(self.sizes[name][precision] for name, precision in precisions.items())

    def uniform(self, name):
        return dict.fromkeys(self.modules, name)

    def _answer(self, part, precisions):
        """Logits (rows, classes) and labels (rows,) of a plan."""
        found = []
        trials = {name: trial(precision) for name, precision in precisions.items()}
        with torch.no_grad(), Together(trials).apply(self.model, "plan", 1.0):
            for batch in batches(self.parts[part], self.model, batch_size=32):
                labels = batch.pop("labels")
                found.append((self.model(**batch).logits, labels))
        return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])

    def measure(self, precisions):
        """Of each part: loss rise, KL(float, plan), accuracy of both."""
        key = " ".join(precisions[name] for name in self.modules)
        if key not in self.known:
            found = {}
            for part, dense in self.logits.items():
                logits, labels = self._answer(part, precisions)
                losses = [float(nn.functional.cross_entropy(side, labels)) for side in (dense, logits)]
                sides = dense.log_softmax(-1), logits.log_softmax(-1)
                found[part] = {
                    "dense_loss": losses[0],
                    "rise": losses[1] - losses[0],
                    "divergence": float((sides[0].exp() * (sides[0] - sides[1])).sum(-1).mean()),
                    "dense_accuracy": float((dense.argmax(-1) == labels).float().mean()),
                    "accuracy": float((logits.argmax(-1) == labels).float().mean()),
                }
            self.known[key] = found
            (RUNS / "plans.json").write_text(json.dumps(self.known, indent=1) + "\n")
        return self.known[key]


def _by_length(rows):
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")  # little padding
    return rows.select(order)


def run(bench):
    """All plans at all budgets."""
    rises, rows = rises_on(bench.model, bench.train), []
    for title, parts in BUDGETS.items():
        budget = sum(bench.bytes_of(bench.uniform(part)) for part in parts) // len(parts)
        arms = {"mixed": make_plan(rises, bench.sizes, budget).precisions}
        if len(parts) == 1:
            arms["uniform"] = bench.uniform(parts[0])
        arms |= {f"random {seed}": random_plan(bench.sizes, budget, seed) for seed in SEEDS}
        for arm, precisions in arms.items():
            facts = {"budget": title, "budget_bytes": budget, "arm": arm, "bytes": bench.bytes_of(precisions)}
            facts["predicted"] = sum(max(rises[name][p], 0.0) for name, p in precisions.items())
            facts["counts"] = {p: list(precisions.values()).count(p) for p in NAMES}
            rows.append({**facts, **bench.measure(precisions)})
    predicted, budgets = [row["predicted"] for row in rows], [row["budget"] for row in rows]
    taus = {
        f"{part} {what}": {
            "all": kendall_tau(predicted, [row[part][what] for row in rows]),
            "equal_bytes": kendall_tau(predicted, [row[part][what] for row in rows], budgets),
        }
        for part in bench.parts
        for what in ("rise", "divergence")
    }
    return {"rows": rows, "kendall_tau": taus}


def render(data):
    """Tables of what was measured."""
    lines = []
    for row in data["rows"]:
        same = [other for other in data["rows"] if other["budget"] == row["budget"] and other["arm"] == "uniform"]
        counts = ", ".join(f"{number} × {name}" for name, number in row["counts"].items() if number)
        lines.append(
            (
                row["budget"],
                row["arm"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['predicted']:.4f}",
                f"{row['train']['rise']:+.4f}" + _share(row, same, "train", "rise"),
                f"{row['test']['rise']:+.4f}",
                f"{row['test']['divergence']:.4f}" + _share(row, same, "test", "divergence"),
                f"{100 * row['test']['accuracy']:.1f}",
                counts,
            )
        )
    header = ("budget", "plan", "MB", "predicted divergence", "rise, other training rows (of uniform)", "rise, test")
    header += ("divergence, test (of uniform)", "accuracy, test, %", "modules")
    first, taus = data["rows"][0], data["kendall_tau"]
    dense = f"Float model: loss {first['train']['dense_loss']:.4f} on the other training rows, "
    dense += (
        f"{first['test']['dense_loss']:.4f} on the test rows, accuracy {100 * first['test']['dense_accuracy']:.1f} %."
    )
    taus = [taus[name] for name in ("train rise", "test divergence")]
    tau = f"Kendall's tau of the predicted divergence, {len(lines)} plans: {taus[0]['all']:.2f} with the rise on the "
    tau += f"other training rows, {taus[1]['all']:.2f} with the divergence on the test rows; of plans of equal bytes "
    tau += f"{taus[0]['equal_bytes']:.2f} and {taus[1]['equal_bytes']:.2f}."
    title = "# Mixed precision of weights: MiniLM-L6, movie reviews"
    save("quantization_mixed", data, f"{title}\n\n{dense}\n\n{table(header, lines)}\n\n{tau}")


def _share(row, same, part, what):
    return f" ({row[part][what] / same[0][part][what]:.2f})" if same and same[0][part][what] > 0 else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    be_quiet()
    render(run(Bench()))


if __name__ == "__main__":
    main()
