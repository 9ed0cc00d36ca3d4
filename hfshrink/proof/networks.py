"""Fresh models: the same weights for the same seed, whatever was trained before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.labels import check_class_order, find_label_column
from hfshrink.loading import infer_task, load
from hfshrink.record import config_of, model_name
from hfshrink.saving import read_config
from hfshrink.selection.contents import is_text, row_texts

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = ("text-classification", "image-classification")
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
"""End of an architecture's name -> its task; models with other heads get a classifier."""


@dataclass(frozen=True, eq=False)
class Networks:
    """Where fresh models come from.

    Attributes:
        make: Gives a fresh model; what it draws depends on the seed that was set before.
        first: The one made for seed 0, by which the rows are encoded and checked.
        processor: The tokenizer or image processor beside it; None without.
        task: One of `TASKS`.
        title: Name for the record.
    """

    make: Callable[[], Any]
    first: Any
    processor: Any
    task: str
    title: str

    def fresh(self, seed: int) -> Any:
        """A fresh model for this seed."""
        return _seeded(self.make, seed)


def read_networks(
    model_init: Any, rows: Dataset, label_column: str | None, text_columns: Sequence[str] | None = None
) -> Networks:
    """Check where models come from, and make the first.

    Args:
        model_init: A folder or Hub id, or a function of no argument (or of one, as the Trainer allows).
        rows: The training data, raw or encoded: a model without a classifier gets one for its classes.
        label_column: Name of the label column; None finds it.
        text_columns: Columns of text; None finds them.

    Raises:
        SettingError: It is a model, or a function that returns none or the same one again.
        UnsupportedModelError: The model does not classify rows.
        CheckpointError: The folder or Hub id can't be read.
    """
    if isinstance(model_init, str | Path):
        return _from_checkpoint(model_init, rows, label_column, text_columns)
    if isinstance(model_init, nn.Module) or not callable(model_init):
        raise SettingError(
            "model_init must be a folder, a Hub id, or a function that makes a fresh model for every run, got "
            f"{type(model_init).__name__}. Pass for example model_init=lambda: "
            "AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)."
        )
    make = _caller(model_init)
    first = _seeded(make, 0)
    if not isinstance(first, nn.Module):
        raise SettingError(f"model_init must return a model, got {type(first).__name__}.")
    if make() is first:
        raise SettingError(
            "model_init returns the same model again, which the first run would have trained. Load or make a fresh "
            "one inside the function."
        )
    _, processor = load(first)
    return Networks(make, first, processor, _check_task(infer_task(first)), model_name(first) or type(first).__name__)


def _from_checkpoint(
    source: str | Path, rows: Dataset, label_column: str | None, text_columns: Sequence[str] | None
) -> Networks:
    names = read_config(source).get("architectures") or [""]
    task = next((task for end, task in HEADS.items() if str(names[0]).endswith(end)), None)
    head: dict[str, Any] = {}
    if task is None:
        head = _head(rows, label_column)
        task = _task_of_rows(rows, label_column, text_columns)
    _check_task(task)

    def make() -> Any:
        return load(source, task, **head)[0]

    first = _seeded(make, 0)
    _, processor = load(first)
    title = Path(source).name if Path(source).exists() else str(source)
    return Networks(make, first, processor, task, title)


def _task_of_rows(rows: Dataset, label_column: str | None, text_columns: Sequence[str] | None) -> str:
    texts = row_texts(rows, text_columns, label_column)
    if texts is None:
        raise SettingError(
            f"Found neither text nor images to train on among {', '.join(rows.column_names)}. Name one or two columns "
            "of text: text_columns=[…]."
        )
    return "text-classification" if is_text(rows, texts) else "image-classification"


def _head(rows: Dataset, label_column: str | None) -> dict[str, Any]:
    """What the config of a new classifier says: its classes, by their names where the rows have them."""
    column = find_label_column(rows, label_column)
    if column is None:
        raise SettingError(f"The training rows have no labels ({', '.join(rows.column_names)}): name label_column=.")
    names = getattr(rows.features[column], "names", None)
    values = [value for value in rows.with_format(None).unique(column) if value is not None]
    if not values:
        raise SettingError(f"The column {column!r} holds no label: all rows are None.")
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(values)
    if names is not None:
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": _numbered(names)}
    if not all(isinstance(value, int) for value in values):
        raise _unsupported(f"rows whose labels are {type(values[0]).__name__}s")
    return {"num_labels": max(2, 1 + max(values, default=1))}


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _caller(function: Callable[..., Any]) -> Callable[[], Any]:
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = sum(one.kind in positional and one.default is one.empty for one in parameters)
    if count > 1:
        raise SettingError(f"model_init must take no argument, or the Trainer's trial alone; it takes {count}.")
    return (lambda: function(None)) if count else function


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    from transformers import set_seed

    set_seed(seed)
    return make()


def _check_task(task: str) -> str:
    if task not in TASKS:
        raise _unsupported(f"a model for {task}")
    return task


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"evaluate_subset proves classifiers of one label a row ({', '.join(TASKS)}), got {what}. For others train on "
        "both sides with equal steps, and hold the models against each other with hfshrink.compare."
    )


def refuse_kind(kind: str) -> None:
    """Refuse kinds of output other than one label a row.

    Raises:
        UnsupportedModelError: As said.
    """
    if kind != "single_label":
        raise _unsupported(f"{kind.replace('_', ' ')} labels")


def check_answer_order(subset: Any, networks: Networks) -> None:
    """Refuse answers of a teacher whose classes are in another order than the model's: it would learn others.

    Labels follow their names into the model's order; answers are numbers alone.

    Raises:
        SettingError: As said.
    """
    report = getattr(subset, "report", None)
    about = getattr(report, "details", {}).get("teacher") or {}
    check_class_order(about.get("labels") or [], config_of(networks.first), "The teacher's answers are of the classes")
