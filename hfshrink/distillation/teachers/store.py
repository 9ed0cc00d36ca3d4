"""The teacher's answers on disk: shards keyed by the content of each row, written once and found again in any order.

A folder holds `cache.json` (what the answers depend on), `shard-*.safetensors` (the answers) and `tables/` (Arrow
files of the last data sets asked for; they can be made again from the shards). A row's answer has n positions:
one for heads with one output per example. Its parts are

    full     logits (n, classes)
    sampled  widths (n,), ids (Σ widths,), counts (Σ widths,)
    top_k    widths (n,), ids (Σ widths,), probabilities (Σ widths,)

and a shard holds the parts of its rows one behind the other, with `keys` (rows, 16) and `lengths` (rows,), the n.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.distillation.teachers.fingerprints import differences
from hfshrink.errors import CheckpointError
from hfshrink.saving import LOCK, MAX_CONFIG_BYTES, locked, write_text

Row = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "cache.json"
TABLES = "tables"
KEY_BYTES = 16
SHARD_BYTES = 32 * 2**20  # a finished shard survives a kill: small enough to lose little, large enough to be few
SHARD_SECONDS = 60.0
OPEN_SHARDS = 512  # files mapped into memory at once; what is read of each by then is a few numbers per row
LEFTOVERS = (".shard-*.safetensors", f".{MANIFEST}.*", f"{TABLES}/.*.arrow.*")  # of processes that were killed
DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "U16": np.uint16, "I32": np.int32}


@contextlib.contextmanager
def open_store(folder: str | Path, settings: dict[str, Any]) -> Iterator[Store]:
    """The store in a folder, locked: a second process waits here until the first one is done.

    A lock and no barrier: a barrier of torch.distributed gives up after minutes, a cache may take hours.

    Args:
        folder: Missing, empty, or a store made with the same settings.
        settings: What the answers depend on, JSON-safe; `settings["answers"]` holds `parts`, `classes` and `seed`.

    Yields:
        The store. When the block ends, by an error too, all rows that were added are on disk.

    Raises:
        CheckpointError: The folder is something else, was made with other settings, or can't be written.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; cache_dir must be a folder.")
    with locked(path):
        store = Store(path, _join(path, settings), settings["answers"])
        try:
            yield store
        finally:
            store.flush()


