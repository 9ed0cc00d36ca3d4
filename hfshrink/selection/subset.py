"""`Subset`: the rows that were picked, as indices into the full data set, with the report of how and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.data import read_dataset
from hfshrink.errors import CheckpointError
from hfshrink.saving import MAX_CONFIG_BYTES, save_aside
from hfshrink.selection.caching import check_rows
from hfshrink.selection.selection_report import SelectionReport

if TYPE_CHECKING:
    from datasets import Dataset

INDICES_FILE, SCORES_FILE, REPORT_FILE = "indices.npy", "scores.npy", "report.json"


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a data set, picked by `select`.

    Attributes:
        dataset: The rows themselves, `full.select(indices)`: an indices mapping, nothing is copied.
        indices: (size,) rising int64 row numbers of the full data set.
        scores: (n,) of **all** rows of the full data set, the measure `report.score` with its paper's sign; None where
            the method needs none.
        report: How the subset was made. `print(subset)` shows it.
    """

    dataset: Dataset
    indices: NDArray[np.int64]
    scores: NDArray[np.float64] | None
    report: SelectionReport

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return str(self.report)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `indices.npy`, `scores.npy` and `report.json`: what it takes to make the subset again, not the rows.

        Args:
            folder: Missing or empty.
            overwrite: Whether a folder that holds files is replaced as a whole.

        Raises:
            CheckpointError: The folder holds files, or can't be written; it is as it was then.
        """
        with save_aside(folder, overwrite) as aside:
            np.save(aside / INDICES_FILE, self.indices, allow_pickle=False)
            if self.scores is not None:
                np.save(aside / SCORES_FILE, self.scores, allow_pickle=False)
            text = json.dumps(self.report.to_dict(), indent=2, allow_nan=False)
            (aside / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, dataset: Dataset) -> Subset:
        """The subset that `save` wrote.

        Args:
            folder: Where it lies.
            dataset: The full data set that it was picked from, or its folder. Columns may have been added to it since.

        Raises:
            CheckpointError: No subset lies there, or it is corrupt.
            SettingError: The data set has other rows than the one that the subset was picked from.
        """
        folder, dataset = Path(folder), read_dataset(dataset)
        report = SelectionReport.from_dict(_read_json(folder / REPORT_FILE))
        indices = _read_array(folder / INDICES_FILE, "i", report.size)
        rising = np.all(indices[1:] > indices[:-1]) and indices[0] >= 0 and indices[-1] < report.rows
        if not rising:
            raise CheckpointError(f"{folder / INDICES_FILE} must hold rising row numbers in 0..{report.rows - 1}.")
        scores = _read_array(folder / SCORES_FILE, "f", report.rows) if (folder / SCORES_FILE).exists() else None
        check_rows(dataset, report.rows, report.columns, "subset", must_share=True)
        indices = indices.astype(np.int64)
        return cls(dataset.select(indices), indices, scores, report)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large for a report; at most {MAX_CONFIG_BYTES:,} bytes are read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Can't read {path}: {error}. Give the folder that Subset.save wrote; it may be half-written."
        ) from None


def _read_array(path: Path, kind: str, length: int) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"Can't read {path}: {error}. It is half-written or corrupt.") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != kind or array.shape != (length,):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise CheckpointError(f"{path} must hold {length:,} numbers, as the report says, got {found}.")
    return np.array(array)
