"""`SelectionReport`: how a subset was made, JSON-safe, the one source for the table, the data card and the CLI."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import CheckpointError
from hfshrink.record import versions
from hfshrink.selection.dangers import summary
from hfshrink.terminal import table

FORMAT_VERSION = 1
SHOWN_CLASSES = 20  # lines of classes that the printed table has at most
FIELD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("method", "used", "why", "source"), str),
    **dict.fromkeys(("score", "scored_by", "model", "data", "split", "revision"), (str, type(None))),
    **dict.fromkeys(("rows", "size", "seed"), int),
    **dict.fromkeys(("settings", "columns", "duplicates", "held_out", "seconds", "versions", "details"), dict),
    **dict.fromkeys(("balance", "notes"), (list, tuple)),
}
"""field of a report -> what it must be when it is read."""


@dataclass(frozen=True)
class ClassShare:
    """Rows of one class, or of one value of the column that was stratified by, before and after."""

    column: str
    name: str
    full: int
    kept: int


@dataclass(frozen=True)
class SelectionReport:
    """How a subset was made; JSON-safe, the one source for the table, the data card and the CLI.

    Attributes:
        method: The method asked for.
        used: The method that `"auto"` chose, else the same.
        rows: Rows of the full data set.
        size: Rows kept.
        seed: Of all draws.
        why: Why `"auto"` chose so; empty for other methods.
        source: The paper that the method comes from.
        settings: The keywords and options that were in force.
        score: What `Subset.scores` measure; None without.
        scored_by: `"given"`, `"data map"` or `"probes on embeddings"`; None without scores.
        model: Name of the model whose embeddings or passes served; None where unknown or not needed.
        data: Name of the data set, None where it has none.
        split: Its split.
        revision: Its commit on the Hub, where it was read from there.
        columns: Column -> digest of its content in the full data set: `Subset.load` checks them.
        balance: Rows of each class, full and kept.
        duplicates: `rows` that say the same as an earlier one (exact), `groups`, those with `conflicting` labels,
            `removed` rows, the cosine `threshold`; without `rows` where they could not be counted.
        held_out: Rows of the test data given, and `overlap`, the training rows among them; empty without.
        seconds: Wall-clock time of each stage.
        notes: What the reader should know: classes with one row, columns that could not be used, ….
        versions: Packages and their versions.
        details: What other calls add, such as the coverage table and the proof.
    """

    method: str
    used: str
    rows: int
    size: int
    seed: int = 0
    why: str = ""
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    score: str | None = None
    scored_by: str | None = None
    model: str | None = None
    data: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    balance: tuple[ClassShare, ...] = ()
    duplicates: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share of the rows that is kept."""
        return self.size / self.rows

    @property
    def balance_distance(self) -> float | None:
        """Total variation Σ|p − q|/2 between the classes of the full data and of the subset; None without classes.

        Example:
            >>> shares = (ClassShare("label", "a", 3, 1), ClassShare("label", "b", 1, 1))
            >>> SelectionReport("random", "random", 4, 2, balance=shares).balance_distance
            0.25
        """
        first = [share for share in self.balance if share.column == self.balance[0].column]
        full, kept = sum(share.full for share in first), sum(share.kept for share in first)
        if not full or not kept:
            return None
        return sum(abs(share.full / full - share.kept / kept) for share in first) / 2

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in `report.json`."""
        named = {item.name: plain_json(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, **named, "fraction": self.fraction}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SelectionReport:
        """Read the JSON form.

        Raises:
            CheckpointError: It is no report, or one of another format.
        """
        if not isinstance(data, Mapping) or data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version") if isinstance(data, Mapping) else type(data).__name__
            raise CheckpointError(
                f"Expected a selection report of format {FORMAT_VERSION}, got {found!r}. "
                "Upgrade with: pip install -U hfshrink"
            )
        known = {item.name: data[item.name] for item in dataclasses.fields(cls) if item.name in data}
        for name, value in known.items():
            if not isinstance(value, FIELD_TYPES[name]) or isinstance(value, bool):
                raise CheckpointError(f"This selection report has {name}={str(value)[:60]!r}, which is no {name}.")
        try:
            known["balance"] = tuple(ClassShare(**share) for share in known.get("balance", ()))
            known["notes"] = tuple(map(str, known.get("notes", ())))
            report = cls(**{"versions": {}, **known})
        except TypeError as error:
            raise CheckpointError(f"This selection report is incomplete: {error}") from None
        _check_numbers(report)
        return report

    def __str__(self) -> str:
        warnings = summary(self.details)[1]
        parts = [self._facts(), self._classes(), *(f"warning: {text}" for text in warnings)]
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(part for part in parts if part)

    def _facts(self) -> str:
        chosen = self.method if self.method == self.used else f"{self.method} → {self.used}"
        known: dict[str, Any] = {
            "method": f"{chosen} ({self.source})" if self.source else chosen,
            "why": self.why,
            "rows kept": f"{self.size:,} of {self.rows:,} ({100 * self.fraction:.3g} %), seed {self.seed}",
            "scores": f"{self.score}, {self.scored_by}" if self.score else "",
            "model": self.model,
            "data": ", ".join(part for part in (self.data, self.split, self.revision) if part),
            "exact duplicates": _duplicates(self.duplicates),
            "rows also in the held-out data": f"{self.held_out['overlap']:,}" if "overlap" in self.held_out else "",
            "groups": summary(self.details)[0],
            "class balance": "" if self.balance_distance is None else f"total variation {self.balance_distance:.4f}",
            "seconds": ", ".join(f"{stage} {time:.1f}" for stage, time in self.seconds.items()),
        }
        return table(("what", "value"), [(name, value) for name, value in known.items() if value])

    def _classes(self) -> str:
        if not self.balance:
            return ""
        lines = [
            (share.column, share.name, f"{share.full:,}", f"{share.kept:,}", f"{100 * share.kept / share.full:.1f} %")
            for share in self.balance[:SHOWN_CLASSES]
        ]
        left = len(self.balance) - len(lines)
        more = f"\nand {left:,} more" if left else ""
        return table(("column", "class", "rows in full", "rows kept", "share kept"), lines) + more


def class_shares(
    column: str, labels: NDArray[Any], indices: NDArray[np.int64], names: Sequence[str] | None = None
) -> tuple[ClassShare, ...]:
    """Rows of each class, in the full data and in the subset.

    Args:
        column: Name of the column that the labels come from.
        labels: (n,) class numbers or names.
        indices: Rows kept.
        names: Names of class numbers; None takes the labels themselves.

    Example:
        >>> class_shares("label", np.array([0, 1, 1]), np.array([2]), ["bad", "good"])[1]
        ClassShare(column='label', name='good', full=2, kept=1)
    """
    classes, codes = np.unique(labels, return_inverse=True)
    full, kept = (np.bincount(part, minlength=len(classes)).tolist() for part in (codes, codes[indices]))
    known = names is not None and classes.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < len(names)
    titles = [names[label] if known and names is not None else str(label) for label in classes.tolist()]
    return tuple(ClassShare(column, *share) for share in zip(titles, full, kept, strict=True))


def _duplicates(found: Mapping[str, Any]) -> str:
    if "rows" not in found:
        return ""
    parts = [f"{found['rows']:,} rows"]
    parts += [f"{found['conflicting']:,} with another label"] if found.get("conflicting") else []
    threshold = found.get("threshold")
    near = "" if threshold is None else f" (equal, or cosine above {threshold:g})"
    parts += [f"{found['removed']:,} removed{near}"] if found.get("removed") is not None else ["none removed"]
    return "; ".join(parts)


def plain_json(value: Any) -> Any:
    """What JSON can hold: dataclasses as dicts, arrays as their shape, numbers that are no finite ones as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, np.generic):
        return plain_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)[:200]


def _check_numbers(report: SelectionReport) -> None:
    """Refuse a report from elsewhere whose numbers are none: they are shown and computed with."""
    counts = [number for share in report.balance for number in (share.full, share.kept)]
    counts += [report.duplicates.get(name, 0) or 0 for name in ("rows", "conflicting", "removed")]
    counts.append(report.held_out.get("overlap", 0))
    times = [*report.seconds.values(), report.duplicates.get("threshold") or 0]
    whole = all(isinstance(number, int) and number >= 0 for number in counts)
    if not (1 <= report.size <= report.rows and whole and all(isinstance(time, int | float) for time in times)):
        raise CheckpointError(
            f"This selection report of {report.size} of {report.rows} rows holds impossible numbers."
        )
    summary(report.details)  # raises for a coverage that can't be shown
    if any(share.kept > share.full or not share.full for share in report.balance):
        raise CheckpointError("This selection report claims to keep more rows of a class than there are.")
