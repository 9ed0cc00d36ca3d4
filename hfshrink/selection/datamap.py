"""The data map: how a model's view of each training row went over the epochs, with plot and likely label errors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import CheckpointError, SettingError, require
from hfshrink.labels import find_label_column
from hfshrink.record import versions
from hfshrink.saving import write_text
from hfshrink.selection.caching import check_rows
from hfshrink.terminal import table

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAP_FILE = "data_map.safetensors"
TEXT_FILE = "data_map.json"
MEASURES = ("confidence", "variability", "correctness", "aum", "forgetting", "el2n")
PLOT_SUFFIXES = (".png", ".svg")
PLOTTED_ROWS = 20_000
"""Points of a plot; of more rows that many are drawn, evenly spread over the data set."""


@dataclass(frozen=True)
class LabelError:
    """A row whose label is likely wrong: the given class and the one that the model preferred."""

    row: int
    given: int
    predicted: int
    aum: float
    confidence: float


@dataclass(frozen=True, eq=False)
class DataMap:
    """Measures (n,) of the rows of a data set, from eval-mode passes at the ends of epochs of one training run.

    With p the probability that the model gives a row's own label (of token tasks and language models the mean over
    the row's labelled tokens), z its logits, and means over the E recorded epochs:

    Attributes:
        confidence: Mean of p (cartography, arXiv:2009.10795).
        variability: Standard deviation of p over the epochs (divided by E).
        correctness: Share of the epochs in which the row is right (of tokens: the mean share that is right).
        aum: Mean margin z_y − max_{i≠y} z_i (arXiv:2001.10528); in eval mode at the epochs' ends.
        forgetting: How often a row that was right is wrong in the next recorded epoch (arXiv:1812.05159), of tokens
            the sum of the falls of the share that is right; infinite for a row that never was right.
        el2n: Mean of ‖p − onehot(y)‖₂ (arXiv:2107.07075, which takes early epochs of several runs).
        epochs: Numbers of the recorded epochs, counted from 1.
        columns: Column -> digest of its content, of the columns that the model was fed; empty where the rows were no
            `datasets.Dataset`.
        labels: The given classes, int64, −1 for rows without; None for token tasks.
        predicted: The class that the model preferred most over the given one, in the epoch of its lowest margin; the
            given one where no other was ever preferred. None for token tasks.
        label_names: Names of the model's classes.
        model: The model's name.
        seconds: Time that the passes took; None where it was not measured.
    """

    confidence: NDArray[np.float64]
    variability: NDArray[np.float64]
    correctness: NDArray[np.float64]
    aum: NDArray[np.float64]
    forgetting: NDArray[np.float64]
    el2n: NDArray[np.float64]
    epochs: tuple[int, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    predicted: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()
    model: str | None = None
    seconds: float | None = None

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def fingerprint(self) -> str | None:
        """Digest of the content of the data set, row by row; None where it is unknown."""
        if not self.columns:
            return None
        return hashlib.blake2b(json.dumps(sorted(self.columns.items())).encode(), digest_size=16).hexdigest()

    def check_rows(self, dataset: Any) -> None:
        """Refuse a data set that this map was not made of; columns that only one side has say nothing.

        Raises:
            SettingError: Another number of rows, another content of a column that both have, or other classes.
        """
        check_rows(dataset, len(self), self.columns)
        column = find_label_column(dataset)
        if self.labels is None or column is None or "int" not in str(getattr(dataset.features[column], "dtype", "")):
            return
        classes = [-1 if value is None or value < 0 else value for value in dataset.with_format(None)[column]]
        if classes != self.labels.tolist():
            raise SettingError(
                f"The data map was made of other rows: the classes in {column!r} are not those that it saw. Give the "
                "data set that it was made of, before any filter or shuffle, or make a new one."
            )

    def label_errors(self, top: int | None = None, threshold: float | None = None) -> list[LabelError]:
        """Rows whose label is likely wrong, the likeliest first: those of the lowest AUM (arXiv:2001.10528).

        A wrong label loses against the class that the model learns from rows alike, until it is memorised: its mean
        margin is low, below 0 where the other class won on average. Rare and hard rows look alike: look at them.

        Args:
            top: How many rows at most; None takes all below the threshold.
            threshold: Rows with an AUM below it; None takes 0 where `top` is None as well, and no threshold else.

        Raises:
            SettingError: `top` is below 1, or the rows have no single label.

        Example:
            >>> map = DataMap(*np.zeros((3, 2)), np.array([1.0, -2.0]), *np.zeros((2, 2)), (1,),
            ...               labels=np.array([0, 0]), predicted=np.array([0, 1]))
            >>> [(error.row, error.given, error.predicted) for error in map.label_errors()]
            [(1, 0, 1)]
        """
        if self.labels is None or self.predicted is None:
            raise SettingError(
                "Rows of tokens have no single label that could be wrong. Rank them with np.argsort(data_map.aum)."
            )
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise SettingError(f"top must be a whole number of at least 1, got {top!r}.")
        limit = threshold if threshold is not None else 0.0 if top is None else np.inf
        order = np.argsort(self.aum, kind="stable")  # NaN, rows without label, come last
        rows = order[self.aum[order] < limit][:top]
        return [
            LabelError(
                int(row),
                int(self.labels[row]),
                int(self.predicted[row]),
                *map(float, (self.aum[row], self.confidence[row])),
            )
            for row in rows
        ]

    def plot(self, path: str | Path) -> None:
        """Draw confidence against variability, coloured by correctness; the suffix says whether PNG or SVG.

        Easy rows lie at the top left, ambiguous ones at the right, hard ones and wrong labels at the bottom left.

        Raises:
            SettingError: Another suffix.
            MissingDependencyError: matplotlib is not installed.
        """
        if Path(path).suffix.lower() not in PLOT_SUFFIXES:
            raise SettingError(f"The plot's name must end in {' or '.join(PLOT_SUFFIXES)}, got {str(path)!r}.")
        figure = require("matplotlib.figure", extra="plots").Figure(figsize=(7, 5.5), layout="constrained")
        axes = figure.subplots()
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), PLOTTED_ROWS)).astype(int))
        points = axes.scatter(
            self.variability[rows],
            self.confidence[rows],
            c=self.correctness[rows],
            s=8,
            linewidths=0,
            cmap="viridis",
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        shown = f"{len(self):,} rows" if len(rows) == len(self) else f"{len(rows):,} of {len(self):,} rows"
        axes.set_xlabel("variability (standard deviation of p over epochs)")
        axes.set_ylabel("confidence (mean p of the given label)")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.set_title(f"{shown}, {len(self.epochs)} epochs", fontsize=9)
        figure.colorbar(points, ax=axes, label="correctness (share of epochs)")
        figure.savefig(path, dpi=150)

    def save(self, folder: str | Path) -> None:
        """Write `data_map.safetensors`, which `load` reads, and `data_map.json` for people.

        Raises:
            CheckpointError: They can't be written.
        """
        arrays = {name: getattr(self, name) for name in (*MEASURES, "labels", "predicted")}
        settings = self._settings()
        write_arrays(Path(folder) / MAP_FILE, {n: a for n, a in arrays.items() if a is not None}, settings)
        try:
            write_text(Path(folder) / TEXT_FILE, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"Can't write {Path(folder) / TEXT_FILE}: {error}.") from error

    @classmethod
    def load(cls, folder: str | Path) -> DataMap:
        """Read a data map from the folder that it was written to.

        Raises:
            CheckpointError: There is none, it is corrupt, or of a newer format.
        """
        path = Path(folder) / MAP_FILE
        arrays, settings = read_arrays(path)
        if settings.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} is no data map of format {FORMAT_VERSION}. Upgrade hfshrink, or make it anew."
            )
        optional = {name: arrays.pop(name) for name in ("labels", "predicted") if name in arrays}
        shapes = {array.shape for array in (*arrays.values(), *optional.values())}
        if set(arrays) != set(MEASURES) or len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise CheckpointError(f"{path} is corrupt: it holds {', '.join(sorted(arrays))} of shapes {shapes}.")
        rest: dict[str, Any] = {name: settings.get(name) for name in ("model", "seconds")}
        tuples: dict[str, Any] = {name: tuple(settings.get(name) or ()) for name in ("epochs", "label_names")}
        return cls(**arrays, **optional, **rest, **tuples, columns=dict(settings.get("columns") or {}))

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("epochs", "columns", "label_names", "model", "seconds")}
        return {
            "format_version": FORMAT_VERSION,
            "rows": len(self),
            **own,
            "fingerprint": self.fingerprint,
            "versions": versions(),
        }

    def __str__(self) -> str:
        epochs = ", ".join(map(str, self.epochs))
        lines = [("rows", f"{len(self):,}"), ("epochs", epochs)]
        lines += [
            (f"mean {name}", f"{np.nanmean(getattr(self, name)):.4f}") for name in MEASURES if name != "forgetting"
        ]
        lines.append(("never right", f"{np.isinf(self.forgetting).sum():,}"))
        if self.labels is not None:
            lines.append(("AUM below 0 (likely label errors)", f"{(self.aum < 0).sum():,}"))
        return table(("what", "value"), lines)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> None:
    """Write arrays, and what is to be known of them in the file's header, aside and then moved into place.

    Raises:
        CheckpointError: The file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    header = {"hfshrink": json.dumps(settings)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, metadata=header)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"Can't write {path}: {error}. What was there before is as it was.") from error


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the settings that `write_arrays` wrote.

    Raises:
        CheckpointError: The file is missing or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dict
            settings = json.loads((file.metadata() or {}).get("hfshrink", "{}"))
            return arrays, settings if isinstance(settings, dict) else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"Can't read {path}: {error}. Give the folder that the data map was written to."
        ) from error
