"""One request, as the answering functions see it: who calls, what for, on which repository."""

import hashlib
import hmac
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request

from hub.accounts import Account, require_content, require_reading, require_writing
from hub.commits import check_fields
from hub.refusal import bad_request, no_repository
from hub.repository import Repository
from hub.store import Record, Store


@dataclass
class State:
    """What all requests share: the repositories, the tokens, the sizes that tests set, and the one lock of writers."""

    store: Store
    tokens: Mapping[str, Account]
    endpoint: str
    storage: str  # the same server under another name: what is stored is sent from there, and takes no token
    chunk_size: int = 32 * 2**20  # files over this are uploaded in parts of it
    page_size: int = 1000
    problems: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    secret: bytes = b"signs the addresses of stored files"

    def signature(self, *words: object) -> str:
        text = "\n".join(str(word) for word in words)
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


@dataclass
class Call:
    """A request with its caller, the words of its path and its body."""

    state: State
    request: Request
    words: Mapping[str, str]
    account: Account | None
    body: bytes = b""

    @property
    def kind(self) -> str:
        return (self.words.get("kind") or "models").rstrip("/")

    @property
    def repo_id(self) -> str:
        return self.words["repo"]

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def prefix(self) -> str:
        """The path of the repository's page."""
        return ("datasets/" if self.kind == "datasets" else "") + self.repo_id

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.request.url.query)

    def asks_for(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def json(self, needed: set[str], allowed: set[str]) -> dict[str, Any]:
        """The body's fields, these and no others."""
        try:
            found = json.loads(self.body)
        except ValueError:
            raise bad_request("The body is no JSON.") from None
        return check_fields(found, needed, allowed, "The body")

    def repository(self) -> tuple[Repository, Record]:
        """The repository that the path names, which the caller may see.

        Raises:
            Refusal: There is none, or none for this caller.
        """
        repository = self.state.store.find(self.kind, self.repo_id)
        if repository is None:
            raise no_repository(anonymous=self.account is None)
        record = self.state.store.record(repository)
        require_reading(self.account, self.namespace, record.private)
        return repository, record

    def content(self) -> tuple[Repository, Record]:
        """As ``repository``, where the caller may also read what is in the files."""
        repository, record = self.repository()
        require_content(self.account, self.namespace, record.gated)
        return repository, record

    def writable(self, pull_request: bool = False) -> tuple[Repository, Record, Account]:
        """As ``repository``, where the caller may write."""
        repository, record = self.repository()
        return repository, record, require_writing(self.account, self.namespace, pull_request)
