"""Large files: their pointers in git, their bytes on disk under the sha256, and uploads in one piece or in parts."""

import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hub.refusal import bad_request

POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>\d+)\n"
)
LARGEST_POINTER = 200
OID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Pointer:
    """What git keeps in place of a large file."""

    oid: str
    size: int

    @property
    def text(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n".encode()

    @classmethod
    def read(cls, data: bytes) -> "Pointer | None":
        found = POINTER.fullmatch(data)
        return cls(found["oid"].decode(), int(found["size"])) if found else None


@dataclass(frozen=True)
class LargeFiles:
    """The large files of one repository, in its folder as git-lfs keeps them: ``lfs/objects/ab/cd/<sha256>``.

    A file gets its name only when all its bytes are there and have this sha256, so a name is a promise.
    """

    folder: Path

    def path(self, oid: str) -> Path:
        if not OID.fullmatch(oid):
            raise bad_request(f"{oid!r} is no sha256: expected 64 digits of 0-9a-f.")
        return self.folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def size(self, oid: str) -> int | None:
        path = self.path(oid)
        return path.stat().st_size if path.is_file() else None

    def part(self, oid: str, number: int) -> Path:
        return self.folder / "lfs" / "parts" / f"{oid}.{number:05d}"

    def aside(self) -> Path:
        """A file for bytes that have not been looked at."""
        folder = self.folder / "lfs" / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex

    def keep(self, aside: Path, digest: str, oid: str, size: int) -> None:
        """Gives the bytes their name.

        Raises:
            Refusal: Their sha256 or their number is not what was announced.
        """
        found = aside.stat().st_size
        if digest != oid or found != size:
            aside.unlink()
            raise bad_request(f"Expected {size} bytes of sha256 {oid}, got {found} bytes of sha256 {digest}.")
        path = self.path(oid)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(path)

    def join(self, oid: str, size: int, etags: Sequence[str]) -> None:
        """Puts the parts of an upload together.

        Raises:
            Refusal: A part is missing or isn't what its ETag says, or the whole isn't what was announced.
        """
        whole, aside = hashlib.sha256(), self.aside()
        parts = [self.part(oid, number) for number in range(1, len(etags) + 1)]
        with aside.open("wb") as file:
            for number, (part, etag) in enumerate(zip(parts, etags, strict=True), 1):
                data = part.read_bytes() if part.is_file() else b""
                if f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"' != etag:
                    aside.unlink()
                    raise bad_request(f"Part {number} of {oid} is missing or has another ETag than {etag}.")
                whole.update(data)
                file.write(data)
        self.keep(aside, whole.hexdigest(), oid, size)
        for part in parts:
            part.unlink()


async def write_stream(stream: AsyncIterator[bytes], aside: Path) -> tuple[str, str]:
    """Writes what comes to a file; the sha256 and the md5 of it. An upload that breaks off leaves no file."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with aside.open("wb") as file:
            async for chunk in stream:
                sha256.update(chunk)
                md5.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return sha256.hexdigest(), md5.hexdigest()
