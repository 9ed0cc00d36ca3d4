"""`Proof`: what training on a subset, on all rows and on random ones came to; JSON-safe, the source of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.record import versions
from hfshrink.selection.caching import array_digest
from hfshrink.selection.selection_report import plain_json
from hfshrink.terminal import table

if TYPE_CHECKING:
    from hfshrink.selection import Subset

FORMAT_VERSION = 1
METRICS = ("accuracy", "precision", "recall", "f1")  # but for accuracy means over the classes
DATA = {"test": "test", "out_of_distribution": "OOD"}


@dataclass(frozen=True)
class Interval:
    """A mean over the seeds with its 95 % interval; the ends are None where it is undefined."""

    value: float
    low: float | None = None
    high: float | None = None

    def show(self, form: str = ".4f") -> str:
        """The value with its interval, each in one of Python's formats."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{ends}"


@dataclass(frozen=True)
class Scores:
    """How the models of one arm did on one held-out data set.

    Attributes:
        accuracy: Share of right rows.
        precision: Mean over the classes.
        recall: Mean over the classes.
        f1: Mean over the classes.
        worst_class: Name of the class with the lowest recall, in the mean of the seeds.
        worst_recall: That recall.
    """

    accuracy: Interval
    precision: Interval
    recall: Interval
    f1: Interval
    worst_class: str
    worst_recall: float


@dataclass(frozen=True)
class Arm:
    """One way of choosing the training rows and the length of training.

    Attributes:
        data: `"full"`, `"subset"` or `"random"` (as many rows as the subset has, another draw for each seed).
        equal: What is as in the full run: `"epochs"` or `"steps"`; None for the full run itself.
        rows: Training rows.
        epochs: Passes over them.
        steps: Optimizer steps.
        seconds: Wall-clock time of the training alone, mean over the seeds.
        steps_saved: Fewer steps than the full run; None for the full run.
        seconds_saved: Fewer seconds than the full run, mean over the seeds; None for the full run.
        train_accuracy: Accuracy on a sample of the arm's own training rows; None where they have no labels.
        gap: `train_accuracy` less the accuracy on the test rows.
        test: On the test rows.
        out_of_distribution: On the rows from another source; None without.
        runs: Of each seed: seed, steps, seconds, accuracy and f1 on the test rows.
    """

    data: str
    equal: str | None
    rows: int
    epochs: float
    steps: int
    seconds: float
    steps_saved: int | None
    seconds_saved: float | None
    train_accuracy: float | None
    gap: float | None
    test: Scores
    out_of_distribution: Scores | None = None
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.data if self.equal is None else f"{self.data}, equal {self.equal}"

    @property
    def saved(self) -> str:
        """Steps and seconds less than the full run took; empty for the full run."""
        return "" if self.steps_saved is None else f"{self.steps_saved:,} steps, {self.seconds_saved or 0:.1f} s"


@dataclass(frozen=True)
class Difference:
    """The subset less another arm, on the same rows and with the same seeds.

    Attributes:
        against: `"random"` or `"full"`.
        equal: `"epochs"` or `"steps"`.
        data: `"test"` or `"out_of_distribution"`.
        metric: `"accuracy"` or `"f1"`.
        difference: Subset less the other, with the paired 95 % interval.
        verdict: `"better"` or `"worse"` where the interval leaves out 0, else `"not told apart"`.
    """

    against: str
    equal: str
    data: str
    metric: str
    difference: Interval
    verdict: str


