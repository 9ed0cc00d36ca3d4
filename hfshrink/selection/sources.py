"""What rows can be judged by: a model, embeddings, scores or a data map, each checked against the rows it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfshrink.errors import SettingError
from hfshrink.labels import LABEL_COLUMNS
from hfshrink.selection.blockwise import Rows, check_embeddings
from hfshrink.selection.caching import check_rows, column_digests
from hfshrink.selection.datamap import DataMap
from hfshrink.selection.methods import METHODS
from hfshrink.selection.row_labels import Labels
from hfshrink.selection.subset import Subset

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Sources:
    """What rows can be judged by, as the caller gave it."""

    model: Any = None
    processor: Any = None
    embeddings: Any = None
    scores: Any = None
    data_map: Any = None
    held_out: Any = None
    cache_dir: str | Path | None = None

    @property
    def has_embeddings(self) -> bool:
        """Whether embeddings are given or can be made."""
        return self.model is not None or self.embeddings is not None

    @property
    def has_scores(self) -> bool:
        """Whether scores, or passes that they can be taken from, are given."""
        return self.scores is not None or self.data_map is not None


def check_needs(method: str, sources: Sources, labels: Labels, rows: Dataset) -> None:
    """Refuse sources that are missing for the method, or of which one must be left out.

    Raises:
        SettingError: As said.
    """
    for first, second in (("model", "embeddings"), ("scores", "data_map")):
        if getattr(sources, first) is not None and getattr(sources, second) is not None:
            raise SettingError(f"Give either {first}= or {second}=, got both.")
    if method == "auto":
        return
    needs, title = METHODS[method], f"method={method!r}"
    if needs.measure is None and sources.has_scores:
        raise SettingError(f"{title} uses no scores. Leave out scores= and data_map=, or choose a method that ranks.")
    embed = "model= (a model, a folder or a Hub id that embeds the rows) or embeddings= (one vector a row)"
    if needs.embeddings and not sources.has_embeddings:
        raise SettingError(f"{title} needs embeddings. Pass {embed}.")
    if needs.measure is None or sources.has_scores:
        return
    if not sources.has_embeddings:
        raise SettingError(f"{title} needs scores. Pass scores=, data_map=, or for probes {embed}.")
    if not labels.can_be_learnt:
        found = "no label column" if labels.column is None else f"not two classes, one a row, in {labels.column!r}"
        raise SettingError(
            f"{title} needs labels to train probes on, and found {found} ({', '.join(rows.column_names)}). Name the "
            "column with label_column=, pass scores= or data_map=, or choose a method without labels such as 'kmeans'."
        )


def read_sources(rows: Dataset, sources: Sources) -> Sources:
    """The sources with arrays as arrays and the data map read, each fitting the rows.

    Raises:
        SettingError: Embeddings or scores of another length, with NaN, or made of other rows.
        CheckpointError: The data map can't be read.
    """
    changes: dict[str, Any] = {}
    if sources.embeddings is not None:
        array = check_embeddings(sources.embeddings)
        if len(array) != len(rows):
            raise SettingError(f"embeddings must have one vector for each of {len(rows)} rows, got {len(array)}.")
        Rows(array).mean()  # raises for NaN
        changes["embeddings"] = array
    if isinstance(sources.scores, Subset):
        report = sources.scores.report
        check_rows(rows, report.rows, report.columns, "subset with these scores", must_share=True)
        if sources.scores.scores is None:
            raise SettingError("The subset given as scores= has none; its method needed none.")
    elif sources.scores is not None:
        array = np.asarray(sources.scores, dtype=np.float64)
        if array.shape != (len(rows),):
            raise SettingError(f"scores must be one number for each of {len(rows)} rows, got shape {array.shape}.")
        if np.isnan(array).any():
            raise SettingError(f"The score of row {int(np.isnan(array).argmax())} is NaN. Score it again.")
        changes["scores"] = array
    if sources.data_map is not None:
        sources.data_map.check_rows(rows)
    return dataclasses.replace(sources, **changes)


def with_data_map(sources: Sources) -> Sources:
    """The sources with the data map read, where its folder is given.

    Raises:
        CheckpointError: The data map can't be read.
        SettingError: It is no data map.
    """
    given = sources.data_map
    found = DataMap.load(given) if isinstance(given, str | Path) else given
    if found is not None and not callable(getattr(found, "check_rows", None)):
        raise SettingError(f"data_map must be a DataMap, its folder, or probes, got {type(found).__name__}.")
    return dataclasses.replace(sources, data_map=found)


def refuse_held_out(rows: Dataset, held_out: Dataset, columns: Mapping[str, str], sources: Sources) -> None:
    """Refuse to pick from the test rows themselves, and scores that were made on them.

    Args:
        rows: The training data.
        held_out: The test data.
        columns: Column -> digest of the training data.
        sources: As given, the data map read.

    Raises:
        SettingError: As said.
    """
    if holds_rows(held_out, len(rows), columns):
        raise SettingError("dataset and held_out are the same rows. Pick from the training rows alone.")
    made = "made on the held-out rows. Scores of test rows may pick no training rows: score the training rows."
    found = sources.data_map
    if found is not None and _fits(held_out, found) and not _fits(rows, found):
        raise SettingError(f"The data map was {made}")
    if isinstance(sources.scores, Subset):
        report = sources.scores.report
        if holds_rows(held_out, report.rows, report.columns):
            raise SettingError(f"The subset's scores were {made}")
        return
    for name in ("scores", "embeddings"):
        given = getattr(sources, name)
        if given is not None and len(given) == len(held_out) != len(rows):
            raise SettingError(f"{name} has as many rows as held_out ({len(held_out)}), so it seems {made}")


def holds_rows(dataset: Dataset, rows: int, columns: Mapping[str, str]) -> bool:
    """Whether a data set holds the rows of these digests; equal labels alone say nothing, sorted ones often are."""
    shared = [name for name in dataset.column_names if name in columns]
    if len(dataset) != rows or not {*shared} - {*LABEL_COLUMNS}:
        return False
    found = column_digests(dataset.select_columns(shared))
    return all(found[name] == columns[name] for name in shared)


def _fits(dataset: Dataset, data_map: Any) -> bool:
    if len(dataset) != len(data_map) or not any(name in data_map.columns for name in dataset.column_names):
        return False
    try:
        data_map.check_rows(dataset)
    except SettingError:
        return False
    return True
