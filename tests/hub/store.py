"""The repositories of the Hub on disk: ``models/`` and ``datasets/``, a folder a namespace, each with its record."""

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub.refusal import Refusal, bad_request
from hub.repository import Change, Repository

KINDS = ("models", "datasets")
MAIN = "refs/heads/main"
LARGE_BY_NAME = {
    "models": "7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle "
    "pkl pt pth rar safetensors tar.* tar tflite tgz wasm xz zip zst *tfevents*",
    "datasets": "7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* lz4 mds mlmodel model msgpack npy npz onnx ot parquet "
    "pb pickle pkl pt pth rar safetensors tar.* tar tflite tgz wasm xz zip zst *tfevents* pcm sam raw aac flac mp3 "
    "ogg wav bmp gif png tiff jpg jpeg webp mp4 webm",
}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def attributes(kind: str) -> bytes:
    """The ``.gitattributes`` that a new repository starts with."""
    patterns = (word if word.startswith("*") else f"*.{word}" for word in LARGE_BY_NAME[kind].split())
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns).encode()


def check_name(name: object, what: str = "name") -> str:
    """A name by the Hub's rule.

    Raises:
        Refusal: It is not.
    """
    shaped = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?", name)
    if not shaped or "--" in name or ".." in name or name.endswith((".git", ".ipynb")):
        raise bad_request(
            f"Invalid {what} {name!r}: 1 to 96 of A-Z a-z 0-9 _ . -, no . or - at either end, no -- or .., "
            "not ending in .git or .ipynb"
        )
    return str(name)


@dataclass
class Record:
    """What the Hub knows of a repository beside git: who may see it, and what was said about it."""

    private: bool = False
    gated: bool | str = False
    created: str = field(default_factory=now)
    discussions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """All repositories in ``folder``. A repository is there or not: it is made and deleted aside."""

    folder: Path

    def path(self, kind: str, repo_id: str) -> Path:
        return self.folder / kind / f"{repo_id}.git"

    def find(self, kind: str, repo_id: str) -> Repository | None:
        parts = repo_id.split("/")
        if len(parts) != 2 or any(part in ("", ".", "..") or "\0" in part for part in parts):
            return None
        path = self.path(kind, repo_id)
        return Repository(path) if path.is_dir() else None

    def names(self, kind: str) -> Iterator[str]:
        for path in sorted((self.folder / kind).glob("*/*.git")):
            yield f"{path.parent.name}/{path.stem}"

    def _aside(self) -> Path:
        path = self.folder / "aside" / uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> None:
        """A repository with a first commit, as the Hub makes it."""
        aside = self._aside()
        repository = Repository.begin(aside)
        repository.commit(MAIN, None, [Change(".gitattributes", attributes(kind))], "initial commit", author)
        self.write_record(repository, Record(private=private))
        path = self.path(kind, repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(path)

    def delete(self, kind: str, repo_id: str) -> None:
        aside = self._aside()
        self.path(kind, repo_id).rename(aside)
        shutil.rmtree(aside)

    def move(self, kind: str, old: str, new: str) -> None:
        path = self.path(kind, new)
        if path.exists():
            raise Refusal(409, f"{new} exists already")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path(kind, old).rename(path)

    @staticmethod
    def record(repository: Repository) -> Record:
        return Record(**json.loads((repository.folder / "record.json").read_text()))

    @staticmethod
    def write_record(repository: Repository, record: Record) -> None:
        aside = repository.folder / f"record.{uuid.uuid4().hex}"
        aside.write_text(json.dumps(asdict(record)))
        aside.replace(repository.folder / "record.json")
