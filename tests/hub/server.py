"""A small, strict Hub to push to: models and datasets in bare git repositories, large files on disk by sha256.

It answers what huggingface_hub, transformers and datasets ask, and refuses what it doesn't know (501, and the test
fails). It is written from the client's side: that a push works here proves compatibility with the client, not the
behaviour of the real Hub.

    with running_hub(folder) as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("tester/tiny")

As a process: ``python -m hub.server --port 0 --folder F`` prints its endpoint and runs until it is stopped.
"""

import argparse
import inspect
import re
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub import routes
from hub.accounts import DEFAULT_TOKENS, READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, Account, caller
from hub.call import Call, State
from hub.failures import Failure, Gate
from hub.refusal import Refusal
from hub.store import Store


class Hub:
    """A Hub in ``folder``: what tests read (``endpoint``, ``token``, ``requests``, ``problems``), set and plan."""

    token, read_token, stranger_token = WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN

    def __init__(self, folder: Path, port: int, tokens: Mapping[str, Account] | None = None) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.state = State(Store(Path(folder)), tokens or DEFAULT_TOKENS, self.endpoint, f"http://localhost:{port}")
        self.requests: list[tuple[str, str, int]] = []
        methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
        inner = Starlette(routes=[Route("/{rest:path}", self.answer, methods=methods)])
        self.app = Gate(inner, lambda *request: self.requests.append(request))

    @property
    def problems(self) -> list[str]:
        """What must not have been asked: unknown routes, tokens sent to the storage, faults of this server."""
        return self.state.problems

    @property
    def failures(self) -> list[Failure]:
        return self.app.failures

    def fail(
        self,
        method: str | None = None,
        path: str = "",
        *,
        status: int | None = None,
        drop: bool = False,
        after_bytes: int | None = None,
        lost: bool = False,
        times: int = 1,
        skip: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Failure:
        """Plans a failure at requests of this method (any: None) whose path?query the regular expression finds.

        One of: ``status``, an answer in place of the true one; ``drop``, the connection is cut before anything is
        done; ``after_bytes=n``, cut when n bytes of an upload came or of a download went out; ``lost``, all is done
        and the answer never comes. The first ``skip`` requests pass, ``times`` fail. The plan's ``hits`` counts.
        """
        if sum((status is not None, drop, after_bytes is not None, lost)) != 1:
            raise ValueError("expected one of status, drop, after_bytes and lost")
        failure = Failure(method, re.compile(path), status, after_bytes, lost, times, skip, dict(headers or {}))
        self.failures.append(failure)
        return failure

    def git(self, repo_id: str, *args: str, kind: str = "models") -> str:
        """Runs git in a repository's folder on the server: what it printed."""
        repository = self.state.store.find(kind, repo_id)
        if repository is None:
            raise ValueError(f"the Hub has no {kind} {repo_id}; it has {list(self.state.store.names(kind))}")
        return repository.git(*args).decode()

    async def answer(self, request: Request) -> Response:
        """Answers a request, or refuses it. A fault of the server is noted: no test passes over it."""
        method, path = request.method, request.scope["raw_path"].decode()
        try:
            return await self._answer(request, method, path)
        except Refusal as refusal:
            return refusal.answer()
        except Exception:
            self.problems.append(f"{method} {path}: {traceback.format_exc()}")
            return JSONResponse({"error": "a fault of the test Hub"}, status_code=500)

    async def _answer(self, request: Request, method: str, path: str) -> Response:
        found = routes.find(method, path)
        if found is None:
            self.problems.append(f"unknown route: {method} {path}")
            raise Refusal(501, f"This test Hub does not know {method} {path}")
        function, words = found
        stored = path.startswith(("/upload/", "/storage/"))  # signed addresses: they know no accounts
        account = None if stored else caller(request.headers.get("authorization"), self.state.tokens)
        call = Call(self.state, request, words, account)
        if inspect.iscoroutinefunction(function):
            return await function(call)
        call.body = await request.body()
        return await run_in_threadpool(function, call)


@contextmanager
def running_hub(folder: Path | str, tokens: Mapping[str, Account] | None = None, port: int = 0) -> Iterator[Hub]:
    """A Hub that runs in a thread of this process; what is in ``folder`` stays there.

    Raises:
        AssertionError: At the end: something was asked that must not have been (``hub.problems``).
    """
    with socket.socket() as listener, warnings.catch_warnings():
        # the client's own call of what its HTTP library deprecates
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        hub = Hub(Path(folder), listener.getsockname()[1], tokens)
        server = _uvicorn(hub)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            _wait_for(server, thread)
            yield hub
        finally:
            server.should_exit = True
            thread.join()
    if hub.problems:
        raise AssertionError("the Hub was asked what it must not be:\n" + "\n".join(hub.problems))


def _uvicorn(hub: Hub) -> uvicorn.Server:
    settings: dict[str, Any] = {"lifespan": "off", "ws": "none", "proxy_headers": False, "log_level": "critical"}
    return uvicorn.Server(uvicorn.Config(hub.app, timeout_graceful_shutdown=2, access_log=False, **settings))


def _wait_for(server: uvicorn.Server, thread: threading.Thread) -> None:
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the test Hub did not start")
        thread.join(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hub on this machine, to push to.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--folder", type=Path, required=True, help="where its repositories are kept")
    given = parser.parse_args()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", given.port))
        listener.listen()
        hub = Hub(given.folder, listener.getsockname()[1])
        sys.stdout.write(f"{hub.endpoint}\n")
        sys.stdout.flush()
        sys.stderr.write(f"tokens of the user tester: {hub.token} writes, {hub.read_token} reads\n")
        _uvicorn(hub).run([listener])


if __name__ == "__main__":
    main()
