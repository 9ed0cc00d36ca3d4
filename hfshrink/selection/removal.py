"""Rows that say the same as others: counted, removed before the picking, and looked for in the test data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import budgets_left
from hfshrink.selection.contents import RowTexts
from hfshrink.selection.deduplication import find_duplicates, find_overlap, without_duplicates
from hfshrink.selection.embeddings import embed
from hfshrink.selection.methods import Choice
from hfshrink.selection.request import EMBED_OPTIONS, Request

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]
THRESHOLD = 0.95  # cosine above which rows are near-duplicates where the caller names none
SHOWN_ROWS = 20  # row numbers that a report names


def duplicate_threshold(request: Request, choice: Choice) -> float | None:
    """The cosine above which rows are removed; None where only equal ones are, or none."""
    if not removes_duplicates(request, choice) or not request.sources.has_embeddings:
        return None
    return request.settings.threshold or THRESHOLD


def removes_duplicates(request: Request, choice: Choice) -> bool:
    """Whether the caller, or `"auto"`, wants duplicates out."""
    wanted = request.settings.deduplicate
    return choice.deduplicate if wanted is None else bool(wanted)


def remove_duplicates(
    request: Request, choice: Choice, vectors: Callable[[], NDArray[Any]]
) -> tuple[Indices, dict[str, Any]]:
    """The rows that may be picked, and what was found.

    Where `"auto"` asked for it, at most half of the rows that leave are removed here, equal ones before near ones:
    some models give all rows a cosine above the threshold. Where the caller did, all are, and the subset may come out
    smaller.

    Args:
        request: The checked request.
        choice: What runs.
        vectors: Gives the embeddings.

    Returns:
        Rising row numbers, and the report's `duplicates`.
    """
    found: dict[str, Any] = {}
    n, texts, seed = len(request.rows), cast("Sequence[str] | None", request.texts), request.settings.seed
    groups = []
    if texts is None:
        request.notes.append("No text, tokens or images were found to compare: equal rows were not counted.")
    else:
        groups = find_duplicates(texts=texts)
        found = {"rows": sum(len(group) - 1 for group in groups), "groups": len(groups)}
        values = request.labels.values
        if values is not None:
            found["conflicting"] = sum(int((values[group[1:]] != values[group[0]]).sum()) for group in groups)
    if not removes_duplicates(request, choice):
        return np.arange(n), found
    threshold = duplicate_threshold(request, choice)
    kept = different = without_duplicates(n, groups)
    if threshold is not None:
        kept = without_duplicates(n, find_duplicates(vectors(), threshold, texts, seed=seed))
    if request.settings.deduplicate is None:
        kept = refilled(refilled(kept, different, n - (n - request.size) // 2, seed), np.arange(n), request.size, seed)
    elif len(kept) < request.size:
        note = f"Only {len(kept):,} rows are left without duplicates; {request.size:,} were asked for."
        request.notes.append(note)
        logger.warning("%s", note)
    _note_lost_classes(request, kept)
    return kept, {**found, "removed": n - len(kept), "threshold": threshold}


def without_hardest(request: Request, candidates: Indices, scores: NDArray[np.float64], cutoff: float) -> Indices:
    """The candidates but for the hardest share of each group; no group loses rows that its budget needs.

    Args:
        request: The checked request.
        candidates: Rising row numbers.
        scores: (n,) of all rows, the higher, the harder.
        cutoff: The share.

    Returns:
        Rising row numbers.
    """
    strata, size = request.labels.strata, min(request.size, len(candidates))
    if strata is None:
        groups = [(np.arange(len(candidates)), size)]
    else:
        mine = strata[candidates]
        budgets = budgets_left(strata, candidates, size).items()
        groups = [(np.flatnonzero(mine == name), budget) for name, budget in budgets]
    left = []
    for rows, budget in groups:
        dropped = min(int(cutoff * len(rows) + 1e-9), len(rows) - budget)
        left.append(rows[np.argsort(scores[candidates[rows]], kind="stable")[: len(rows) - dropped]])
    return candidates[np.sort(np.concatenate(left))]


def overlap_with(request: Request, vectors: Callable[[], NDArray[Any]]) -> dict[str, Any]:
    """Training rows that are in the test data too: by content, and by cosine where duplicates were asked for so.

    Args:
        request: The checked request.
        vectors: Gives the embeddings of the training rows.

    Returns:
        The report's `held_out`; empty without test data.

    Raises:
        SettingError: The test data lacks the columns of the training data.
    """
    held_out, texts = request.held_out, request.texts
    if held_out is None:
        return {}
    if texts is None:
        request.notes.append("No text, tokens or images were found to compare with the held-out rows.")
        return {"rows": len(held_out)}
    missing = [name for name in texts.columns if name not in held_out.column_names]
    if missing:
        raise SettingError(
            f"held_out lacks the columns {', '.join(missing)} of the data set; it has "
            f"{', '.join(held_out.column_names)}."
        )
    others: Any = RowTexts(held_out, texts.columns)
    source, threshold, near = request.sources, None, None
    if request.settings.deduplicate and source.model is not None:
        threshold, keywords = request.settings.threshold or THRESHOLD, request.settings.given(*EMBED_OPTIONS)
        near = embed(request.content(held_out), source.model, source.processor, cache_dir=source.cache_dir, **keywords)
    own = None if near is None else vectors()
    rows = find_overlap(own, near, threshold, cast("Sequence[str]", texts), others)
    if len(rows):
        note = (
            f"{len(rows):,} training rows are in the held-out data too (first: {rows[:5].tolist()}). "
            "Figures measured there are too good; remove these rows from one side."
        )
        request.notes.append(note)
        logger.warning("%s", note)
    return {
        "rows": len(held_out),
        "overlap": len(rows),
        "threshold": threshold,
        "first": rows[:SHOWN_ROWS].tolist(),
    }


def refilled(kept: Indices, others: Indices, size: int, seed: int) -> Indices:
    """`kept` with as many of the others, drawn at random, as it takes to have `size` rows, or all of them.

    Example:
        >>> refilled(np.array([0, 3]), np.array([1, 3]), 3, seed=0).tolist()
        [0, 1, 3]
    """
    removed = np.setdiff1d(others, kept, assume_unique=True)
    count = min(max(0, size - len(kept)), len(removed))
    back = np.random.default_rng(seed).choice(removed, count, replace=False)
    return np.sort(np.concatenate([kept, back])).astype(np.int64)


def _note_lost_classes(request: Request, kept: Indices) -> None:
    strata = request.labels.strata
    if strata is None:
        return
    lost = np.setdiff1d(strata, strata[kept]).tolist()
    if lost:
        note = (
            f"Every row of {', '.join(map(str, lost[:5]))} is a duplicate of a row of another class and was removed."
        )
        request.notes.append(note)
        logger.warning("%s", note)
