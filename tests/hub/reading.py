"""The endpoints that read: information, trees, references, history, and the files themselves."""

import re
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from hub import listings
from hub.accounts import require_account, require_writing
from hub.call import Call
from hub.refusal import Refusal, bad_request, no_entry
from hub.validation import card_problems


def whoami(call: Call) -> Response:
    return JSONResponse(require_account(call.account).whoami())


def overview(call: Call) -> Response:
    name = call.words["name"]
    for account in call.state.tokens.values():
        if account.name == name:
            return JSONResponse(listings.overview(account))
    raise Refusal(404, f"User {name} does not exist")


def validate_yaml(call: Call) -> Response:
    fields = call.json({"content", "repoType"}, set())
    findings = card_problems(str(fields["content"]))
    told = {
        "errors": [{"message": message} for message in findings.errors],
        "warnings": [{"message": message} for message in findings.warnings],
    }
    return JSONResponse(told, status_code=400 if findings.errors else 200)


def information(call: Call) -> Response:
    """A repository at a revision; ``expand`` chooses fields."""
    repository, record = call.repository()
    commit = repository.commit_of(call.words.get("rev") or "main")
    told = listings.information(call.kind, call.repo_id, repository, record, commit, call.asks_for("blobs"))
    if wanted := call.query.get("expand") or call.query.get("expand[]"):
        told = {key: value for key, value in told.items() if key in (*wanted, "_id", "id")}
    return JSONResponse(told)


def auth_check(call: Call) -> Response:
    _, record = call.content()
    if call.words["write"]:
        require_writing(call.account, call.namespace)
    return JSONResponse({"private": record.private})


def references(call: Call) -> Response:
    repository, _ = call.repository()
    return JSONResponse(listings.references(repository, call.asks_for("include_prs")))


def commits(call: Call) -> Response:
    repository, _ = call.repository()
    return _page(call, listings.history(repository, repository.commit_of(call.words["rev"])))


def tree(call: Call) -> Response:
    """The files and folders of a folder, a page at a time."""
    repository, _ = call.repository()
    commit = repository.commit_of(call.words["rev"])
    entries = repository.entries(commit, call.words.get("path") or "", call.asks_for("recursive"))
    return _page(call, listings.tree_items(repository, commit, entries, call.asks_for("expand")))


def paths_info(call: Call) -> Response:
    """What is at these paths; a path with nothing there is left out."""
    repository, _ = call.repository()
    commit = repository.commit_of(call.words["rev"])
    fields = parse_qs(call.body.decode())
    if unknown := fields.keys() - {"paths", "expand"}:
        raise bad_request(f"Unknown fields {sorted(unknown)}.")
    expand = fields.get("expand", ["false"])[0].lower() == "true"
    known = {entry.path: entry for entry in repository.entries(commit)}
    found = [known[path] for path in fields.get("paths", []) if path in known]
    return JSONResponse(listings.tree_items(repository, commit, found, expand))


def _page(call: Call, items: list[Any]) -> Response:
    start = int(call.query.get("cursor", ["0"])[0])
    end = start + call.state.page_size
    headers = {}
    if end < len(items):
        url = call.request.url.include_query_params(cursor=end)
        path = call.request.scope["raw_path"].decode()
        headers["Link"] = f'<{call.state.endpoint}{path}?{url.query}>; rel="next"'
    return JSONResponse(items[start:end], headers=headers)


def resolve(call: Call) -> Response:
    """A file: a small one is sent, of a large one the answer says where it is stored."""
    repository, _ = call.content()
    commit, path = repository.commit_of(call.words["rev"]), call.words["path"]
    (found,) = repository.files(commit, [path])
    if found is None:
        raise no_entry(path, commit)
    entry, data = found
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{entry.oid}"'}
    if entry.pointer is None:
        return ranged(data, call.request.headers.get("range"), headers)
    oid, state = entry.pointer.oid, call.state
    signature = state.signature("get", call.kind, call.repo_id, oid)
    headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{oid}"'}
    url = f"{state.storage}/storage/{call.kind}/{quote(call.repo_id)}/{oid}?signature={signature}"
    return RedirectResponse(url, 302, headers=headers)


def ranged(data: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    """Bytes, or the part of them that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    headers = {**headers, "Content-Type": "application/octet-stream"}
    if found is None or not any(found.groups()):
        return Response(data, headers=headers)
    first = int(found[1]) if found[1] else max(len(data) - int(found[2]), 0)
    last = min(int(found[2]), len(data) - 1) if found[1] and found[2] else len(data) - 1
    if first > last:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Response(data[first : last + 1], status_code=206, headers=headers)


def storage(call: Call) -> Response:
    """A stored file, to whoever has its signed address. A token that comes along was sent to the wrong host."""
    state, oid = call.state, call.words["oid"]
    if "authorization" in call.request.headers:
        state.problems.append("a token was sent to the storage's host")
        raise bad_request("Only one auth mechanism allowed")
    if call.query.get("signature") != [state.signature("get", call.kind, call.repo_id, oid)]:
        raise Refusal(403, "The signature does not match.")
    repository = state.store.find(call.kind, call.repo_id)
    if repository is None or repository.large.size(oid) is None:
        raise Refusal(404, "There is no such object.")
    return FileResponse(repository.large.path(oid), headers={"ETag": f'"{oid}"'})
