"""The tables of a model's card: base against compressed, the steps; a number is there or "not measured", never 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hfshrink.cards.rendering import (
    MOST_ROWS,
    NOT_MEASURED,
    NOT_RECORDED,
    and_more,
    is_number,
    mapping,
    number,
    plain,
    safe_table,
    settings_text,
)
from hfshrink.cards.reproduce import METHOD_KEYWORDS, TRAINING, UNSET, training_of, training_runs
from hfshrink.measurement import COMPUTED, Latency, Measurement, Score, megabytes
from hfshrink.record import CompressionReport, StepRecord
from hfshrink.terminal import table

HEADER = ("what", "base", "compressed", "change", "how")
Row = tuple[str, str, str, str, str]


def _count(value: float) -> str:
    return f"{value:,}"


SIZES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", _count),
    "nonzero_parameters": ("parameters that are not zero", _count),
    "size_bytes": ("weight files", megabytes),
    "packed_bytes": ("weight files, entropy-coded", megabytes),
    "memory_bytes": ("weights in memory", megabytes),
    "loaded_bytes": ("memory that loading takes", megabytes),
    "peak_memory_bytes": ("memory that loading and one pass take at most", megabytes),
    "macs": ("multiply-accumulates of one example", lambda n: f"{n / 1e6:,.1f} M"),
    "energy_joules": ("energy of one example", lambda joules: f"{joules:.3f} J"),
}
"""field of `Measurement` -> (what the card calls it, how its number is written)."""
MANY_ZEROS = 0.01  # share of zeros from which on the reader may think that they save space
NO_SCORES = ("score on held-out data", NOT_MEASURED, NOT_MEASURED, "", "")
NO_MEMORY = ("memory when loaded", NOT_MEASURED, NOT_MEASURED, "", "")
NO_TIMES = ("latency", NOT_MEASURED, NOT_MEASURED, "", "")


def both_sides(report: CompressionReport) -> tuple[Measurement, Measurement]:
    """What is known of the base and of the model: the record's measurements, and where they lack a size the steps'.

    Example:
        >>> from hfshrink.record import StepRecord
        >>> step = StepRecord("prune", "magnitude", before=Measurement(parameters=8), after=Measurement(parameters=6))
        >>> base, compressed = both_sides(CompressionReport(steps=(step,), base=Measurement(parameters=9)))
        >>> base.parameters, compressed.parameters
        (9, 6)
    """
    first, last = (report.steps[0].before, report.steps[-1].after) if report.steps else (Measurement(), Measurement())
    return first.merged(report.base), last.merged(report.compressed)


def compared_table(report: CompressionReport) -> str:
    """Base against compressed; empty where nothing at all is known of either."""
    base, compressed = both_sides(report)
    if base == compressed == Measurement() and not _comparison(report):
        return ""
    scores = list(_score_rows(base.scores, compressed.scores)) or [NO_SCORES]
    times = list(_latency_rows(base.latency, compressed.latency)) or [NO_TIMES]
    parts = [scores, [*_paired_rows(_comparison(report))], [*_size_rows(base, compressed)], times]
    found = sum(max(0, len(part) - MOST_ROWS) for part in parts)
    return safe_table(HEADER, [row for part in parts for row in part[:MOST_ROWS]]) + and_more(found, 0, "rows")


def many_zeros(side: Measurement) -> float | None:
    """The share of zeros among the parameters where it is worth telling.

    Example:
        >>> many_zeros(Measurement(parameters=10, nonzero_parameters=4)), many_zeros(Measurement(parameters=10))
        (0.6, None)
    """
    if not side.parameters or side.nonzero_parameters is None:
        return None
    share = 1 - side.nonzero_parameters / side.parameters
    return share if share >= MANY_ZEROS else None


def step_table(report: CompressionReport) -> str:
    """The steps in their order, each with its settings, its cost and its paper; empty without steps."""
    rows = [
        (
            str(place),
            plain(step.technique),
            plain(step.method),
            plain(_settings(step) or "defaults"),
            _change(step.before.parameters, step.after.parameters),
            number(step.seconds, ".1f"),
            _papers(plain(step.source)),
        )
        for place, step in enumerate(report.steps[:MOST_ROWS], start=1)
    ]
    header = ("", "step", "method", "settings", "parameters", "seconds", "source")
    return table(header, rows) + and_more(len(report.steps), MOST_ROWS, "steps") if rows else ""


def _settings(step: StepRecord) -> str:
    """Those that the table of the training and the step's method don't tell."""
    told = {"training", METHOD_KEYWORDS.get(step.technique), *(TRAINING if training_of(step) else ())} - {"seed"}
    known = {name: value for name, value in step.settings.items() if name not in told}
    return settings_text({name: value for name, value in known.items() if value not in (None, UNSET.get(name))})


def training_table(report: CompressionReport) -> str:
    """What was trained, one row for each run: how many examples, for how long."""
    rows, place = [], 1
    for run in training_runs(report):
        places = range(place, place := place + len(run))
        if training := training_of(run[0]):
            rows.append(_training_row(", ".join(map(str, places)), run, training))
    header = ("step", "technique", "examples", "optimizer steps", "epochs", "batch per device", "learning rate")
    return safe_table(header, rows[:MOST_ROWS]) + and_more(len(rows), MOST_ROWS, "runs")


def _training_row(places: str, run: list[StepRecord], training: Mapping[str, Any]) -> tuple[str, ...]:
    results: dict[str, Any] = {name: value for step in run for name, value in step.results.items()}
    facts = (
        (results.get("train_examples"), ""),
        (results.get("steps", training.get("max_steps")), ""),
        ("set by steps" if "max_steps" in training else training.get("num_train_epochs"), ""),
        (training.get("per_device_train_batch_size"), ""),
        (training.get("learning_rate"), ".3g"),
    )
    shown = [NOT_RECORDED if value is None else number(value, form) for value, form in facts]
    accumulated = training.get("gradient_accumulation_steps")
    shown[3] += f" × {number(accumulated)}" if accumulated is not None else ""
    return (places, ", ".join(step.technique for step in run), *shown)


def _comparison(report: CompressionReport) -> Mapping[str, Any]:
    return mapping(report.details.get("comparison"))


def _size_rows(base: Measurement, compressed: Measurement) -> Iterable[Row]:
    for name, (title, show) in SIZES.items():
        ours, theirs = getattr(base, name), getattr(compressed, name)
        if name == "nonzero_parameters" and many_zeros(base) is many_zeros(compressed) is None:
            continue
        if ours is None and theirs is None:
            if name in ("parameters", "size_bytes"):
                yield title, NOT_MEASURED, NOT_MEASURED, "", ""
            continue
        how = "computed" if name in COMPUTED else "measured"
        shown = [NOT_MEASURED if value is None else show(value) for value in (ours, theirs)]
        if name in ("macs", "energy_joules"):
            title += _length(compressed if theirs is not None else base)
        yield title, shown[0], shown[1], _ratio(ours, theirs), how
    if all(getattr(side, name) is None for side in (base, compressed) for name in ("memory_bytes", "loaded_bytes")):
        yield NO_MEMORY


def _length(side: Measurement) -> str:
    return "" if side.sequence_length is None else f" ({side.sequence_length} tokens)"


def _score_rows(base: Iterable[Score], compressed: Iterable[Score]) -> Iterable[Row]:
    ours, theirs = ({_key(score): score for score in side} for side in (base, compressed))
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        values = [None if score is None else score.value for score in (a, b)]
        shown = [NOT_MEASURED if score is None else str(score) for score in (a, b)]
        yield (a or b).title, shown[0], shown[1], _difference(*values), "measured"  # type: ignore[union-attr]


def _key(score: Score) -> tuple[Any, ...]:
    return score.metric, score.dataset, score.split, score.examples


def _latency_rows(base: Iterable[Latency], compressed: Iterable[Latency]) -> Iterable[Row]:
    """Ratios only between times of one setting, one runtime and one processor."""
    ours, theirs = ({_setting(latency): latency for latency in side} for side in (base, compressed))
    for setting in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(setting), theirs.get(setting)
        shown = [
            NOT_MEASURED if side is None else " / ".join(f"{t:.2f}" for t in _times(side)) + " ms" for side in (a, b)
        ]
        change = ""
        if a is not None and b is not None:
            change = " / ".join(_ratio(*pair) for pair in zip(_times(a), _times(b), strict=True))
        yield f"time of one pass: median / 95th percentile / CPU ({setting})", shown[0], shown[1], change, "measured"


def _times(latency: Latency) -> tuple[float, float, float]:
    return latency.latency_ms_p50, latency.latency_ms_p95, latency.cpu_ms


def _setting(latency: Latency) -> str:
    length = "" if latency.sequence_length is None else f", {latency.sequence_length} tokens"
    threads = f"{latency.threads} thread{'s' * (latency.threads != 1)}"
    return f"batch {latency.batch_size}{length}, {threads}, {latency.runtime} on {latency.device}"


def _paired_rows(comparison: Mapping[str, Any]) -> Iterable[Row]:
    """What `compare` found on the same rows; a is the base."""
    if not comparison:
        return
    examples = comparison.get("examples")
    where = f" ({number(examples)} rows, paired)" if examples is not None else " (paired)"
    get = comparison.get
    if get("difference") is not None:
        low, high = get("low"), get("high")
        interval = "" if low is None or high is None else f" [{number(low, '+.4f')}, {number(high, '+.4f')}]"
        change = number(get("difference"), "+.4f") + interval
        yield f"{get('metric')}{where}", number(get("a"), ".4f"), number(get("b"), ".4f"), change, "measured"
    share = get("agreement")
    if is_number(share):  # of language models it is not defined
        yield f"same answer as the base{where}", "", f"{100 * share:.1f} %", "", "measured"
    worst = get("worst_class")
    if isinstance(worst, Mapping):
        a, b = worst.get("recall_a"), worst.get("recall_b")
        title = f"recall of {worst.get('name')} (the class that falls most)"
        yield title, number(a, ".4f"), number(b, ".4f"), _difference(a, b), "measured"
    a, b = get("calibration_error_a"), get("calibration_error_b")
    if a is not None or b is not None:
        yield "calibration error, 15 bins", number(a, ".4f"), number(b, ".4f"), _difference(a, b), "measured"


def _ratio(base: Any, compressed: Any) -> str:
    if not is_number(base) or not is_number(compressed) or base <= 0:
        return ""
    return f"{compressed / base:.3g} ×"


def _difference(base: Any, compressed: Any) -> str:
    return f"{compressed - base:+.4f}" if is_number(base) and is_number(compressed) else ""


def _change(before: int | None, after: int | None) -> str:
    if after is None:
        return NOT_MEASURED
    return _count(after) if before is None or before == after else f"{_count(before)} → {_count(after)}"


def _papers(text: str) -> str:
    """Links to arXiv in a text that is `plain` already."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})(?!\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
