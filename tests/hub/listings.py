"""What the Hub tells of a repository in JSON: its information, its files, its references and commits."""

from datetime import UTC, datetime
from typing import Any

from hub.accounts import Account
from hub.repository import Entry, Repository
from hub.store import Record
from hub.validation import front_matter


def dated(seconds: str) -> str:
    """A moment as the client's parser reads it."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def card_data(readme: bytes) -> dict[str, Any]:
    """The metadata of a README; nothing where it has none (what git itself brought in was not checked)."""
    try:
        return front_matter(readme.decode()) or {}
    except ValueError:
        return {}


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in (value if isinstance(value, list) else [value])]


def tags_of(kind: str, card: dict[str, Any], files: list[Entry]) -> list[str]:
    """The tags by which the Hub finds a repository: the card's own and those made of its other fields."""
    tags = _as_list(card.get("library_name")) if kind == "models" else []
    if any(entry.path.endswith(".safetensors") for entry in files):
        tags.append("safetensors")
    tags += _as_list(card.get("tags"))
    tags += [f"dataset:{name}" for name in _as_list(card.get("datasets"))]
    relation = card.get("base_model_relation")
    for base in _as_list(card.get("base_model")):
        tags += [f"base_model:{base}"] + ([f"base_model:{relation}:{base}"] if relation else [])
    tags += [f"license:{name}" for name in _as_list(card.get("license"))]
    for field in ("task_categories", "language", "size_categories"):
        prefix = "" if (field, kind) == ("language", "models") else f"{field}:"
        tags += [prefix + name for name in _as_list(card.get(field))]
    return list(dict.fromkeys([*tags, "region:us"]))


def sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        told |= {"size": entry.size, "blobId": entry.oid}
        if entry.pointer:
            told["lfs"] = _large(entry, "sha256")
    return told


def _large(entry: Entry, key: str) -> dict[str, Any]:
    pointer = entry.pointer
    return {key: pointer.oid, "size": pointer.size, "pointerSize": len(pointer.text)} if pointer else {}


def information(kind: str, repo_id: str, repository: Repository, record: Record, commit: str, blobs: bool) -> dict:
    """A repository at a commit."""
    objects = repository.objects([commit, f"{commit}:README.md"])
    card = card_data(objects[1][2] if objects[1] else b"")
    header = objects[0][2].decode(errors="replace") if objects[0] else ""
    moment = next(line.split()[-2] for line in header.splitlines() if line.startswith("committer "))
    files = [entry for entry in repository.entries(commit, pointers=blobs) if entry.kind == "blob"]
    told: dict[str, Any] = {
        "_id": repo_id.encode().hex()[:24],
        "id": repo_id,
        "author": repo_id.split("/")[0],
        "sha": commit,
        "lastModified": dated(moment),
        "createdAt": record.created,
        "private": record.private,
        "gated": record.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(kind, card, files),
        "cardData": card,
        "siblings": [sibling(entry, blobs) for entry in files],
    }
    if kind == "models":
        told["modelId"] = repo_id
        told |= {field: card[field] for field in ("pipeline_tag", "library_name", "model-index") if field in card}
    return told


def tree_items(repository: Repository, commit: str, entries: list[Entry], expand: bool) -> list[dict[str, Any]]:
    """Files and folders, as ``tree`` and ``paths-info`` tell of them; ``expand`` adds their last commits."""
    changed = last_commits(repository, commit) if expand else {}
    items = []
    for entry in entries:
        told: dict[str, Any] = {
            "type": "file" if entry.kind == "blob" else "directory",
            "oid": entry.oid,
            "size": entry.size,
            "path": entry.path,
        }
        if entry.pointer:
            told["lfs"] = _large(entry, "oid")
        items.append(told | ({"lastCommit": changed[entry.path]} if expand else {}))
    return items


def last_commits(repository: Repository, commit: str) -> dict[str, dict[str, str]]:
    """The last commit that changed each path."""
    flags = ("--first-parent", "-m", "--name-only", "--no-renames", "-t", "--format=%x01%H%x00%s%x00%ct%x00")
    log = repository.git("log", "-z", *flags, commit).decode()
    found: dict[str, dict[str, str]] = {}
    for block in log.split("\1")[1:]:
        oid, title, moment, *paths = block.split("\0")
        for path in paths:
            found.setdefault(path.lstrip("\n"), {"id": oid, "title": title, "date": dated(moment)})
    return found


def history(repository: Repository, commit: str) -> list[dict[str, Any]]:
    """The commits that lead to one, the last first."""
    text = repository.git("log", "--format=%H%x00%an%x00%s%x00%ct%x00%b%x01", commit).decode()
    rows = [row.lstrip("\n").split("\0") for row in text.split("\1")[:-1]]
    return [
        {"id": oid, "title": title, "message": body.strip(), "authors": [{"user": author}], "date": dated(moment)}
        for oid, author, title, moment, body in rows
    ]


def references(repository: Repository, pulls: bool) -> dict[str, list[dict[str, str]]]:
    """Branches, tags and, where asked for, pull requests."""
    told: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags"}
    if pulls:
        told["pullRequests"] = []
        kinds["refs/pr/"] = "pullRequests"
    for ref, oid in repository.refs().items():
        for prefix, kind in kinds.items():
            if ref.startswith(prefix):
                told[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    return told


def overview(account: Account) -> dict[str, Any]:
    return {"user": account.name, "fullname": account.name.title(), "isPro": False}
