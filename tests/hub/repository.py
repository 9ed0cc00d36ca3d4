"""One bare git repository, driven by the ``git`` command: what it holds, and commits made without a work tree.

Each question is one process of git where that is possible: a test asks hundreds, and a process is what costs.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hub.lfs import LARGEST_POINTER, LargeFiles, Pointer
from hub.refusal import Refusal, no_entry, no_revision

GIT = shutil.which("git") or "git"
NOBODY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
CONFIG = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tcompression = 1\n[fastimport]\n\tunpackLimit = 1\n"


@dataclass(frozen=True)
class Entry:
    """A file or a folder of a commit; of a large file the size is its own, not the pointer's."""

    path: str
    kind: str  # "blob" or "tree"
    oid: str
    size: int
    pointer: Pointer | None = None


@dataclass(frozen=True)
class Change:
    """A file's new bytes (for a large file: its pointer), or none where it goes away."""

    path: str
    data: bytes | None


def run_git(folder: Path, *args: str, stdin: bytes = b"") -> bytes:
    """Runs git in a bare repository; what it printed.

    Raises:
        subprocess.CalledProcessError: git failed; its ``stderr`` says why.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = [GIT, f"--git-dir={folder}", *args]
    # close_fds off: Python's own descriptors are not inherited anyway, and the start is three times as quick
    done = subprocess.run(command, input=stdin, capture_output=True, check=True, env=clean | NOBODY, close_fds=False)
    return done.stdout


@dataclass(frozen=True)
class Repository:
    """A bare repository of the Hub in ``folder``."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path) -> "Repository":
        """An empty repository, as ``git init --bare`` makes it."""
        for name in ("objects/info", "objects/pack", "refs/heads", "refs/tags"):
            (folder / name).mkdir(parents=True)
        (folder / "HEAD").write_text("ref: refs/heads/main\n")
        (folder / "config").write_text(CONFIG)
        return cls(folder)

    def git(self, *args: str, stdin: bytes = b"") -> bytes:
        return run_git(self.folder, *args, stdin=stdin)

    @property
    def large(self) -> LargeFiles:
        return LargeFiles(self.folder)

    def refs(self) -> dict[str, str]:
        """The commit of each reference by its full name. They are loose files: nothing here packs them."""
        files = (file for file in sorted((self.folder / "refs").rglob("*")) if file.is_file())
        return {
            file.relative_to(self.folder).as_posix(): file.read_text().strip()
            for file in files
            if file.suffix != ".lock"
        }

    def reference(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        refs = self.refs()
        return next((name for name in names if name in refs), None)

    def commit_of(self, revision: str) -> str:
        """The commit that a branch, a tag, a pull request or a hash stands for.

        Raises:
            Refusal: There is none.
        """
        refs = self.refs()
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if revision in refs.values():
            return revision
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            try:
                return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
            except subprocess.CalledProcessError:
                pass
        raise no_revision(revision)

    def objects(self, names: Sequence[str]) -> list[tuple[str, str, bytes] | None]:
        """Hash, kind and bytes of objects, named by a hash or as ``commit:path``; none where there is none."""
        asked = "".join(name.replace("\n", "?") + "\n" for name in names)  # a name is a line: no file's name has two
        out, found = self.git("cat-file", "--batch", stdin=asked.encode()) if names else b"", []
        for _ in names:
            header, _, out = out.partition(b"\n")
            if header.endswith((b" missing", b" ambiguous")):
                found.append(None)
                continue
            oid, kind, size = header.decode().split()
            found.append((oid, kind, out[: int(size)]))
            out = out[int(size) + 1 :]
        return found

    def files(self, commit: str, paths: Sequence[str]) -> list[tuple[Entry, bytes] | None]:
        """Files with their bytes as git has them; none where there is no such file."""
        objects = self.objects([f"{commit}:{path}" for path in paths])
        return [
            (_pointing(Entry(path, "blob", found[0], len(found[2])), found[2]), found[2])
            if found and found[1] == "blob"
            else None
            for path, found in zip(paths, objects, strict=True)
        ]

    def read(self, commit: str, path: str) -> bytes | None:
        (found,) = self.files(commit, [path])
        return found[1] if found else None

    def entries(self, commit: str, path: str = "", recursive: bool = True, pointers: bool = True) -> list[Entry]:
        """Files and folders at or below a folder; without ``pointers`` large files look small.

        Raises:
            Refusal: There is no such folder.
        """
        flags = ["-r", "-t"] if recursive else []
        try:
            listing = self.git("ls-tree", "-z", "-l", *flags, f"{commit}:{path}")
        except subprocess.CalledProcessError:
            raise no_entry(path, commit) from None
        prefix = f"{path}/" if path else ""
        found = []
        for line in listing.decode().split("\0")[:-1]:
            words, name = line.split("\t", 1)
            _, kind, oid, size = words.split()
            found.append(Entry(prefix + name, kind, oid, 0 if size == "-" else int(size)))
        return self._with_pointers(found) if pointers else found

    def _with_pointers(self, entries: list[Entry]) -> list[Entry]:
        small = [entry.oid for entry in entries if entry.kind == "blob" and entry.size <= LARGEST_POINTER]
        data = {found[0]: found[2] for found in self.objects(small) if found}
        return [_pointing(entry, data.get(entry.oid, b"")) for entry in entries]

    def commit(self, reference: str, base: str | None, changes: Iterable[Change], message: str, author: str) -> str:
        """A commit with changes on top of ``base``, to which ``reference`` then leads: in one step, or not at all.

        Raises:
            Refusal: The reference has moved away from ``base``.
        """
        who = f"{author} <{author}@users.noreply.example.com> {int(time.time())} +0000"
        stream = [f"commit {reference}\nmark :1\ncommitter {who}\n".encode(), _data(message.encode())]
        stream += [f"from {base}\n".encode()] if base else []
        for change in changes:
            path = '"' + change.path.replace("\\", "\\\\").replace('"', '\\"') + '"'
            if change.data is None:
                stream.append(f"D {path}\n".encode())
            else:
                stream += [f"M 100644 inline {path}\n".encode(), _data(change.data)]
        try:
            out = self.git("fast-import", "--quiet", "--done", stdin=b"".join([*stream, b"\nget-mark :1\ndone\n"]))
        except subprocess.CalledProcessError as fault:
            if b"not updating" not in fault.stderr.lower():
                raise
            raise moved() from None
        return out.decode().split()[-1]

    def merge_commit(self, tree: str, parents: Sequence[str], message: str, author: str) -> str:
        """A commit of a tree; no reference leads to it as yet."""
        flags = [word for parent in parents for word in ("-p", parent)]
        who = ("-c", f"user.name={author}", "-c", f"user.email={author}@users.noreply.example.com")
        return self.git(*who, "commit-tree", tree, *flags, stdin=message.encode()).decode().strip()

    def point(self, reference: str, new: str | None, old: str | None) -> None:
        """Moves a reference from ``old`` to ``new`` (none: no such reference), in one step or not at all.

        Raises:
            Refusal: It was not at ``old``.
        """
        nowhere = "0" * 40
        words = ("-d", reference, old or nowhere) if new is None else (reference, new, old or nowhere)
        try:
            self.git("update-ref", *words)
        except subprocess.CalledProcessError:
            raise moved() from None


def moved() -> Refusal:
    return Refusal(412, "A commit has happened since. Please refresh and try again.")


def _data(data: bytes) -> bytes:
    return b"data %d\n" % len(data) + data + b"\n"


def _pointing(entry: Entry, data: bytes) -> Entry:
    """The entry of a large file where its bytes are a pointer."""
    pointer = Pointer.read(data) if len(data) <= LARGEST_POINTER else None
    return replace(entry, size=pointer.size, pointer=pointer) if pointer else entry
