"""`Synthetic`: the learned images that `synthesize` returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfshrink.errors import CheckpointError
from hfshrink.saving import MAX_CONFIG_BYTES, save_aside
from hfshrink.selection.embeddings import without_bars
from hfshrink.selection.selection_report import SelectionReport

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_FILE, REPORT_FILE = "rows.parquet", "report.json"


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
