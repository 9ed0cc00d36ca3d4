"""What `evaluate_subset` was asked for, checked before any training: rows, labels, held-out rows, and the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hfshrink.data import encode, read_dataset
from hfshrink.distillation.teachers.collator import TEACHER_COLUMNS
from hfshrink.distillation.training.rows import has_answers
from hfshrink.errors import SettingError
from hfshrink.evaluation.labels import find_references, require_label_column
from hfshrink.evaluation.scoring import dataset_name
from hfshrink.labels import IGNORED
from hfshrink.proof.networks import Networks, check_answer_order, read_networks, refuse_kind
from hfshrink.record import config_of
from hfshrink.selection import Subset
from hfshrink.selection.caching import check_rows, column_digests
from hfshrink.selection.contents import RowTexts, row_texts
from hfshrink.selection.deduplication import find_overlap
from hfshrink.selection.sources import Sources, holds_rows, refuse_held_out

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

EQUAL = ("epochs", "steps")


@dataclass(frozen=True)
class Settings:
    """The keywords of `evaluate_subset` that are no data; see there."""

    seeds: Sequence[int]
    equal: Sequence[str]
    random_subsets: bool
    remove_overlap: bool
    train_rows: int
    resamples: int
    text_columns: Sequence[str] | None = None
    label_column: str | None = None
    max_length: int | None = None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows that no arm is trained on.

    Attributes:
        rows: Encoded.
        references: (n,) their classes.
        facts: `name`, `rows`, `overlap` and `removed`, for the record.
    """

    rows: Dataset
    references: NDArray[np.int64]
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request.

    Attributes:
        full: The full training data, encoded.
        labels: (n,) its classes; None where some row has none.
        indices: Rows of the subset; None where it has rows of its own.
        subset: The subset's rows, encoded.
        subset_labels: (size,) their classes; None where some row has none.
        held_out: `"test"`, and `"out_of_distribution"` where given.
        networks: Fresh models.
        processor: Their tokenizer or image processor.
        settings: As given.
        digests: Of the data sets, for telling whether kept runs are of them.
        notes: What the reader should know.
    """

    full: Dataset
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64] | None
    subset: Dataset
    subset_labels: NDArray[np.int64] | None
    held_out: dict[str, HeldOut]
    networks: Networks
    processor: Any
    settings: Settings
    digests: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        """Of the model."""
        config: Any = config_of(self.networks.first)
        return int(config.num_labels)

    def class_name(self, number: int) -> str:
        """Of the model."""
        names: Any = config_of(self.networks.first).id2label
        return str(names.get(number, number))


@dataclass(frozen=True)
class Given:
    """The data of `evaluate_subset`, as given."""

    subset: Any
    full: Any
    model_init: Any
    test: Any
    out_of_distribution: Any
    processor: Any


def read_request(given: Given, settings: Settings) -> Request:
    """Read the data and check all that can be checked before training.

    Raises:
        SettingError: See `hfshrink.proof.run.evaluate_subset`.
        UnsupportedModelError: See there.
        CheckpointError: See there.
    """
    _check_settings(settings)
    full = read_dataset(given.full)
    columns = column_digests(full)
    sides = {"test": read_dataset(given.test)}
    if given.out_of_distribution is not None:
        sides["out_of_distribution"] = read_dataset(given.out_of_distribution)
    for name, side in sides.items():
        _refuse_training_rows(full, side, columns, given.subset, name)
    picked = _read_subset(given.subset, full)
    names = {name: dataset_name(getattr(given, name), side) for name, side in sides.items()}
    notes: list[str] = []
    trained = [full] if picked.own is None else [full, picked.own]
    kept = {name: _without_overlap(side, trained, names[name], name, settings) for name, side in sides.items()}
    networks = read_networks(given.model_init, full, settings.label_column, settings.text_columns)
    processor = given.processor or networks.processor
    check_answer_order(given.subset, networks)
    encoding = Encoding(networks, processor, settings)
    encoded, labels = encoding.training_rows(full, "full", notes)
    held_out = {name: encoding.held_out(side, facts, name, labels) for name, (side, facts) in kept.items()}
    if picked.own is not None:
        rows, row_labels = encoding.training_rows(picked.own, "subset", notes)
    else:
        rows = picked.with_answers(encoded.select(picked.indices), notes)
        row_labels = None if labels is None else labels[picked.indices]
    digests = {f"full.{name}": digest for name, digest in columns.items()}
    for rows_of_subset in (picked.own, picked.answers):
        if rows_of_subset is not None:
            digests |= {f"subset.{column}": digest for column, digest in column_digests(rows_of_subset).items()}
    for name, (side, _) in kept.items():
        digests |= {f"{name}.{column}": digest for column, digest in column_digests(side).items()}
    parts = (held_out, networks, processor, settings, digests, notes)
    return Request(encoded, labels, None if picked.own is not None else picked.indices, rows, row_labels, *parts)


@dataclass(frozen=True, eq=False)
class Encoding:
    """How rows become the model's inputs; the same for all data sets of a proof."""

    networks: Networks
    processor: Any
    settings: Settings

    def training_rows(self, rows: Dataset, what: str, notes: list[str]) -> tuple[Dataset, NDArray[np.int64] | None]:
        """Encoded rows and their classes; None where rows with a teacher's answers lack some.

        Raises:
            SettingError: No labels and no answers, or labels that do not fit the model.
            UnsupportedModelError: Several labels a row, or real numbers.
        """
        answers = has_answers(rows)
        if not answers:
            require_label_column(rows, self._label_column(rows))
        encoded = self._encode(rows)
        values = encoded.with_format(None)["labels"][:] if "labels" in encoded.column_names else []
        if answers and (not values or IGNORED in values):
            notes.append(f"Rows of the {what} data have no label: they are learnt from the teacher's answers alone.")
            return encoded, None
        return encoded, self._classes(encoded)

    def held_out(self, rows: Dataset, facts: dict[str, Any], what: str, labels: NDArray[np.int64] | None) -> HeldOut:
        """Encoded rows with their classes.

        Raises:
            SettingError: No labels, or classes that the training rows lack.
        """
        require_label_column(rows, self._label_column(rows))
        encoded = self._encode(rows)
        references = self._classes(encoded)
        unknown = [] if labels is None else np.setdiff1d(references, labels).tolist()
        if unknown:
            names: Any = config_of(self.networks.first).id2label
            shown = ", ".join(str(names.get(number, number)) for number in unknown[:5])
            raise SettingError(
                f"The {what} rows have classes that no training row has: {shown}. No arm can learn them: remove these "
                "rows, or give the full training data."
            )
        return HeldOut(encoded, references, facts)

    def _label_column(self, rows: Dataset) -> str | None:
        """The named column, but for rows that `cache_teacher` has encoded: there it is `labels`."""
        name = self.settings.label_column
        is_cached = name not in rows.column_names and "input_ids" in rows.column_names
        return None if is_cached and "labels" in rows.column_names else name

    def _encode(self, rows: Dataset) -> Dataset:
        settings = self.settings
        return encode(
            rows,
            self.networks.first,
            self.processor,
            self.networks.task,
            text_columns=settings.text_columns,
            label_column=self._label_column(rows),
            max_length=settings.max_length,
        )

    def _classes(self, encoded: Dataset) -> NDArray[np.int64]:
        kind, references = find_references(self.networks.task, encoded, config_of(self.networks.first))
        refuse_kind(kind)
        return np.asarray(references, dtype=np.int64)


