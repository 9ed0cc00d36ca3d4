"""What `coverage` found, as a record that prints as tables and is JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.terminal import table

MOST_GROUPS = 200  # groups of one partition that a record holds
SHOWN_GROUPS = 20  # rows of a printed table


@dataclass(frozen=True)
class Thresholds:
    """From where on `coverage` warns.

    Attributes:
        min_rows: Groups with fewer rows in the full data are counted, but no warning is given for them alone. Classes
            are always judged.
        least_ratio: Warn where a group's kept share is below this part of the overall fraction…
        significance: …and chance would give so few with at most this probability, divided by the number of groups
            that are judged together (Bonferroni).
        largest_distance: Warn where the total variation is larger than that of a random subset by more than this.
        largest_radius_ratio: Warn where the distance of rows to their nearest kept row, the mean or the largest, is
            more than so many times that of a random subset.

    Raises:
        SettingError: A value out of range.
    """

    min_rows: int = 10
    least_ratio: float = 0.5
    significance: float = 0.01
    largest_distance: float = 0.1
    largest_radius_ratio: float = 1.25

    def __post_init__(self) -> None:
        limits = {"min_rows": float("inf"), "largest_radius_ratio": float("inf")}
        for name, value in dataclasses.asdict(self).items():
            high = limits.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise SettingError(f"The threshold {name} must be a number from 0 to {high}, got {value!r}.")


@dataclass(frozen=True)
class GroupShare:
    """One group of rows, full and kept.

    Attributes:
        name: Its name.
        rows: Its rows in the full data.
        kept: Its rows in the subset.
        ratio: Its kept share over the overall fraction: 1 is proportional, 0 is lost.
        chance: Probability that a random subset of that size keeps so few; only where the ratio is below the
            threshold.
    """

    name: str
    rows: int
    kept: int
    ratio: float
    chance: float | None = None


@dataclass(frozen=True)
class PartitionCoverage:
    """One way of dividing the rows.

    Attributes:
        by: What divides them, such as `"label × cluster"`.
        factors: How many factors are crossed: 2 in that case.
        groups: The groups; of more than 200 those with the least ratio.
        group_count: Number of all groups.
        lost_count: Groups of which no row is kept.
        lost_rows: Their rows in the full data.
        expected_lost: Groups that a random subset of that size loses on average.
        total_variation: ½ Σ |share in the subset − share in the full data|.
        expected_variation: The same of a random subset, on average.
        chi_squared: Pearson's statistic.
        p_value: Its p-value; None where it would not hold (`group_measures.chi_squared`).
    """

    by: str
    factors: int
    groups: tuple[GroupShare, ...]
    group_count: int
    lost_count: int
    lost_rows: int
    expected_lost: float
    total_variation: float
    expected_variation: float
    chi_squared: float
    p_value: float | None = None


@dataclass(frozen=True)
class Radius:
    """Distance from full rows to their nearest kept row, in the embeddings' unit, beside a random subset's.

    Attributes:
        largest: The largest distance: the covering radius.
        mean: The mean distance.
        random_largest: The largest of a random subset of the same size.
        random_mean: The mean of that subset.
        measured_rows: Rows that were measured: all, or a random sample where there are too many pairs.
    """

    largest: float
    mean: float
    random_largest: float
    random_mean: float
    measured_rows: int


@dataclass(frozen=True)
class Coverage:
    """What a subset keeps of each group.

    Attributes:
        rows: Rows of the full data.
        size: Rows of the subset.
        partitions: One for each way of dividing the rows: each factor, the label with each other, and all together.
        radius: Coverage in embedding space; None without embeddings.
        warnings: What is beyond the thresholds.
        notes: What could not be measured, and why.
        thresholds: The thresholds.
        seed: Of the clusters and of the random subset.
    """

    rows: int
    size: int
    partitions: tuple[PartitionCoverage, ...] = ()
    radius: Radius | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    seed: int = 0

    @property
    def lost(self) -> tuple[GroupShare, ...]:
        """The recorded groups of single factors of which no row is kept, the largest first."""
        found = (g for part in self.partitions if part.factors == 1 for g in part.groups if not g.kept)
        return tuple(sorted(found, key=lambda group: -group.rows))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coverage:
        """Read the JSON form.

        Raises:
            CheckpointError: It is no record of a coverage.
        """
        try:
            known = dict(data)
            known["partitions"] = tuple(
                PartitionCoverage(**{**part, "groups": tuple(GroupShare(**group) for group in part["groups"])})
                for part in known.get("partitions", ())
            )
            known["radius"] = None if known.get("radius") is None else Radius(**known["radius"])
            known["thresholds"] = Thresholds(**known.get("thresholds", {}))
            known["warnings"], known["notes"] = (tuple(map(str, known.get(key, ()))) for key in ("warnings", "notes"))
            return cls(**known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"Expected a record of a subset's coverage, got {str(data)[:80]}: {error}") from None

    def __str__(self) -> str:
        parts = [f"{self.size:,} of {self.rows:,} rows kept ({100 * self.size / self.rows:.3g} %)"]
        parts += [self._partition_table(), *(_group_table(part) for part in self.partitions)]
        if self.radius is not None:
            parts.append(_radius_table(self.radius, self.rows))
        parts += [f"warning: {text}" for text in self.warnings]
        parts += [f"not measured: {text}" for text in self.notes]
        return "\n\n".join(part for part in parts if part)

    def _partition_table(self) -> str:
        header = ("divided by", "groups", "lost (rows)", "lost by chance", "total variation (random)", "χ²", "p")
        rows = [
            (
                part.by,
                f"{part.group_count:,}",
                f"{part.lost_count:,} ({part.lost_rows:,})",
                f"{part.expected_lost:.1f}",
                f"{part.total_variation:.3f} ({part.expected_variation:.3f})",
                f"{part.chi_squared:.1f}",
                "" if part.p_value is None else f"{part.p_value:.2g}",
            )
            for part in self.partitions
        ]
        return table(header, rows) if rows else ""


def _group_table(part: PartitionCoverage) -> str:
    groups, crossed = part.groups, part.factors > 1
    if crossed or len(groups) > SHOWN_GROUPS:
        groups = tuple(sorted(groups, key=lambda group: (group.ratio, -group.rows)))[: 5 if crossed else SHOWN_GROUPS]
    more = "" if len(groups) == part.group_count else f" (the {len(groups)} least kept of {part.group_count:,})"
    rows = [(g.name, f"{g.rows:,}", f"{g.kept:,}", f"{g.ratio:.2f}") for g in groups]
    return table((f"{part.by}{more}", "rows", "kept", "share kept / overall"), rows)


def _radius_table(radius: Radius, rows: int) -> str:
    sample = "" if radius.measured_rows == rows else f", {radius.measured_rows:,} rows sampled"
    return table(
        (f"distance to the nearest kept row{sample}", "subset", "random subset"),
        [
            ("mean", f"{radius.mean:.4g}", f"{radius.random_mean:.4g}"),
            ("largest", f"{radius.largest:.4g}", f"{radius.random_largest:.4g}"),
        ],
    )