@dataclass(frozen=True)
class Proof:
    """What training on a subset came to, against all rows and against random ones. `print(proof)` shows the tables.

    Attributes:
        task: `"text-classification"` or `"image-classification"`.
        model: Name of the model, or of its class.
        trainer: Name of the Trainer's class; of several joined by "+".
        rows: Rows of the full data set.
        size: Rows of the subset.
        subset: Digest of the subset's row numbers; None where it is rows of its own.
        seeds: Of the runs: each makes the head, the order of the rows and the random subset.
        resamples: Of the intervals.
        arms: The full run first.
        differences: The subset against random and full.
        test: `name`, `rows`, `overlap` (rows also in the training data) and `removed`, those left out for it.
        out_of_distribution: The same of the rows from another source; empty without.
        settings: Of the training, and what the Trainer was given besides.
        selection_seconds: What picking the subset took, by its report; None where unknown.
        machine: `processor`, `device` and `threads`, as of the last call.
        notes: What the reader should know.
        versions: Packages and their versions.
    """

    task: str
    model: str
    trainer: str
    rows: int
    size: int
    subset: str | None
    seeds: tuple[int, ...]
    resamples: int
    arms: tuple[Arm, ...]
    differences: tuple[Difference, ...] = ()
    test: dict[str, Any] = field(default_factory=dict)
    out_of_distribution: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    selection_seconds: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it goes into a subset's report."""
        return {"format_version": FORMAT_VERSION, **plain_json(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Proof:
        """Read the JSON form.

        Raises:
            CheckpointError: It is no proof, or one of another format.
        """
        found = data.get("format_version") if isinstance(data, Mapping) else type(data).__name__
        if found != FORMAT_VERSION:
            raise CheckpointError(f"Expected a proof of format {FORMAT_VERSION}, got {found!r}. Upgrade hfshrink.")
        try:
            known = {item.name: data[item.name] for item in dataclasses.fields(cls) if item.name in data}
            known["arms"] = tuple(_arm(arm) for arm in known["arms"])
            known["differences"] = tuple(
                Difference(**{**item, "difference": _interval(item["difference"])})
                for item in known.get("differences", ())
            )
            known |= {name: tuple(known.get(name, ())) for name in ("seeds", "notes")}
            proof = cls(**known)
            str(proof)  # what can't be shown is none
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise CheckpointError(f"This proof is incomplete or damaged: {error!r}") from None
        return proof

    def attach(self, subset: Subset) -> Subset:
        """The subset with this proof in its report, where its data card finds it.

        Raises:
            SettingError: The proof is of another subset.
        """
        rows, size = subset.report.rows, len(subset)
        other = self.subset is not None and self.subset != array_digest(subset.indices)
        if (rows, size) != (self.rows, self.size) or other:
            raise SettingError(
                f"This proof is of another subset: {self.size:,} of {self.rows:,} rows, got {size:,} of {rows:,}"
                f"{' others' if (rows, size) == (self.rows, self.size) else ''}. Attach it to the one it was made of."
            )
        details = {**subset.report.details, "proof": self.to_dict()}
        return dataclasses.replace(subset, report=dataclasses.replace(subset.report, details=details))

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"
        head = (
            f"{self.model}, {self.task}: {self.size:,} of {self.rows:,} rows, {seeds}, {self.test['rows']:,} test rows"
        )
        parts = [head, self._arm_table(), self._difference_table(), *(f"note: {note}" for note in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def _arm_table(self) -> str:
        outside = bool(self.out_of_distribution)
        header = ["arm", "rows", "epochs", "steps", "accuracy", "precision, recall", "macro F1"]
        header += ["worst class", "train - test"]
        header += ["OOD accuracy"] * outside + ["seconds", "saved"]
        lines = []
        for arm in self.arms:
            worst = f"{arm.test.worst_class} {arm.test.worst_recall:.4f}"
            gap = "not measured" if arm.gap is None else f"{arm.gap:+.4f}"
            line = [arm.title, f"{arm.rows:,}", f"{arm.epochs:.3g}", f"{arm.steps:,}", arm.test.accuracy.show()]
            line += [f"{arm.test.precision.value:.4f}, {arm.test.recall.value:.4f}", arm.test.f1.show(), worst, gap]
            other = arm.out_of_distribution
            line += ["not measured" if other is None else other.accuracy.show()] * outside
            lines.append([*line, f"{arm.seconds:.1f}", arm.saved])
        return table(header, lines)

    def _difference_table(self) -> str:
        lines = [
            (
                f"subset - {item.against}, equal {item.equal}",
                f"{item.metric} ({DATA[item.data]})",
                item.difference.show("+.4f"),
                item.verdict,
            )
            for item in self.differences
        ]
        return table(("difference", "metric", "value [95 % interval]", "interval says"), lines) if lines else ""


def _arm(data: Mapping[str, Any]) -> Arm:
    outside = data.get("out_of_distribution")
    return Arm(
        **{
            **data,
            "test": _scores(data["test"]),
            "out_of_distribution": None if outside is None else _scores(outside),
            "runs": tuple(dict(run) for run in data.get("runs", ())),
        }
    )


def _scores(data: Mapping[str, Any]) -> Scores:
    return Scores(**{**data, **{name: _interval(data[name]) for name in METRICS}})


def _interval(data: Mapping[str, Any]) -> Interval:
    return Interval(**data)
