"""Discussions and pull requests: a pull request is the reference ``refs/pr/N`` and what was said about it."""

import subprocess
import uuid
from typing import Any

from hub.refusal import Refusal, bad_request
from hub.repository import Repository
from hub.store import MAIN, Record, now


def event(kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "type": kind,
        "createdAt": now(),
        "author": {"name": author},
        "data": data,
    }


def comment(author: str, text: str) -> dict[str, Any]:
    return event("comment", author, {"edited": False, "hidden": False, "latest": {"raw": text}})


def opened(
    repository: Repository, record: Record, title: str, author: str, text: str, pull_request: bool
) -> dict[str, Any]:
    """A new discussion; ``draft`` where it is a pull request, open otherwise."""
    taken = [found["num"] for found in record.discussions]
    taken += [int(ref.rpartition("/")[2]) for ref in repository.refs() if ref.startswith("refs/pr/")]
    discussion = {
        "num": max(taken, default=0) + 1,
        "title": title,
        "author": {"name": author},
        "createdAt": now(),
        "status": "draft" if pull_request else "open",
        "isPullRequest": pull_request,
        "base": MAIN,
        "mergeCommitId": None,
        "events": [comment(author, text)],
    }
    record.discussions.append(discussion)
    return discussion


def reference(discussion: dict[str, Any]) -> str:
    return f"refs/pr/{discussion['num']}"


def find(record: Record, number: str) -> dict[str, Any]:
    for discussion in record.discussions:
        if str(discussion["num"]) == number:
            return discussion
    raise Refusal(404, f"No discussion number {number}", "DiscussionNotFound")


def told(kind: str, repo_id: str, discussion: dict[str, Any]) -> dict[str, Any]:
    """A discussion as the client reads it."""
    public = {key: value for key, value in discussion.items() if key not in ("base", "mergeCommitId")}
    public["repo"] = {"name": repo_id, "type": kind.removesuffix("s")}
    if discussion["isPullRequest"]:
        public["changes"] = {"base": discussion["base"], "mergeCommitId": discussion["mergeCommitId"]}
        public["filesWithConflicts"] = []
    return public


def merged(repository: Repository, discussion: dict[str, Any], author: str) -> str:
    """A commit on main with the pull request's changes.

    Raises:
        Refusal: It is no open pull request, or it conflicts with main.
    """
    if not discussion["isPullRequest"] or discussion["status"] not in ("draft", "open"):
        raise bad_request(f"Number {discussion['num']} is no pull request that is open.")
    base, head = repository.commit_of("main"), repository.commit_of(reference(discussion))
    try:
        tree = repository.git("merge-tree", "--write-tree", base, head).decode().split()[0]
    except subprocess.CalledProcessError:
        raise Refusal(409, "The pull request conflicts with main.") from None
    message = f"{discussion['title']} (#{discussion['num']})\n"
    commit = repository.merge_commit(tree, [base, head], message, author)
    repository.point(MAIN, commit, base)
    discussion |= {"status": "merged", "mergeCommitId": commit}
    discussion["events"].append(event("status-change", author, {"status": "merged"}))
    return commit
