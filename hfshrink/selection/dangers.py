"""What a subset leaves out, measured as a part of `select`: the coverage of its groups, with warnings."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.coverage_table import Coverage, Thresholds
from hfshrink.selection.groups import coverage
from hfshrink.selection.partitions import MOST_VALUES

if TYPE_CHECKING:
    from hfshrink.selection.request import Request

logger = logging.getLogger(__name__)

PAIRS = 3 * 10**8  # full × kept rows up to which `select` computes distances unasked: some seconds


def read_thresholds(given: Any) -> Thresholds:
    """`Thresholds`, or a mapping of some of them; None is the usual ones.

    Raises:
        SettingError: An unknown name, or a value out of range.

    Example:
        >>> read_thresholds({"min_rows": 3}).min_rows
        3
    """
    if given is None or isinstance(given, Thresholds):
        return given or Thresholds()
    names = tuple(Thresholds.__dataclass_fields__)
    if not isinstance(given, Mapping) or not set(given) <= set(names):
        raise SettingError(f"thresholds must be Thresholds, or a mapping of {', '.join(names)}; got {given!r}.")
    return Thresholds(**given)


def measure_coverage(
    request: Request, indices: NDArray[np.int64], vectors: NDArray[Any] | None
) -> dict[str, Any] | None:
    """The coverage of a subset as JSON; its warnings are logged at once.

    Clusters and distances are measured where there are embeddings already, and up to 3·10⁸ pairs of a row and a kept
    row, unless the option `coverage=True` asks for them at any size.

    Args:
        request: The checked request; the options `coverage`, `columns` and `thresholds` are read.
        indices: The kept rows.
        vectors: (n, d) embeddings of all rows, where there are some.

    Returns:
        None where the caller switched it off, or it can't be measured (a note says why).
    """
    options, rows = request.settings.options, request.rows
    wanted = options.get("coverage")
    if wanted is False:
        return None
    skipped: list[str] = []
    if vectors is not None and wanted is None and len(rows) * len(indices) > PAIRS:
        skipped.append(
            f"clusters and distances: {len(rows):,} × {len(indices):,} pairs of rows are more than {PAIRS:,}; "
            "ask for them with coverage=True."
        )
        vectors = None
    clusters = 20
    if vectors is not None and importlib.util.find_spec("sklearn") is None:
        skipped.append("clusters: scikit-learn is not installed.")
        clusters = 0
    try:
        found = coverage(
            rows,
            indices,
            labels=request.labels.values,
            embeddings=vectors,
            columns=_columns(request),
            clusters=clusters,
            text_columns=_text_columns(request),
            thresholds=read_thresholds(options.get("thresholds")),
            seed=request.settings.seed,
        )
    except SettingError as error:
        request.notes.append(f"Coverage was not measured: {error}")
        return None
    if found.warnings:
        logger.warning("What this subset leaves out:\n- %s", "\n- ".join(found.warnings))
    notes = [note for note in found.notes if not (skipped and note.startswith("clusters and distances"))]
    return {**found.to_dict(), "notes": [*notes, *skipped]}


def summary(details: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """One line of the coverage in a report's `details`, and its warnings; both empty without one.

    Raises:
        CheckpointError: What stands there is no record of coverage.

    Example:
        >>> summary({"coverage": Coverage(10, 5, warnings=("by label: …",)).to_dict()})
        ('0 of 0 groups lost; 1 warning', ('by label: …',))
    """
    if details.get("coverage") is None:
        return "", ()
    found = Coverage.from_dict(details["coverage"])
    single = [(part.lost_count, part.group_count) for part in found.partitions if part.factors == 1]
    if not all(isinstance(count, int) for pair in single for count in pair):
        raise CheckpointError(f"This record of coverage holds impossible numbers of groups: {str(single)[:80]}.")
    lost, groups = (sum(counts) for counts in zip(*single, strict=True)) if single else (0, 0)
    count = len(found.warnings)
    warned = f"{count} warning{'s' * (count > 1)}" if count else "no warnings"
    return f"{lost:,} of {groups:,} groups lost; {warned}", found.warnings


def _columns(request: Request) -> list[str]:
    """The metadata columns that were named, and the one that was stratified by."""
    labels, names = request.labels, list(request.settings.columns)
    stratified = labels.strata_column
    if stratified not in (None, labels.column, *names) and labels.strata is not None:
        names += [str(stratified)] * (len(np.unique(labels.strata)) <= MOST_VALUES)
    return names


def _text_columns(request: Request) -> list[str] | None:
    """The columns of text whose lengths are told; None where the rows are encoded, or no texts."""
    texts, features = request.texts, request.rows.features
    if texts is None or "input_ids" in texts.columns:
        return None
    inner = {name: getattr(features[name], "feature", features[name]) for name in texts.columns}
    return [name for name, feature in inner.items() if "string" in str(getattr(feature, "dtype", ""))] or None
