"""`Subset`: the rows that were picked, as indices into the full data set, with the report of how and why."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.data import read_dataset
from hfshrink.errors import CheckpointError
from hfshrink.record import model_name, report
from hfshrink.saving import MAX_CONFIG_BYTES, save_aside
from hfshrink.selection.caching import check_rows
from hfshrink.selection.selection_report import SelectionReport

if TYPE_CHECKING:
    from datasets import Dataset

INDICES_FILE, SCORES_FILE, LEARNT_FILE, REPORT_FILE = "indices.npy", "scores.npy", "learnt.npy", "report.json"


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a data set, picked by `select`.

    Attributes:
        dataset: The rows themselves, `full.select(indices)`: an indices mapping, nothing is copied.
        indices: (size,) rising int64 row numbers of the full data set.
        scores: (n,) of **all** rows of the full data set, the measure `report.score` with its paper's sign; None where
            the method needs none.
        report: How the subset was made. `print(subset)` shows it.
        learnt: (size, d) float32, of `synthesize` the learned embedding that each row stands for, in the coordinates
            of the embeddings (of unit length where those were normalized); else None.
    """

    dataset: Dataset
    indices: NDArray[np.int64]
    scores: NDArray[np.float64] | None
    report: SelectionReport
    learnt: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return str(self.report)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `indices.npy`, `scores.npy`, `learnt.npy` and `report.json`: what the subset is made of, not the rows.

        Args:
            folder: Missing or empty.
            overwrite: Whether a folder that holds files is replaced as a whole.

        Raises:
            CheckpointError: The folder holds files, or can't be written; it is as it was then.
        """
        with save_aside(folder, overwrite) as aside:
            np.save(aside / INDICES_FILE, self.indices, allow_pickle=False)
            for name, array in ((SCORES_FILE, self.scores), (LEARNT_FILE, self.learnt)):
                if array is not None:
                    np.save(aside / name, array, allow_pickle=False)
            text = json.dumps(self.report.to_dict(), indent=2, allow_nan=False)
            (aside / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    def attach(self, model: Any, repo_id: str | None = None) -> None:
        """Say in a model's record that it was trained on these rows: its card shows the tables of their data card.

        Args:
            model: A transformers model; the next `save_pretrained` or push carries it.
            repo_id: The Hub id that the subset was pushed to, which the card links to.

        Raises:
            SettingError: It is no model.

        Example:
            >>> from datasets import Dataset
            >>> from transformers import BertConfig, BertModel
            >>> from hfshrink.selection import select
            >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
            >>> select(Dataset.from_dict({"row": [1, 2, 3, 4]}), 0.5, "random").attach(model, "me/half")
            >>> model.config.hfshrink["details"]["subset"]["repo_id"]
            'me/half'
        """
        record = report(model)
        facts = {**self.report.to_dict(), **({} if repo_id is None else {"repo_id": repo_id})}
        details, base = {**record.details, "subset": facts}, record.base_model or model_name(model)
        dataclasses.replace(record, base_model=base, details=details).attach(model)

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
        about = SelectionReport.from_dict(_read_json(folder / REPORT_FILE))
        indices = _read_array(folder / INDICES_FILE, "i", about.size)
        rising = np.all(indices[1:] > indices[:-1]) and indices[0] >= 0 and indices[-1] < about.rows
        if not rising:
            raise CheckpointError(f"{folder / INDICES_FILE} must hold rising row numbers in 0..{about.rows - 1}.")
        scores = _read_array(folder / SCORES_FILE, "f", about.rows) if (folder / SCORES_FILE).exists() else None
        learnt = _read_array(folder / LEARNT_FILE, "f", about.size, 2) if (folder / LEARNT_FILE).exists() else None
        check_rows(dataset, about.rows, about.columns, "subset", must_share=True)
        indices = indices.astype(np.int64)
        return cls(dataset.select(indices), indices, scores, about, learnt)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large for a report; at most {MAX_CONFIG_BYTES:,} bytes are read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Can't read {path}: {error}. Give the folder that Subset.save wrote; it may be half-written."
        ) from None


def _read_array(path: Path, kind: str, length: int, dimensions: int = 1) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"Can't read {path}: {error}. It is half-written or corrupt.") from None
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.dtype.kind != kind or array.ndim != dimensions or len(array) != length:
        found = f"{array.dtype} of shape {array.shape}" if is_array else "an archive"
        what = "numbers" if dimensions == 1 else "vectors"
        raise CheckpointError(f"{path} must hold {length:,} {what}, as the report says, got {found}.")
    return np.array(array)
