"""How the Hub says no: a status, a sentence, and the headers by which the client tells one error from another."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of the server
    """An answer of 4xx: ``code`` goes to ``X-Error-Code``, the sentence to ``X-Error-Message`` and the body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})
        self.body: dict[str, object] = {"error": message}

    def answer(self) -> JSONResponse:
        line = " ".join(self.message.split()).encode("ascii", "replace").decode()
        headers = {**self.headers, "X-Error-Message": line}
        if self.code:
            headers["X-Error-Code"] = self.code
        return JSONResponse(self.body, status_code=self.status, headers=headers)


def bad_request(message: str) -> Refusal:
    return Refusal(400, message)


def no_repository(anonymous: bool) -> Refusal:
    """A repository that is missing and one that is hidden look alike; who is nobody is told to log in first."""
    if anonymous:
        return Refusal(401, "Invalid username or password.", "RepoNotFound")
    return Refusal(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str) -> Refusal:
    # the client remembers by this header at which commit the file was missing
    return Refusal(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit})
