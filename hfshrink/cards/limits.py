"""What the code found to be wrong with a model: each sentence from a number of the record, never an empty list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hfshrink.cards.model_tables import both_sides, many_zeros
from hfshrink.cards.rendering import MOST_ROWS, is_number, mapping, mappings, number, plain, safe_table
from hfshrink.measurement import is_lower_better
from hfshrink.record import CompressionReport, StepRecord

MOST_REASONS = 10  # of one step
SHOWN_MODULES = 5
SHOWN_GROUPS = 20
NOT_COMPARED = (
    "Base and model were not compared on the same rows: which answers changed, and for which classes, is not known."
)
NO_GROUPS = "Not measured by group of rows: a rare group may have lost more than the mean says."


def limit_sentences(report: CompressionReport) -> list[str]:
    """What a user should know before trusting the model."""
    found = [*_flips(mapping(report.details.get("comparison"))), *_groups(report), *_zeros(report)]
    for step in report.steps:
        found += [*_parity(step), *_skipped(step), *_vocabulary(step), *_notes(step)]
    found = list(dict.fromkeys(found))
    more = [f"And {len(found) - MOST_ROWS:,} more sentences of the record."] if len(found) > MOST_ROWS else []
    return found[:MOST_ROWS] + more


def group_table(report: CompressionReport) -> str:
    """Groups of rows in the record's order, the worst first; empty where none were measured."""
    groups = _listed(report)[:SHOWN_GROUPS]
    rows = [
        (group.get("name"), number(group.get("rows")), number({"value": None, **group}, ".4f")) for group in groups
    ]
    return safe_table(("group", "rows", "mean [95 % interval]"), rows)


def _listed(report: CompressionReport) -> list[Mapping[str, Any]]:
    groups = report.details.get("groups")
    return mappings(groups.get("groups") if isinstance(groups, Mapping) else groups)


def _flips(comparison: Mapping[str, Any]) -> Iterable[str]:
    if not comparison:
        yield NOT_COMPARED
        return
    wrong, right, rows = (comparison.get(name) for name in ("right_to_wrong", "wrong_to_right", "examples"))
    if is_number(wrong) and is_number(right) and is_number(rows) and rows:
        p = comparison.get("mcnemar_p")
        test = f"; McNemar's exact p {number(p, '.3g')}" if is_number(p) else ""
        yield (
            f"Of {number(rows)} rows, {number(wrong)} ({100 * wrong / rows:.1f} %) that the base got right are wrong "
            f"now, and {number(right)} the other way round{test}."
        )
    worst = mapping(comparison.get("worst_class"))
    before, after = worst.get("recall_a"), worst.get("recall_b")
    if is_number(before) and is_number(after) and after < before:
        yield f"The class {plain(worst.get('name'))} lost most: its recall fell from {before:.4f} to {after:.4f}."
    yield from _falls(str(comparison.get("metric")), comparison.get("low"), comparison.get("high"))


def _falls(metric: str, low: Any, high: Any) -> Iterable[str]:
    """What the interval of compressed − base says, if the compressed side may be worse."""
    if not is_number(low) or not is_number(high):
        return
    rises = is_lower_better(metric)
    worst = high if rises else -low
    moved, change = ("rose", "rise") if rises else ("fell", "fall")
    if (low > 0) if rises else (high < 0):
        end = f"begins at {low:+.4f}" if rises else f"ends at {high:+.4f}"
        yield f"{plain(metric)} {moved} beyond chance: the 95 % interval {end}."
    elif worst > 0:
        yield f"The sample can't rule out a {change} of {plain(metric)} by {worst:.4f}."


def _groups(report: CompressionReport) -> Iterable[str]:
    listed = _listed(report)
    if not listed:
        yield NO_GROUPS
        return
    mean, worst = mapping(report.details.get("groups")).get("mean"), listed[0]
    if is_number(mean) and is_number(worst.get("value")):
        name, score = plain(worst.get("name")), plain(number(worst, ".4f"))
        yield f"The worst group is {name}: {score} against {mean:.4f} of all rows."


def _zeros(report: CompressionReport) -> Iterable[str]:
    share = many_zeros(both_sides(report)[1])
    if share is not None:
        yield (
            f"{100 * share:.1f} % of the parameters are zero but stored as numbers: zeros in dense tensors make "
            "neither the files nor the forward pass smaller."
        )


def _parity(step: StepRecord) -> Iterable[str]:
    parity = mapping(step.results.get("parity"))
    if not is_number(parity.get("max_difference")):
        return
    same = parity.get("agreement")
    agreement = f", same answer in {100 * same:.1f} % of cases" if is_number(same) else ""
    yield (
        f"{plain(step.method)} against the float model on {plain(number(parity.get('rows')))} "
        f"{plain(parity.get('inputs'))}: largest difference of an output {parity['max_difference']:.3g}{agreement}."
    )


def _skipped(step: StepRecord) -> Iterable[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in step.skipped.items():
        reasons.setdefault(str(reason).partition(":")[0], []).append(str(name))  # behind it the module's own numbers
    for reason, names in list(reasons.items())[:MOST_REASONS]:
        shown = ", ".join(plain(name) for name in names[:SHOWN_MODULES])
        more = f" and {len(names) - SHOWN_MODULES:,} more" if len(names) > SHOWN_MODULES else ""
        yield f"{plain(step.technique)} left as it was ({plain(reason)}): {shown}{more}."


def _vocabulary(step: StepRecord) -> Iterable[str]:
    share = step.results.get("covered_share")
    if is_number(share):
        kept = number(step.results.get("vocabulary_after"))
        yield (
            f"The {plain(kept)} tokens kept cover {100 * share:.2f} % of those in the corpus; other words are spelled "
            "in smaller pieces or unknown."
        )


def _notes(step: StepRecord) -> Iterable[str]:
    for name in ("note", "notes", "warnings"):
        found = step.results.get(name)
        for text in [found] if isinstance(found, str) else found[:MOST_ROWS] if isinstance(found, list) else ():
            if isinstance(text, str) and text:
                yield f"{plain(step.technique)}: {plain(text, 1000)}"
