"""Commits as the client sends them, one JSON object a line, checked and made in a repository."""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hub.lfs import Pointer
from hub.refusal import Refusal, bad_request
from hub.repository import Change, Repository, moved
from hub.validation import card_problems

LARGEST_REGULAR = 10 * 2**20
FIELDS = {
    "header": ({"summary"}, {"description", "parentCommit"}),
    "file": ({"path", "content"}, {"encoding"}),
    "lfsFile": ({"path", "algo", "oid"}, {"size"}),
    "deletedFile": ({"path"}, set()),
    "deletedFolder": ({"path"}, set()),
}


@dataclass
class Proposal:
    """A commit that was asked for."""

    summary: str
    description: str
    parent: str | None
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def message(self) -> str:
        return f"{self.summary}\n\n{self.description}".strip() + "\n"


def check_fields(found: object, needed: set[str], allowed: set[str], where: str) -> dict[str, Any]:
    """A JSON object with these fields.

    Raises:
        Refusal: Something else came, a field is missing, or one is not known.
    """
    if not isinstance(found, dict):
        raise bad_request(f"{where}: expected an object, got {type(found).__name__}.")
    if missing := needed - found.keys():
        raise bad_request(f"{where}: {sorted(missing)} missing.")
    if unknown := found.keys() - needed - allowed:
        raise bad_request(f"{where}: unknown fields {sorted(unknown)}.")
    return found


def check_path(path: object) -> str:
    parts = path.split("/") if isinstance(path, str) else [""]
    plain = isinstance(path, str) and not re.search(r"[\x00-\x1f\x7f\\]", path)
    if not plain or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise bad_request(f"Invalid path in the repository: {path!r}")
    return str(path)


def parse(body: bytes) -> Proposal:
    """The commit in a request's body.

    Raises:
        Refusal: A line isn't what the Hub takes.
    """
    operations: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(body.splitlines(), 1):
        try:
            item = json.loads(line)
        except ValueError:
            raise bad_request(f"Line {number} is no JSON.") from None
        item = check_fields(item, {"key", "value"}, set(), f"Line {number}")
        if item["key"] not in FIELDS:
            raise bad_request(f"Line {number}: unknown key {item['key']!r}.")
        operations.append((item["key"], check_fields(item["value"], *FIELDS[item["key"]], where=f"Line {number}")))
    if not operations or [key for key, _ in operations].index("header") != 0:
        raise bad_request("The first line must be the header.")
    header = operations[0][1]
    if any(key == "header" for key, _ in operations[1:]):
        raise bad_request("There must be one header.")
    if not isinstance(header["summary"], str) or not header["summary"].strip():
        raise bad_request("The header's summary must be a text.")
    parent = header.get("parentCommit")
    if parent is not None and not re.fullmatch(r"[0-9a-f]{7,40}", str(parent)):
        raise bad_request(f"parentCommit must be a commit's hash, got {parent!r}.")
    return Proposal(header["summary"], str(header.get("description") or ""), parent, operations[1:])


def _file(value: dict[str, Any]) -> bytes:
    encoding, content = value.get("encoding", "utf-8"), value["content"]
    if encoding not in ("utf-8", "base64") or not isinstance(content, str):
        raise bad_request(f"{value['path']}: content must be a text in utf-8 or base64, got {encoding!r}.")
    try:
        data = base64.b64decode(content, validate=True) if encoding == "base64" else content.encode()
    except binascii.Error:
        raise bad_request(f"{value['path']}: content is not base64.") from None
    if len(data) > LARGEST_REGULAR:
        raise bad_request(f"{value['path']} has {len(data)} bytes: files over {LARGEST_REGULAR} must go through LFS.")
    return data


def _pointer(repository: Repository, value: dict[str, Any]) -> Pointer:
    if value["algo"] != "sha256":
        raise bad_request(f"{value['path']}: algo must be sha256, got {value['algo']!r}.")
    size = repository.large.size(str(value["oid"]))
    if size is None:
        raise bad_request(f"{value['path']} points to LFS object {value['oid']}, which was not uploaded.")
    if value.get("size", size) != size:
        raise bad_request(f"{value['path']} announces {value['size']} bytes, its LFS object has {size}.")
    return Pointer(value["oid"], size)


def is_large_by_name(path: str, attributes: str) -> bool:
    """Whether a ``.gitattributes`` sends this path to LFS."""
    patterns = (line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line)
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def _deleted(repository: Repository, commit: str, key: str, path: str) -> list[Change]:
    files = [entry.path for entry in repository.entries(commit, pointers=False) if entry.kind == "blob"]
    prefix = path.rstrip("/") + "/"
    gone = [file for file in files if (file == path if key == "deletedFile" else file.startswith(prefix))]
    if not gone:
        kind = "file" if key == "deletedFile" else "folder"
        raise Refusal(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
    return [Change(file, None) for file in gone]


def changes_of(repository: Repository, commit: str, proposal: Proposal) -> list[Change]:
    """What a commit changes: bytes and pointers by path, and the line by which git knows a file as large.

    Raises:
        Refusal: Anything in it that the Hub doesn't take.
    """
    changes: list[Change] = []
    large = []
    for key, value in proposal.operations:
        if key in ("deletedFile", "deletedFolder"):
            changes += _deleted(repository, commit, key, check_path(str(value["path"]).rstrip("/")))
        elif key == "file":
            changes.append(Change(check_path(value["path"]), _file(value)))
        else:
            changes.append(Change(check_path(value["path"]), _pointer(repository, value).text))
            large.append(value["path"])
    written = {change.path: change.data for change in changes}
    if errors := card_problems(written.get("README.md")).errors:
        raise bad_request("Invalid metadata in README.md: " + "; ".join(errors))
    if not large:
        return changes
    attributes = written.get(".gitattributes") or repository.read(commit, ".gitattributes") or b""
    lines = [
        f"{path.replace(' ', '[[:space:]]')} filter=lfs diff=lfs merge=lfs -text\n"
        for path in dict.fromkeys(large)
        if not is_large_by_name(path, attributes.decode())
    ]
    return [*changes, Change(".gitattributes", attributes + "".join(lines).encode())] if lines else changes


def make(repository: Repository, reference: str, base: str, proposal: Proposal, author: str) -> str:
    """The commit on top of ``base``, to which the reference then leads.

    Raises:
        Refusal: The proposal was made on another commit, or holds what the Hub doesn't take.
    """
    if proposal.parent is not None and not base.startswith(proposal.parent):
        raise moved()
    return repository.commit(reference, base, changes_of(repository, base, proposal), proposal.message, author)


def is_large(path: str, size: int, sample: str, attributes: str) -> bool:
    """Whether the Hub wants a file through LFS: by its name, over 10 MB, or as it is no text."""
    if size == 0:
        return False
    return is_large_by_name(path, attributes) or size > LARGEST_REGULAR or b"\0" in base64.b64decode(sample)
