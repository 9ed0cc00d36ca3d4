"""The endpoints of discussions and pull requests."""

from starlette.responses import JSONResponse, Response

from hub import discussions
from hub.accounts import require_account, require_writing
from hub.call import Call
from hub.refusal import bad_request

PAGE = 10
STATES = ("open", "closed")


def listed(call: Call) -> Response:
    """The discussions, the last first, ten a page; by type, status and author where asked for."""
    _, record = call.repository()
    chosen = []
    query = {key: values[0] for key, values in call.query.items()}
    for found in reversed(record.discussions):
        kind = "pull_request" if found["isPullRequest"] else "discussion"
        state = "open" if found["status"] in ("open", "draft") else "closed"
        fits = query.get("type", "all") in ("all", kind) and query.get("status", "all") in ("all", state)
        if fits and query.get("author") in (None, found["author"]["name"]):
            chosen.append(discussions.told(call.kind, call.repo_id, found))
    start = int(query.get("p", "0")) * PAGE
    return JSONResponse({"count": len(chosen), "start": start, "discussions": chosen[start : start + PAGE]})


def details(call: Call) -> Response:
    repository, record = call.repository()
    found = discussions.find(record, call.words["number"])
    told = discussions.told(call.kind, call.repo_id, found)
    if found["isPullRequest"] and call.asks_for("diff"):
        head = discussions.reference(found)
        told["diff"] = repository.git("diff", f"{found['base']}...{head}").decode(errors="replace")
    return JSONResponse(told)


def create(call: Call) -> Response:
    repository, _, account = call.writable(pull_request=True)
    fields = call.json({"title", "description", "pullRequest"}, set())
    if not 3 <= len(str(fields["title"])) <= 200:
        raise bad_request("A title has 3 to 200 characters.")
    with call.state.lock:
        record = call.state.store.record(repository)
        words = (str(fields["title"]), account.name, str(fields["description"]))
        new = discussions.opened(repository, record, *words, pull_request=bool(fields["pullRequest"]))
        if new["isPullRequest"]:
            repository.point(discussions.reference(new), repository.commit_of("main"), None)
        call.state.store.write_record(repository, record)
    return JSONResponse({"num": new["num"], "pullRequest": new["isPullRequest"]})


def change(call: Call) -> Response:
    """A comment, another title, another status, or a merge."""
    repository, _ = call.repository()
    author = require_account(call.account).name
    what = call.words["what"]
    if what != "comment":
        require_writing(call.account, call.namespace)
    with call.state.lock:
        record = call.state.store.record(repository)
        found = discussions.find(record, call.words["number"])
        told = {}
        if what == "merge":
            discussions.merged(repository, found, author)
        else:
            field, name = {"comment": ("comment", "newMessage"), "title": ("title", "newTitle")}.get(
                what, ("status", "newStatus")
            )
            text = str(call.json({field}, {"comment"} if what == "status" else set())[field])
            told[name] = _said(found, what, author, text)
        call.state.store.write_record(repository, record)
    return JSONResponse(told)


def _said(found: dict, what: str, author: str, text: str) -> dict:
    """The event that a change makes."""
    if what == "comment":
        event = discussions.comment(author, text)
    elif what == "title":
        event = discussions.event("title-change", author, {"from": found["title"], "to": text})
        found["title"] = text
    else:
        if text not in STATES:
            raise bad_request(f"status must be open or closed, got {text!r}.")
        event = discussions.event("status-change", author, {"status": text})
        found["status"] = text
    found["events"].append(event)
    return event
