"""What `synthesize` returns: learned images, or the real rows nearest to learned embeddings."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import CheckpointError
from hfshrink.saving import MAX_CONFIG_BYTES, save_aside
from hfshrink.selection.embeddings import without_bars
from hfshrink.selection.selection_report import SelectionReport
from hfshrink.selection.subset import Subset

if TYPE_CHECKING:
    from datasets import Dataset

LEARNT_FILE, ROWS_FILE, REPORT_FILE = "learnt.npy", "rows.parquet", "report.json"


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Learned images, class by class; they are no rows of the data set that they were learned from.

    Attributes:
        dataset: The images under the name and in the form that they have in the full data set, with their labels.
        report: How they were made; its `size` counts images. `print(synthetic)` shows it.
    """

    dataset: Dataset
    report: SelectionReport

    def __len__(self) -> int:
        return len(self.dataset)

    def __str__(self) -> str:
        return str(self.report)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the images with all their columns, `rows.parquet`, and `report.json`.

        Args:
            folder: Missing or empty.
            overwrite: Whether a folder that holds files is replaced as a whole.

        Raises:
            CheckpointError: The folder holds files, or can't be written; it is as it was then.
        """
        with save_aside(folder, overwrite) as aside, without_bars():
            self.dataset.with_format(None).to_parquet(aside / ROWS_FILE)
            text = json.dumps(self.report.to_dict(), indent=2, allow_nan=False)
            (aside / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Synthetic:
        """The images that `save` wrote; they need no other data set.

        Raises:
            CheckpointError: None lie there, or a file is corrupt.
        """
        import datasets
        import pyarrow as pa
        from datasets.table import InMemoryTable
        from pyarrow import parquet

        folder = Path(folder)
        try:
            if (folder / REPORT_FILE).stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError(f"{REPORT_FILE} is larger than {MAX_CONFIG_BYTES:,} bytes")
            report = SelectionReport.from_dict(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
            rows = datasets.Dataset(InMemoryTable(parquet.read_table(folder / ROWS_FILE)))
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            raise CheckpointError(
                f"Can't read {folder}: {error}. Give the folder that Synthetic.save wrote."
            ) from None
        if len(rows) != report.size:
            raise CheckpointError(
                f"{folder / ROWS_FILE} must hold {report.size} images, as the report says, got {len(rows)}."
            )
        return cls(rows, report)


@dataclass(frozen=True, eq=False)
class LearntSubset(Subset):
    """The real rows nearest to learned embeddings.

    Attributes:
        learnt: (size, d) float32, the learned embedding that each row of `indices` stands for, in the coordinates of
            the embeddings (of unit length where those were normalized); None where they were not saved.
    """

    learnt: NDArray[np.float32] | None = None

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write what `Subset.save` writes, and `learnt.npy`.

        Raises:
            CheckpointError: The folder holds files, or can't be written; it is as it was then.
        """
        with save_aside(folder, overwrite) as aside:
            super().save(aside)
            if self.learnt is not None:
                np.save(aside / LEARNT_FILE, self.learnt, allow_pickle=False)

    @classmethod
    def load(cls, folder: str | Path, dataset: Dataset) -> LearntSubset:
        """The subset that `save` wrote.

        Raises:
            CheckpointError: No subset lies there, or it is corrupt.
            SettingError: The data set has other rows than the one that the subset was made of.
        """
        plain = Subset.load(folder, dataset)
        path = Path(folder) / LEARNT_FILE
        learnt = _read_learnt(path, len(plain)) if path.exists() else None
        known = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return cls(**known, learnt=learnt)


def _read_learnt(path: Path, rows: int) -> NDArray[np.float32]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"Can't read {path}: {error}. It is half-written or corrupt.") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or len(array) != rows or array.dtype != np.float32:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise CheckpointError(f"{path} must hold {rows:,} float32 vectors, as the report says, got {found}.")
    return np.array(array)
