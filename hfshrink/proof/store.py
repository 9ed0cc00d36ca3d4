"""Finished runs on disk: one folder each, so that a killed proof goes on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.saving import MAX_CONFIG_BYTES, locked, save_aside, write_text

FORMAT_VERSION = 1
ABOUT_FILE, RUN_FILE, RUNS = "proof.json", "run.json", "runs"


@dataclass(frozen=True)
class Key:
    """Which run: the arm's data, what is as in the full run (None for that run itself), and the seed."""

    data: str
    equal: str | None
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.data}-{self.equal or 'all'}-{self.seed}"

    def __str__(self) -> str:
        return f"the arm {self.data!r}{f' with equal {self.equal}' if self.equal else ''}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one run came to.

    Attributes:
        rows: Training rows.
        steps: Optimizer steps.
        epochs: Passes over the rows.
        seconds: Wall-clock time of the training.
        train_accuracy: On a sample of its training rows; None without labels.
        initial: Digest of the weights before the training.
        test: (n,) predicted classes of the test rows.
        out_of_distribution: (m,) of the rows from another source; None without.
    """

    rows: int
    steps: int
    epochs: float
    seconds: float
    train_accuracy: float | None
    initial: str
    test: NDArray[np.int64]
    out_of_distribution: NDArray[np.int64] | None = None


ARRAYS = ("test", "out_of_distribution")
TYPES: dict[str, Any] = {
    **dict.fromkeys(("rows", "steps"), int),
    **dict.fromkeys(("epochs", "seconds"), (int, float)),
    "train_accuracy": (int, float, type(None)),
    "initial": str,
}


@dataclass(frozen=True)
class RunStore:
    """A folder of finished runs; without a folder nothing is kept.

    Attributes:
        folder: Where the proof lies; None keeps nothing.
        sizes: Name of a held-out data set -> its rows.
        classes: Of the model.
    """

    folder: Path | None
    sizes: Mapping[str, int]
    classes: int

    def find(self, key: Key) -> Outcome | None:
        """The run, where it is there.

        Raises:
            CheckpointError: It is damaged.
        """
        if self.folder is None or not (self.folder / RUNS / key.name / RUN_FILE).is_file():
            return None
        place = self.folder / RUNS / key.name
        found = _read_json(place / RUN_FILE)
        wrong = [name for name, kind in TYPES.items() if not isinstance(found.get(name, key), kind)]
        if wrong or isinstance(found["steps"], bool):
            raise CheckpointError(f"{place / RUN_FILE} is damaged ({', '.join(wrong)}). Delete {place.name} there.")
        arrays: dict[str, Any] = {
            name: self._read_array(place / f"{name}.npy", rows) for name, rows in self.sizes.items()
        }
        return Outcome(**{name: found[name] for name in TYPES}, **arrays)

    def keep(self, key: Key, outcome: Outcome) -> None:
        """Write the run aside and move it into place.

        Raises:
            CheckpointError: It can't be written.
        """
        if self.folder is None:
            return
        numbers = {item.name: getattr(outcome, item.name) for item in fields(outcome) if item.name not in ARRAYS}
        with save_aside(self.folder / RUNS / key.name, overwrite=True) as aside:
            for name in self.sizes:
                np.save(aside / f"{name}.npy", getattr(outcome, name), allow_pickle=False)
            text = json.dumps({**asdict(key), **numbers}, indent=2, allow_nan=False)
            (aside / RUN_FILE).write_text(text + "\n", encoding="utf-8")

    def _read_array(self, path: Path, rows: int) -> NDArray[np.int64]:
        try:
            array = np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"Can't read {path}: {error}. Delete its folder: the run is repeated.") from None
        good = isinstance(array, np.ndarray) and array.shape == (rows,) and array.dtype.kind == "i"
        if not good or (rows and not 0 <= array.min() <= array.max() < self.classes):
            raise CheckpointError(f"{path} must hold {rows:,} class numbers. Delete its folder: the run is repeated.")
        return np.array(array, dtype=np.int64)


@contextlib.contextmanager
def open_store(
    folder: str | Path | None, fingerprint: Mapping[str, Any], sizes: Mapping[str, int], classes: int
) -> Iterator[RunStore]:
    """The runs in a folder, which must be of the same rows, model and settings; a second process waits here.

    Args:
        folder: Missing, empty, or of an earlier call; None keeps nothing.
        fingerprint: What every run depends on; JSON-safe.
        sizes: As of `RunStore`.
        classes: As of `RunStore`.

    Raises:
        SettingError: The runs there are of other rows, another model or other settings; the message names them.
        CheckpointError: The folder holds something else, or can't be read or written.
    """
    if folder is None:
        yield RunStore(None, sizes, classes)
        return
    place = Path(folder).expanduser()
    current = json.loads(json.dumps({"format_version": FORMAT_VERSION, **fingerprint}, default=str))
    if place.is_file():
        raise CheckpointError(f"output_dir={place} is a file. Give a missing or empty folder.")
    with locked(place, "output_dir"):
        if any(not path.name.startswith(".") for path in place.iterdir()):
            _check_same(place, current)
        else:
            try:
                write_text(place / ABOUT_FILE, json.dumps(current, indent=2) + "\n")
            except OSError as error:
                raise CheckpointError(f"Can't write {place}: {error}. Choose another output_dir.") from error
        yield RunStore(place, sizes, classes)


def _check_same(place: Path, current: Mapping[str, Any]) -> None:
    if not (place / ABOUT_FILE).is_file():
        raise CheckpointError(f"output_dir={place} holds files and no {ABOUT_FILE}. Give a missing or empty folder.")
    kept, now = _flat(_read_json(place / ABOUT_FILE)), _flat(current)
    changed = sorted(name for name in {*kept, *now} if kept.get(name) != now.get(name))
    if changed:
        shown = ", ".join(f"{name} (was {_short(kept.get(name))}, is {_short(now.get(name))})" for name in changed[:5])
        raise SettingError(
            f"output_dir={place} holds runs of other data, another model or other settings: {shown}. Runs of both "
            "don't make one proof: choose another output_dir, or give what was given then."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _short(value: Any) -> str:
    return str(value)[:40]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large; at most {MAX_CONFIG_BYTES:,} bytes are read.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Can't read {path}: {error}. Delete it, or choose another output_dir.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a JSON object.")
    return found
