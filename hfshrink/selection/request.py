"""What `select` was asked for, checked before any work: rows, size, labels, and what the rows shall be judged by."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfshrink.data import INPUT_COLUMNS, read_dataset
from hfshrink.errors import SettingError
from hfshrink.evaluation.scoring import dataset_name
from hfshrink.labels import LABEL_COLUMNS
from hfshrink.selection.budgets import class_budgets
from hfshrink.selection.caching import column_digests
from hfshrink.selection.contents import RowTexts, row_texts
from hfshrink.selection.dangers import read_thresholds
from hfshrink.selection.methods import FREE_MEASURE, MEASURES, METHODS, NAMES
from hfshrink.selection.partitions import divide_by_column
from hfshrink.selection.row_labels import Labels, read_labels
from hfshrink.selection.sources import Sources, check_needs, read_sources, refuse_held_out, with_data_map

if TYPE_CHECKING:
    from datasets import Dataset

EMBED_OPTIONS = ("pooling", "batch_size", "text_columns", "max_length")
PROBE_OPTIONS = ("seeds", "epochs", "hidden")
COVERAGE_OPTIONS = ("coverage", "columns", "thresholds")
OWN_OPTIONS = ("score", "label_column", "normalize", "split", *COVERAGE_OPTIONS)


@dataclass(frozen=True)
class Settings:
    """How to pick, as the caller said; see `hfshrink.selection.run.select`."""

    method: str
    fraction: float | None
    size: int | None
    stratify: str | None
    deduplicate: bool | float | None
    seed: int
    options: Mapping[str, Any]

    def given(self, *names: str) -> dict[str, Any]:
        """The options of these names that the caller gave."""
        return {name: self.options[name] for name in names if name in self.options}

    @property
    def threshold(self) -> float | None:
        """The cosine that the caller named; None where none is."""
        return None if self.deduplicate is None or isinstance(self.deduplicate, bool) else float(self.deduplicate)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that the coverage is told of."""
        given = self.options.get("columns", ())
        return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request; `sources` hold arrays and data maps that fit the rows.

    Attributes:
        rows: The full data set.
        title: Its name, without the machine's folders; None where it has none.
        size: Rows to keep.
        settings: As the caller gave them.
        sources: As the caller gave them, read and checked.
        labels: Classes and groups of the rows.
        texts: What each row says; None where that is unknown.
        held_out: The test data; None without.
        columns: Column -> digest of the full data set.
        notes: What the reader should know.
    """

    rows: Dataset
    title: str | None
    size: int
    settings: Settings
    sources: Sources
    labels: Labels
    texts: RowTexts | None
    held_out: Dataset | None
    columns: dict[str, str]
    notes: list[str]

    def content(self, dataset: Dataset) -> Dataset:
        """A data set without labels and metadata of any name, as a model shall read it."""
        return content_of(dataset, self.labels, self.settings)


def read_request(dataset: Any, settings: Settings, sources: Sources) -> Request:
    """Read the data set and check everything that can be checked before work.

    Raises:
        SettingError: See `hfshrink.selection.run.select`.
        CheckpointError: The data set or the data map can't be read.
    """
    check_settings(settings)
    _refuse_streaming(dataset)
    rows = read_dataset(dataset, settings.options.get("split"))
    size = wanted_rows(len(rows), settings.fraction, settings.size)
    notes: list[str] = []
    labels = read_labels(rows, settings.stratify, settings.options.get("label_column"), notes)
    if labels.strata is not None:
        class_budgets(labels.strata, size)  # raises for fewer rows than classes
    for column in settings.columns:
        divide_by_column(rows, column)  # raises for columns that make no groups
    texts = row_texts(content_of(rows, labels, settings), settings.options.get("text_columns"), labels.column)
    held_out = None if sources.held_out is None else read_dataset(sources.held_out)
    columns = column_digests(rows)
    check_needs(settings.method, sources, labels, rows)
    sources = with_data_map(sources)
    if held_out is not None:
        refuse_held_out(rows, held_out, columns, sources)
    read = read_sources(rows, sources)
    if settings.threshold is not None and not sources.has_embeddings:
        raise SettingError(
            f"deduplicate={settings.threshold} is a cosine and needs embeddings: pass model= or embeddings=."
        )
    if str(getattr(rows, "split", None) or "").startswith("test"):
        notes.append("These rows are a test split: what is trained on them can't be tested on them.")
    return Request(rows, dataset_name(dataset, rows), size, settings, read, labels, texts, held_out, columns, notes)


def content_of(dataset: Dataset, labels: Labels, settings: Settings) -> Dataset:
    """A data set without the columns that say what a row is, not what it holds: labels, groups, metadata.

    Columns with a usual name of labels stay, since every reader knows them; so do those named as text.
    """
    named = settings.options.get("text_columns") or ()
    stay = {*LABEL_COLUMNS, *INPUT_COLUMNS, *((named,) if isinstance(named, str) else named)}
    others = {labels.column, labels.strata_column, *settings.columns} - stay
    leave = [name for name in dataset.column_names if name in others]
    return dataset.remove_columns(leave) if len(leave) < len(dataset.column_names) else dataset


def wanted_rows(n: int, fraction: float | None, size: int | None) -> int:
    """Rows to keep of n, by a fraction of them (rounded, at least one) or by their number.

    Raises:
        SettingError: Not exactly one of both, or out of range.

    Example:
        >>> wanted_rows(10, 0.25, None), wanted_rows(10, None, 4)
        (2, 4)
    """
    if (fraction is None) == (size is None):
        raise SettingError(
            f"Give either fraction, in (0, 1], or size, a number of rows; got fraction={fraction!r}, size={size!r}."
        )
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= n:
            raise SettingError(f"size must be a whole number in 1..{n}, the rows of the data set, got {size!r}.")
        return int(size)
    number = isinstance(fraction, int | float | np.number) and not isinstance(fraction, bool)
    if not number or fraction is None or not 0 < fraction <= 1:
        hint = " For a number of rows pass size=." if number and fraction is not None and fraction > 1 else ""
        raise SettingError(f"fraction must lie in (0, 1], got {fraction!r}.{hint}")
    return max(1, round(float(fraction) * n))


def check_settings(settings: Settings) -> None:
    """Refuse unknown methods, options that the method does not take, and values out of range.

    Raises:
        SettingError: As said.
    """
    method, options = settings.method, settings.options
    if method not in NAMES:
        near = difflib.get_close_matches(str(method), NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingError(f"method must be one of {', '.join(NAMES)}, got {method!r}.{hint}")
    taken = () if method == "auto" else METHODS[method].takes
    ranks = method == "auto" or METHODS[method].measure is not None
    known = (*taken, *EMBED_OPTIONS, *(PROBE_OPTIONS if ranks else ()), *OWN_OPTIONS)
    wrong = next((name for name in options if name not in known), None)
    if wrong is not None:
        raise SettingError(f"select(method={method!r}) does not know {wrong!r}. It takes {', '.join(known)}.")
    if isinstance(settings.seed, bool) or not isinstance(settings.seed, int) or settings.seed < 0:
        raise SettingError(f"seed must be a whole number from 0 on, got {settings.seed!r}.")
    threshold = settings.threshold
    if threshold is not None and not 0 < threshold < 1:
        raise SettingError(
            f"deduplicate must be True, False, None or a cosine in (0, 1), got {settings.deduplicate!r}."
        )
    read_thresholds(options.get("thresholds"))
    if options.get("coverage") not in (None, True, False):
        raise SettingError(f"coverage must be True, False or None, got {options['coverage']!r}.")
    score = options.get("score")
    if score is not None and (method not in FREE_MEASURE or score not in MEASURES or not MEASURES[score].harder):
        names = [name for name, measure in MEASURES.items() if measure.harder]
        raise SettingError(
            f"score must be one of {', '.join(names)}, with one of the methods {', '.join(FREE_MEASURE)}; got "
            f"score={score!r} with method={method!r}."
        )


def _refuse_streaming(dataset: Any) -> None:
    import datasets

    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        fed = [name for name, method in METHODS.items() if method.embeddings]
        scored = [name for name, method in METHODS.items() if method.measure]
        raise SettingError(
            "Selection needs rows that it can count and come back to, got a streaming data set. Take rows first: "
            f"Dataset.from_list(list(it.take(n))). Then 'random' works as it is, {', '.join(map(repr, fed))} with "
            f"embeddings of a model, {', '.join(map(repr, scored))} with labels besides. For random rows of a stream "
            "alone: it.shuffle(seed=…, buffer_size=…).take(size)."
        )
