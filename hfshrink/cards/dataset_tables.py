"""The tables and sentences of a subset's card, each from the JSON of its report; a model's card shows the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hfshrink.cards.rendering import (
    MOST_ROWS,
    NOT_MEASURED,
    NOT_RECORDED,
    and_more,
    is_number,
    mapping,
    mappings,
    number,
    plain,
    safe_table,
    settings_text,
    without_folder,
)

WORST_GROUPS = 10
UNKNOWN_LICENSES = (None, "unknown")


def subset_sentence(report: Mapping[str, Any]) -> str:
    """What the subset is, in one sentence."""
    name = plain(without_folder(report.get("data")) or "a data set")
    split = f" ({plain(report['split'])})" if report.get("split") else ""
    method = plain(report.get("used") or report["method"])
    share = f"{100 * report['size'] / report['rows']:.3g}"
    kept = f"{report['size']:,} of the {report['rows']:,} rows ({share} %)"
    return f"{kept} of {name}{split}, picked by hfshrink with the method {method}."


def fact_table(report: Mapping[str, Any]) -> str:
    """How the rows were picked."""
    method, used = report["method"], report.get("used") or report["method"]
    facts = {
        "method": method if method == used else f"{method}, which chose {used}",
        "why": report.get("why") or None,
        "paper": report.get("source") or None,
        "settings": settings_text(report.get("settings")) or "defaults",
        "seed": report.get("seed", NOT_RECORDED),
        "scores": _joined(report.get("score"), report.get("scored_by")) or "none",
        "model of the scores or embeddings": without_folder(report.get("model")) or "none recorded",
        "source data": without_folder(report.get("data")) or NOT_RECORDED,
        "split": report.get("split") or NOT_RECORDED,
        "revision": report.get("revision") or NOT_RECORDED,
        "fingerprints of the source's columns": settings_text(report.get("columns")) or NOT_RECORDED,
        "exact duplicates in the source": _duplicates(report.get("duplicates")),
        "rows also in the held-out data": number(mapping(report.get("held_out")).get("overlap")),
        "seconds": _seconds(report.get("seconds")),
    }
    return safe_table(("what", "value"), [(name, fact) for name, fact in facts.items() if fact is not None])


def balance_tables(report: Mapping[str, Any]) -> list[str]:
    """Rows of each class, full against kept: one table for each column."""
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for share in mappings(report.get("balance")):
        columns.setdefault(str(share.get("column", "class")), []).append(share)
    tables = []
    for column, shares in columns.items():
        full, kept = (sum(_count(share.get(side)) for share in shares) for side in ("full", "kept"))
        rows = [
            (
                share.get("name"),
                number(share.get("full")),
                _percent(share.get("full"), full),
                number(share.get("kept")),
                _percent(share.get("kept"), kept),
                _percent(share.get("kept"), share.get("full")),
            )
            for share in shares[:MOST_ROWS]
        ]
        header = (column, "full data", "share", "subset", "share", "kept")
        tables.append(safe_table(header, rows) + and_more(len(shares), MOST_ROWS, "classes"))
    return tables


def coverage_tables(coverage: Mapping[str, Any]) -> list[str]:
    """What is kept of the groups, how far the distributions are apart, and the distances in embedding space."""
    parts = mappings(coverage.get("partitions"))
    rows = [
        (
            part.get("by"),
            number(part.get("group_count")),
            f"{number(part.get('lost_count'))} ({number(part.get('lost_rows'))})",
            number(part.get("expected_lost"), ".1f"),
            f"{number(part.get('total_variation'), '.3f')} ({number(part.get('expected_variation'), '.3f')})",
            number(part.get("chi_squared"), ".1f"),
            "too few rows"  # for the test to hold
            if part.get("p_value") is None and is_number(part.get("chi_squared"))
            else number(part.get("p_value"), ".2g"),
        )
        for part in parts[:MOST_ROWS]
    ]
    header = ("divided by", "groups", "lost (rows)", "lost by chance", "total variation (by chance)", "χ²", "p")
    tables = [
        safe_table(header, rows),
        _worst_groups(parts, mapping(coverage.get("thresholds")).get("min_rows")),
        _radius_table(mapping(coverage.get("radius")), coverage),
    ]
    return [part for part in tables if part]


def danger_sentences(report: Mapping[str, Any], coverage: Mapping[str, Any], license_name: Any) -> list[str]:
    """What a user of the subset should fear: never an empty list."""
    found = [f"Coverage: {plain(text, 1000)}" for text in _texts(coverage.get("warnings"))]
    if not coverage:
        found.append("Coverage was not measured: which groups of rows were lost is not known.")
    elif not found:
        found.append("Coverage: no group fell below the thresholds.")
    thresholds = settings_text(coverage.get("thresholds"))
    if thresholds:
        found.append(f"Thresholds of the warnings: {plain(thresholds, 1000)}.")
    found += [f"Not measured: {plain(text, 1000)}" for text in _texts(coverage.get("notes"))]
    found += [plain(text, 1000) for text in _texts(report.get("notes"))]
    conflicting = _count(mapping(report.get("duplicates")).get("conflicting"))
    if conflicting:
        found.append(f"{conflicting:,} rows say the same as another row with another label.")
    overlap = _count(mapping(report.get("held_out")).get("overlap"))
    if overlap:
        found.append(f"{overlap:,} rows of the full data are also in the held-out data: scores on it are too good.")
    if license_name in UNKNOWN_LICENSES:
        found.append("The licence of the source is not recorded: look it up before you pass rows on.")
    return found


def proof_tables(proof: Mapping[str, Any]) -> list[str]:
    """What training on the subset came to: facts, arms and differences of `evaluate_subset`, its notes as lines.

    Of another proof its lists of results are tables, its single values one more, its texts lines.
    """
    arms = [arm for arm in mappings(proof.get("arms")) if isinstance(arm.get("test"), Mapping)]
    if arms:
        return _trained_tables(proof, arms)
    single = {name: value for name, value in proof.items() if value is None or isinstance(value, str | int | float)}
    parts = [safe_table(("what", "value"), [(_title(name), number(value)) for name, value in single.items()])]
    for name, value in proof.items():
        results = mappings(value)
        if results:
            parts.append(f"**{plain(_title(name))}**\n\n{_result_table(results)}")
        parts += [plain(text, 1000) for text in _texts(value)]
    return [part for part in parts if part]


def _trained_tables(proof: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> list[str]:
    outside = any(isinstance(arm.get("out_of_distribution"), Mapping) for arm in arms)
    header = ["arm", "rows", "epochs", "steps", "accuracy", "macro F1", "worst class", "train - test"]
    header += ["other source: accuracy"] * outside + ["seconds", "saved"]
    rows = [[*_arm_cells(arm, outside)] for arm in arms[:MOST_ROWS]]
    differences = [
        (
            f"subset - {item.get('against')}, equal {item.get('equal')}",
            f"{item.get('metric')} ({_title(item.get('data'))})",
            number(item.get("difference"), "+.4f"),
            item.get("verdict") or NOT_MEASURED,
        )
        for item in mappings(proof.get("differences"))[:MOST_ROWS]
    ]
    compared = safe_table(("difference", "metric", "value [95 % interval]", "the interval says"), differences)
    parts = [_proof_facts(proof), safe_table(header, rows) + and_more(len(arms), MOST_ROWS, "arms"), compared]
    return [part for part in [*parts, *(plain(text, 1000) for text in _texts(proof.get("notes")))] if part]


def _arm_cells(arm: Mapping[str, Any], outside: bool) -> Iterable[str]:
    test, other = mapping(arm.get("test")), mapping(arm.get("out_of_distribution"))
    equal = f", equal {arm['equal']}" if arm.get("equal") else ""
    yield f"{arm.get('data')}{equal}"
    yield from (number(arm.get(name), form) for name, form in (("rows", ""), ("epochs", ".3g"), ("steps", "")))
    yield from (number(test.get(name), ".4f") for name in ("accuracy", "f1"))
    yield f"{test.get('worst_class')}: {number(test.get('worst_recall'), '.4f')}"
    yield number(arm.get("gap"), "+.4f")
    yield from [number(other.get("accuracy"), ".4f")] * outside
    yield number(arm.get("seconds"), ".1f")
    known = arm.get("steps_saved") is not None
    yield f"{number(arm['steps_saved'])} steps, {number(arm.get('seconds_saved'), '.1f')} s" if known else ""


def _proof_facts(proof: Mapping[str, Any]) -> str:
    seeds = proof.get("seeds")
    facts = {
        "model": without_folder(proof.get("model")),
        "trained with": proof.get("trainer"),
        "settings": settings_text(proof.get("settings")),
        "seeds": ", ".join(map(str, seeds[:MOST_ROWS])) if isinstance(seeds, list | tuple) else seeds,
        "test rows": _held_out(proof.get("test")),
        "rows of another source": _held_out(proof.get("out_of_distribution")),
        "seconds to pick the rows": number(proof.get("selection_seconds"), ".1f"),
        "machine": settings_text(proof.get("machine")),
    }
    return safe_table(("what", "value"), [(name, fact) for name, fact in facts.items() if fact])


def _held_out(facts: Any) -> str:
    facts = mapping(facts)
    name = f" of {without_folder(facts['name'])}" if facts.get("name") else ""
    removed = f", {number(facts['removed'])} training rows among them left out" if _count(facts.get("removed")) else ""
    return f"{number(facts.get('rows'))}{name}{removed}" if facts else ""


def _result_table(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result))
    rows = [[number(result.get(name), ".4f") for name in names] for result in results[:MOST_ROWS]]
    return safe_table([_title(name) for name in names], rows) + and_more(len(results), MOST_ROWS, "rows")


def _worst_groups(parts: Sequence[Mapping[str, Any]], least: Any) -> str:
    """Those of at least as many rows as a warning needs: that a group of one row was lost says nothing."""
    least = _count(least)
    groups = [
        (part.get("by"), group)
        for part in parts
        for group in mappings(part.get("groups"))
        if is_number(group.get("ratio")) and _count(group.get("rows")) >= least
    ]
    groups.sort(key=lambda pair: (pair[1]["ratio"], -_count(pair[1].get("rows"))))
    rows = [
        (by, group.get("name"), number(group.get("rows")), number(group.get("kept")), number(group["ratio"], ".2f"))
        for by, group in groups[:WORST_GROUPS]
    ]
    title = "least kept groups" + (f", of {least:,} rows or more" if least else "")
    return safe_table(("divided by", title, "full data", "subset", "kept / overall share"), rows)


def _radius_table(radius: Mapping[str, Any], coverage: Mapping[str, Any]) -> str:
    if not radius:
        return ""
    measured = radius.get("measured_rows")
    sample = "" if measured == coverage.get("rows") else f", {number(measured)} rows sampled"
    return safe_table(
        (f"distance to the nearest kept row{sample}", "subset", "random subset"),
        [(name, number(radius.get(name)), number(radius.get(f"random_{name}"))) for name in ("mean", "largest")],
    )


def _duplicates(found: Any) -> str:
    found = mapping(found)
    if found.get("rows") is None:
        return NOT_MEASURED
    removed = found.get("removed")
    return f"{number(found['rows'])} rows, " + ("none removed" if removed is None else f"{number(removed)} removed")


def _seconds(seconds: Any) -> str:
    return ", ".join(f"{stage} {number(time, '.1f')}" for stage, time in mapping(seconds).items()) or NOT_MEASURED


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _title(name: Any) -> str:
    return str(name).replace("_", " ")


def _percent(part: Any, whole: Any) -> str:
    return NOT_MEASURED if not _count(whole) or part is None else f"{100 * _count(part) / _count(whole):.1f} %"


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _texts(value: Any) -> Iterable[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
