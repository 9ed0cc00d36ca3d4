"""Planned failures: a status, a dropped connection, a broken upload or download, a lost answer, at chosen requests."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Failure:
    """What goes wrong, at the requests that fit, after ``skip`` of them and ``times`` times; ``hits`` counts."""

    method: str | None
    path: re.Pattern[str]
    status: int | None = None
    after_bytes: int | None = None
    lost: bool = False
    times: int = 1
    skip: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = 0

    def fits(self, method: str, target: str) -> bool:
        return self.method in (None, method) and self.path.search(target) is not None

    def answer(self) -> JSONResponse:
        headers = {"X-Error-Message": f"planned failure {self.status}", **self.headers}
        return JSONResponse({"error": f"planned failure {self.status}"}, self.status or 500, headers)


class Gate:
    """All requests pass here: those that are to fail do, and each is noted with its status (0: no answer came)."""

    def __init__(self, app: ASGIApp, note: Callable[[str, str, int], None]) -> None:
        self.app, self.note = app, note
        self.failures: list[Failure] = []
        self._lock = threading.Lock()

    def next_failure(self, method: str, target: str) -> Failure | None:
        with self._lock:
            for failure in self.failures:
                if failure.fits(method, target) and failure.times > 0:
                    if failure.skip > 0:
                        failure.skip -= 1
                        continue
                    failure.times -= 1
                    failure.hits += 1
                    return failure
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, query = scope["raw_path"].decode(), scope["query_string"].decode()
        method, failure = scope["method"], self.next_failure(scope["method"], f"{path}?{query}" if query else path)
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.note(method, path, status)
            await send(message)

        if failure is None:
            await self.app(scope, receive, noting)
        elif failure.status is not None:
            await _read_all(receive)
            await failure.answer()(scope, receive, noting)
        else:
            await self._break(failure, scope, receive, send)
        if status == 0:
            self.note(method, path, 0)

    async def _break(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends the connection: at once, amid the request's or the answer's body, or in place of the answer."""
        left = failure.after_bytes or 0

        async def cut(message: Message) -> None:
            nonlocal left
            if failure.lost or left < 0:
                return
            if message["type"] == "http.response.body":
                body = message.get("body", b"")[:left]
                left = left - len(body) or -1
                message = {**message, "body": body, "more_body": True}
            await send(message)

        if failure.lost or (left and scope["method"] == "GET"):
            await self.app(scope, receive, cut)
        elif left:
            await _read_all(receive, left)
        await _hang_up(receive, send)


async def _read_all(receive: Receive, bound: int | None = None) -> None:
    """Takes in the request's body, or as much of it as the bound says."""
    count = 0
    while bound is None or count < bound:
        message = await receive()
        count += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _hang_up(receive: Receive, send: Any) -> None:
    """Cuts the TCP connection, as a crash or a router would: ASGI has no word for it, uvicorn's cycle has."""
    send.__self__.transport.abort()
    while (await receive())["type"] != "http.disconnect":
        pass