class Store:
    """Answers by key; made by `open_store`, which holds the lock that it needs.

    Args:
        folder: Where the shards lie.
        identity: Random name of this cache: each shard holds it, so that a file of another cache is seen.
        answers: `parts` (name -> dtype of safetensors), `classes` and `entries`.
    """

    def __init__(self, folder: Path, identity: str, answers: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.answers = answers
        self.parts: dict[str, str] = dict(answers["parts"])
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._open: dict[Path, Shard] = {}
        self._keys: list[bytes] = []
        self._rows: list[Row] = []
        self._bytes, self._since = 0, time.monotonic()
        if (folder / TABLES).is_symlink():
            raise CheckpointError(
                f"{folder / TABLES} is a link. Files are written and deleted there: make it a folder."
            )
        for left in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
            left.unlink(missing_ok=True)  # we hold the lock, so nobody writes it

    def find(self, keys: Iterable[bytes]) -> set[bytes]:
        """Look for keys in the shards; returns those that are there and can be read from now on.

        Raises:
            CheckpointError: A shard is truncated, corrupt, or of another cache.
        """
        wanted = set(keys)
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            stored = self._shard(path).keys
            for number, row in enumerate(stored):
                if (key := row.tobytes()) in wanted:
                    self._places.setdefault(key, (path, number))
        return wanted & self._places.keys()

    def add(self, key: bytes, row: Row) -> None:
        """Keep an answer; a shard is written when enough have come together."""
        self._keys.append(key)
        self._rows.append(row)
        self._bytes += sum(part.nbytes for part in row.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one shard, aside first, so that nobody ever sees half of one.

        Raises:
            CheckpointError: It can't be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        if not self._keys:
            return
        first = "widths" if "widths" in self.parts else "logits"
        tensors = {name: np.concatenate([row[name] for row in self._rows]) for name in self.parts}
        tensors["keys"] = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, KEY_BYTES)
        tensors["lengths"] = np.array([len(row[first]) for row in self._rows], np.int32)
        path = self.folder / f"shard-{secrets.token_hex(8)}.safetensors"
        aside = path.with_name(f".{path.name}")
        try:
            save_file(tensors, aside, metadata={"hfshrink_cache": self.identity})
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise CheckpointError(f"Can't write {path}: {error}. The shards before it are kept.") from error
        self._places.update({key: (path, number) for number, key in enumerate(self._keys)})
        self._keys, self._rows, self._bytes, self._since = [], [], 0, time.monotonic()

    def read(self, keys: list[bytes]) -> list[Row]:
        """The answers to some keys, in their order; each shard is opened once and only these rows are read.

        Raises:
            CheckpointError: A shard is gone or corrupt.
        """
        rows: dict[bytes, Row] = {}
        for key in sorted(set(keys), key=self._places.__getitem__):
            path, number = self._places[key]
            rows[key] = self._shard(path).row(number)
        return [rows[key] for key in keys]

    def row_bytes(self) -> int:
        """Mean size of a row on disk, at least 1."""
        paths = {path for path, _ in self._places.values()}
        rows = sum(len(self._shard(path).keys) for path in paths)
        return max(1, sum(path.stat().st_size for path in paths) // max(rows, 1))

    def _shard(self, path: Path) -> Shard:
        if path not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[path] = open_shard(path, self.identity, self.answers)
        return self._open[path]


@dataclass(frozen=True)
class Shard:
    """One file, checked: its keys and where each row's parts begin; the parts stay on disk until they are read."""

    path: Path
    file: Any
    answers: Mapping[str, Any]
    keys: NDArray[np.uint8]  # (rows, 16)
    positions: NDArray[np.int64]  # (rows + 1,): where each row's positions begin
    entries: NDArray[np.int64] | None  # (rows + 1,): where each row's entries begin; None for full logits

    def row(self, number: int) -> Row:
        """The parts of one row."""
        start, end = int(self.positions[number]), int(self.positions[number + 1])
        if self.entries is None:
            logits = self.file.get_slice("logits")[start:end]
            if not np.isfinite(logits).all():
                raise _corrupt(self.path, f"row {number} holds NaN or infinity")
            return {"logits": logits}
        a, b = int(self.entries[number]), int(self.entries[number + 1])
        bounds = {name: (start, end) if name == "widths" else (a, b) for name in self.answers["parts"]}
        row = {name: self.file.get_slice(name)[c:d] for name, (c, d) in bounds.items()}
        if wrong := _wrong_entries(row, int(self.answers["classes"]), self.answers["entries"]):
            raise _corrupt(self.path, f"row {number} holds {wrong}")
        return row


def _wrong_entries(row: Row, classes: int, draws: int) -> str | None:
    """What can't be in a row of ids with counts or probabilities; None where all is well."""
    if (row["ids"] < 0).any() or (row["ids"] >= classes).any():
        return f"ids outside 0..{classes - 1}"
    if "probabilities" in row:
        fine = ((row["probabilities"] >= 0) & (row["probabilities"] <= 1)).all()  # NaN is neither
        return None if fine else "probabilities outside 0..1"
    ends = np.cumsum(row["widths"], dtype=np.int64)
    drawn = np.diff(np.concatenate([[0], np.cumsum(row["counts"], dtype=np.int64)])[np.concatenate([[0], ends])])
    if (row["counts"] < 1).any() or (drawn != draws).any():
        return f"counts that do not add up to {draws} draws per position"
    return None


def open_shard(path: Path, identity: str, answers: Mapping[str, Any]) -> Shard:
    """Open a shard and hold its shapes against each other before anything is read by them.

    Raises:
        CheckpointError: It is truncated, corrupt, or of another cache; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    parts: Mapping[str, str] = answers["parts"]
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is a link or no file: it is not of this cache. Move it out of the folder.")
    try:
        file = safe_open(path, "np")
        found = (file.metadata() or {}).get("hfshrink_cache")
        if found != identity:
            raise CheckpointError(
                f"{path} belongs to another cache ({found}, this one is {identity}). Move it out of the folder."
            )
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        kinds = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
        _check_kinds(path, kinds, parts, int(answers["classes"]))
        positions = _starts(path, file.get_tensor("lengths"))
        first = "widths" if "widths" in parts else "logits"
        if positions[-1] != kinds[first][1][0]:
            raise _corrupt(path, f"its rows have {positions[-1]} positions, {first} {kinds[first][1][0]}")
        entries = None
        if first == "widths":
            entries = _starts(path, file.get_tensor("widths"))[positions]
            if entries[-1] != kinds["ids"][1][0]:
                raise _corrupt(path, f"its positions have {entries[-1]} entries, ids {kinds['ids'][1][0]}")
        return Shard(path, file, answers, file.get_tensor("keys"), positions, entries)
    except (OSError, SafetensorError) as error:
        raise _corrupt(path, str(error)) from error


def _check_kinds(path: Path, kinds: Mapping[str, Any], parts: Mapping[str, str], classes: int) -> None:
    dtypes = {"keys": "U8", "lengths": "I32", **parts}
    found = {name: kind for name, (kind, _) in kinds.items()}
    if found != dtypes:
        raise _corrupt(path, f"it holds {_some(found)}, expected {_some(dtypes)}")
    tails = {"keys": [KEY_BYTES], "logits": [classes]}
    wrong = [name for name, (_, shape) in kinds.items() if shape[1:] != tails.get(name, []) or not shape]
    rows = kinds["keys"][1][0] == kinds["lengths"][1][0]
    entries = {kinds[name][1][0] for name in ("ids", "counts", "probabilities") if name in kinds}
    if wrong or not rows or len(entries) > 1:
        raise _corrupt(path, f"its shapes do not fit: {_some(kinds)}")


def _starts(path: Path, lengths: NDArray[Any]) -> NDArray[np.int64]:
    if len(lengths) and lengths.min() < 0:
        raise _corrupt(path, "a length is negative")
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _some(kinds: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in sorted(kinds.items())) or "nothing"


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt: {why}. Delete it; its rows are computed again.")


def _join(folder: Path, settings: dict[str, Any]) -> str:
    """Found the store, or check that it was made with these settings; returns its identity."""
    path = folder / MANIFEST
    if not path.is_file():
        names = sorted(file.name for file in folder.iterdir())
        # The first process may have been killed at this very file.
        if others := [name for name in names if name != LOCK and not name.startswith(f".{MANIFEST}.")]:
            raise CheckpointError(
                f"{folder} has no {MANIFEST} but {', '.join(others[:3])}: it is no cache of a teacher. "
                "Give an empty or a missing folder."
            )
        identity = secrets.token_hex(8)
        content = {"format_version": FORMAT_VERSION, "identity": identity, **settings}
        try:
            write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"Can't write {path}: {error}. Choose another cache_dir.") from error
        return identity
    stored = _read_manifest(path)
    if found := differences(stored, settings):
        raise CheckpointError(
            f"{folder} was made with other settings: {'; '.join(found)}. Give each teacher, tokenizer and "
            "setting a cache_dir of its own, or delete the folder."
        )
    return str(stored["identity"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}). Delete the folder.") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}; this hfshrink reads {FORMAT_VERSION}. Update it, or delete "
            "the folder."
        )
    if not isinstance(content.get("identity"), str):
        raise CheckpointError(f"{path} has no identity: it was changed by hand. Delete the folder.")
    return dict(content)