def _check_settings(settings: Settings) -> None:
    seeds, equal = settings.seeds, settings.equal
    whole = [isinstance(seed, int | np.integer) and not isinstance(seed, bool) and seed >= 0 for seed in seeds]
    if not seeds or not all(whole) or len(set(seeds)) != len(seeds):
        raise SettingError(f"seeds must be one or more different whole numbers from 0 on, got {list(seeds)!r}.")
    if not equal or set(equal) - set(EQUAL) or len(set(equal)) != len(equal):
        raise SettingError(f"equal must be one or both of {', '.join(EQUAL)}, got {list(equal)!r}.")
    for name in ("train_rows", "resamples"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {value!r}.")


@dataclass(frozen=True, eq=False)
class Picked:
    """What the subset is.

    Attributes:
        indices: Rows of the full data; empty where it has rows of its own.
        own: Rows of its own, such as synthetic ones; None without.
        answers: A teacher's answers of the rows, where the full data has none; None without.
    """

    indices: NDArray[np.int64]
    own: Dataset | None = None
    answers: Dataset | None = None

    def with_answers(self, rows: Dataset, notes: list[str]) -> Dataset:
        """The encoded rows with the teacher's answers beside them, where the subset alone has some."""
        from datasets import concatenate_datasets

        if self.answers is None:
            return rows
        notes.append(
            "The subset's rows carry a teacher's answers and the others don't: the differences are of the choice of "
            "rows and of the teacher together."
        )
        return concatenate_datasets([rows.flatten_indices().with_format(None), self.answers], axis=1)


def _read_subset(subset: Any, full: Dataset) -> Picked:
    import datasets

    if not isinstance(subset, Subset):
        rows = getattr(subset, "dataset", subset)  # synthetic rows come with their report
        if isinstance(rows, datasets.Dataset):
            return Picked(np.arange(0), read_dataset(rows))
        return Picked(_check_indices(subset, len(full)))
    check_rows(full, subset.report.rows, subset.report.columns, "subset", must_share=True)
    indices = _check_indices(subset.indices, len(full))
    if not has_answers(subset.dataset) or has_answers(full):
        return Picked(indices)
    names = [name for name in TEACHER_COLUMNS if name in subset.dataset.column_names]
    if len(subset.dataset) != len(indices):
        raise SettingError(f"The subset has {len(subset.dataset):,} rows and {len(indices):,} indices.")
    return Picked(indices, None, subset.dataset.select_columns(names).with_format(None).flatten_indices())


def _check_indices(indices: Any, rows: int) -> NDArray[np.int64]:
    array = np.asarray(indices)
    if array.size == 0:
        raise SettingError("The subset is empty: it has no rows.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SettingError(
            "subset must be a Subset, row numbers of the full data, or a Dataset of its own rows, got "
            f"{type(indices).__name__} ({array.dtype} of shape {array.shape})."
        )
    if array.min() < 0 or array.max() >= rows or len(np.unique(array)) != len(array):
        raise SettingError(
            f"The subset's row numbers must lie in 0..{rows - 1}, each once, got {array.min()}..{array.max()}, "
            f"{len(np.unique(array)):,} different ones of {len(array):,}."
        )
    return np.sort(array).astype(np.int64)


def _refuse_training_rows(full: Dataset, side: Dataset, columns: dict[str, str], subset: Any, what: str) -> None:
    """Refuse held-out rows that are the training rows themselves, and a subset that was picked by scores of them."""
    if holds_rows(side, len(full), columns):
        raise SettingError(f"The {what} rows are the training rows themselves. Give rows that were held out.")
    if isinstance(subset, Subset):
        refuse_held_out(full, side, columns, Sources(scores=subset))


def _without_overlap(
    side: Dataset, trained: list[Dataset], name: str | None, what: str, settings: Settings
) -> tuple[Dataset, dict[str, Any]]:
    """The held-out rows that are not among the training rows, and how many there are of both."""
    found = [_overlap(side, rows, settings) for rows in trained]
    rows = np.unique(np.concatenate([part for part in found if part is not None] or [np.arange(0)]))
    facts = {"name": name, "rows": len(side), "overlap": None if found[0] is None else len(rows), "removed": 0}
    if any(part is None for part in found):
        logger.warning("Whether %s rows are among the training rows can't be told: their columns differ.", what)
    if not len(rows):
        return side, facts
    if not settings.remove_overlap:
        raise SettingError(
            f"{len(rows):,} of the {len(side):,} {what} rows are among the training rows (first: "
            f"{rows[:5].tolist()}): figures measured there are too good. Remove them from one side, or pass "
            "remove_overlap=True to leave them out of the testing."
        )
    if len(rows) == len(side):
        raise SettingError(f"All {len(side):,} {what} rows are among the training rows.")
    kept = np.setdiff1d(np.arange(len(side)), rows)
    return side.select(kept), {**facts, "rows": len(kept), "removed": len(rows)}


def _overlap(side: Dataset, trained: Dataset, settings: Settings) -> NDArray[np.int64] | None:
    """Held-out rows that say the same as a training row; None where the columns can't be compared."""
    ours = row_texts(trained, settings.text_columns, settings.label_column)
    if ours is None or any(column not in side.column_names for column in ours.columns):
        return None
    theirs, known = cast("Sequence[str]", RowTexts(side, ours.columns)), cast("Sequence[str]", ours)
    return find_overlap(None, None, None, theirs, known)
