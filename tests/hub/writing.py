"""The endpoints that write: repositories, their settings, commits, branches and tags."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from hub import commits, discussions
from hub.accounts import Account, require_account
from hub.call import Call
from hub.refusal import Refusal, bad_request, no_revision
from hub.repository import Repository
from hub.store import KINDS, check_name


def _named(call: Call, allowed: set[str]) -> tuple[dict[str, Any], str, str, Account]:
    """The repository that a body names: the fields, its kind, its id, and the caller, who may write there.

    Raises:
        Refusal: A name against the rule, an unknown field, or a namespace of someone else.
    """
    account = require_account(call.account)
    fields = call.json({"name"}, {"organization", "type", *allowed})
    kind = f"{fields.get('type') or 'model'}s"
    if kind not in KINDS:
        call.state.problems.append(f"repositories of type {fields['type']!r} are not built")
        raise Refusal(501, f"This test Hub has models and datasets, no {kind}.")
    namespace = fields.get("organization") or account.name
    repo_id = f"{check_name(namespace, 'namespace')}/{check_name(fields['name'])}"
    if len(repo_id) > 96:
        raise bad_request(f"Invalid id {repo_id!r}: over 96 characters")
    if account.role != "write" or not account.writes_to(namespace):
        what = f"{kind.removesuffix('s')} under the namespace {namespace!r}"
        raise Refusal(403, f"You don't have the rights to create or delete a {what}")
    return fields, kind, repo_id, account


def _page(call: Call, kind: str, repo_id: str) -> str:
    return f"{call.state.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"


def create(call: Call) -> Response:
    fields, kind, repo_id, account = _named(call, {"visibility", "private"})
    visibility = fields.get("visibility", "private" if fields.get("private") else "public")
    if visibility not in ("public", "private"):
        raise bad_request(f"visibility must be public or private, got {visibility!r}.")
    told = {"url": _page(call, kind, repo_id), "name": repo_id, "id": repo_id.encode().hex()[:24]}
    with call.state.lock:
        if call.state.store.find(kind, repo_id):
            told["error"] = f"You already created this {kind.removesuffix('s')} repo"
            return JSONResponse(told, status_code=409, headers={"X-Error-Message": told["error"]})
        call.state.store.create(kind, repo_id, visibility == "private", account.name)
    return JSONResponse(told)


def delete(call: Call) -> Response:
    _, kind, repo_id, _ = _named(call, set())
    with call.state.lock:
        if call.state.store.find(kind, repo_id) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        call.state.store.delete(kind, repo_id)
    return Response()


def move(call: Call) -> Response:
    """Renames a repository. Unlike the real Hub, the old name leads nowhere."""
    account = require_account(call.account)
    fields = call.json({"fromRepo", "toRepo", "type"}, set())
    kind, old, new = f"{fields['type']}s", str(fields["fromRepo"]), str(fields["toRepo"])
    for repo_id in (old, new):
        namespace, _, name = repo_id.partition("/")
        check_name(name)
        if account.role != "write" or not account.writes_to(namespace):
            raise Refusal(403, f"You don't have the rights to move a repository of {namespace!r}")
    with call.state.lock:
        if call.state.store.find(kind, old) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        call.state.store.move(kind, old, new)
    return JSONResponse({"url": _page(call, kind, new)})


def settings(call: Call) -> Response:
    repository, _, _ = call.writable()
    fields = call.json(set(), {"private", "visibility", "gated"})
    if fields.get("visibility") not in (None, "public", "private"):
        raise bad_request(f"visibility must be public or private, got {fields['visibility']!r}.")
    if fields.get("gated") not in (None, False, "auto", "manual"):
        raise bad_request(f"gated must be auto, manual or false, got {fields['gated']!r}.")
    with call.state.lock:
        record = call.state.store.record(repository)
        if "visibility" in fields or "private" in fields:
            record.private = fields.get("visibility") == "private" or fields.get("private") is True
        if "gated" in fields:
            record.gated = fields["gated"]
        call.state.store.write_record(repository, record)
    return JSONResponse({"private": record.private, "gated": record.gated})


def _ignored(repository: Repository, paths: list[str], rules: str) -> set[str]:
    """Which paths a ``.gitignore`` leaves out, by git itself."""
    if not rules.strip() or not paths:
        return set()
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, ".gitignore").write_text(rules)
        flags = (f"--work-tree={scratch}", "-c", "core.bare=false")
        try:
            out = repository.git(
                *flags, "check-ignore", "--no-index", "-z", "--stdin", stdin="\0".join(paths).encode()
            )
        except subprocess.CalledProcessError as none:
            out = none.stdout if none.returncode == 1 else b""
    return set(out.decode().split("\0"))


def preupload(call: Call) -> Response:
    """For each file: whether it goes through LFS, whether it is ignored, and what is there now."""
    repository, _, _ = call.writable(call.asks_for("create_pr"))
    commit = repository.commit_of(call.words["rev"])
    fields = call.json({"files"}, {"gitIgnore", "gitAttributes"})
    files = [commits.check_fields(file, {"path", "sample", "size"}, {"sha"}, "files") for file in fields["files"]]
    paths = [commits.check_path(file["path"]) for file in files]
    attributes, ignore, *known = repository.files(commit, [".gitattributes", ".gitignore", *paths])
    ignored = _ignored(repository, paths, fields.get("gitIgnore") or (ignore[1].decode() if ignore else ""))
    patterns = attributes[1].decode() if attributes else ""
    told = []
    for path, file, now in zip(paths, files, known, strict=True):
        large = commits.is_large(path, file["size"], file["sample"], patterns)
        item = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": path in ignored}
        if now is not None:
            item["oid"] = now[0].pointer.oid if now[0].pointer else now[0].oid
        told.append(item)
    return JSONResponse({"files": told, "commitOid": commit})


def commit(call: Call) -> Response:
    """A commit on a branch or on a pull request, or a pull request with the commit. It is seen all at once."""
    as_pull = call.asks_for("create_pr")
    repository, _, account = call.writable(as_pull)
    proposal, revision = commits.parse(call.body), call.words["rev"]
    told: dict[str, Any] = {"success": True, "hookOutput": ""}
    with call.state.lock:
        base = repository.commit_of(revision)
        reference = repository.reference(revision)
        if not as_pull and (reference is None or reference.startswith("refs/tags/")):
            raise bad_request(f"{revision} is no branch: a commit needs one to be on.")
        if as_pull:
            record = call.state.store.record(repository)
            text = proposal.description or "Opened with a commit."
            pull = discussions.opened(repository, record, proposal.summary, account.name, text, pull_request=True)
            pull["status"] = "open"
            oid = commits.make(repository, discussions.reference(pull), base, proposal, account.name)
            call.state.store.write_record(repository, record)
            told["pullRequestUrl"] = f"{_page(call, call.kind, call.repo_id)}/discussions/{pull['num']}"
        else:
            oid = commits.make(repository, str(reference), base, proposal, account.name)
    told |= {"commitUrl": f"{_page(call, call.kind, call.repo_id)}/commit/{oid}", "commitOid": oid}
    return JSONResponse(told)


def _check_reference(repository: Repository, prefix: str, name: str) -> str:
    try:
        repository.git("check-ref-format", prefix + name)
    except subprocess.CalledProcessError:
        raise bad_request(f"Invalid reference {name!r}") from None
    if name.startswith("refs/") or name == "HEAD":
        raise bad_request(f"Invalid reference for a branch or a tag: {name!r}")
    return prefix + name


def create_branch(call: Call) -> Response:
    repository, _, _ = call.writable()
    start = call.json(set(), {"startingPoint", "emptyBranch", "overwrite"}).get("startingPoint") or "main"
    reference = _check_reference(repository, "refs/heads/", call.words["name"])
    return _create_reference(call, repository, reference, start)


def create_tag(call: Call) -> Response:
    repository, _, _ = call.writable()
    reference = _check_reference(repository, "refs/tags/", str(call.json({"tag"}, {"message"})["tag"]))
    return _create_reference(call, repository, reference, call.words["rev"])


def _create_reference(call: Call, repository: Repository, reference: str, start: str) -> Response:
    with call.state.lock:
        if reference in repository.refs():
            raise Refusal(409, f"Reference already exists: {reference}")
        repository.point(reference, repository.commit_of(start), None)
    return Response(status_code=201)


def delete_branch(call: Call) -> Response:
    if call.words["name"] == "main":
        raise Refusal(403, "The main branch cannot be deleted.")
    return _delete_reference(call, f"refs/heads/{call.words['name']}")


def delete_tag(call: Call) -> Response:
    return _delete_reference(call, f"refs/tags/{call.words['rev']}")


def _delete_reference(call: Call, reference: str) -> Response:
    repository, _, _ = call.writable()
    with call.state.lock:
        if reference not in repository.refs():
            raise no_revision(reference)
        repository.point(reference, None, repository.refs()[reference])
    return Response(status_code=204)
