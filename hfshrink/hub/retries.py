"""Calls to the Hub that are tried again where another try can help: limits, server errors, dropped connections."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; doubled after each try
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more gets none
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of trouble that passes."""

logger = logging.getLogger(__name__)


def with_retries(call: Callable[[], T], what: str, tries: int = TRIES) -> T:
    """The answer of `call`, tried again after growing waits where the Hub or the network had trouble that passes.

    Args:
        call: Without arguments; it must be safe to repeat.
        what: What it does, for the log, such as `"reading the repository"`.
        tries: At most.

    Raises:
        Exception: That of the last try, or of the first that another try can't help.

    Example:
        >>> with_retries(lambda: 1, "counting")
        1
    """
    for number in range(1, tries):
        try:
            return call()
        except Exception as error:
            wait = waiting_time(error, number)
            if wait is None:
                raise
            logger.warning("%s failed (%s); try %d of %d in %.0f s.", what, reason(error), number + 1, tries, wait)
            time.sleep(wait)
    return call()


def waiting_time(error: BaseException, number: int) -> float | None:
    """Seconds until the next try after the `number`-th one failed; None where trying again is no use."""
    status = status_of(error)
    if status is None and not is_connection(error):
        return None
    if status is not None and status not in PASSING:
        return None
    asked = _retry_after(error)
    if asked is not None:
        return asked if asked <= LONGEST_RETRY_AFTER else None
    jitter = random.SystemRandom().uniform(0.8, 1.2)  # not from the generator that a seeded run draws from
    return min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * jitter


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, also where another error wraps it."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def reason(error: BaseException) -> str:
    """A few words on what went wrong, without addresses, which may be signed."""
    status = status_of(error)
    if status is not None:
        return f"HTTP {status}"
    return "the connection failed" if is_connection(error) else type(error).__name__


def is_connection(error: BaseException) -> bool:
    """Whether the connection failed.

    Known by the names of the classes: huggingface_hub changed its HTTP library from one major version to the next.
    """
    for cause in _causes(error):
        names = {base.__name__ for base in type(cause).__mro__}
        if "TransportError" in names and not names & {"LocalProtocolError", "UnsupportedProtocol"}:
            return True
        if names & {"ConnectionError", "TimeoutError"} and "OfflineModeIsEnabled" not in names:
            return True
    return False


def _retry_after(error: BaseException) -> float | None:
    for cause in _causes(error):
        headers: Any = getattr(getattr(cause, "response", None), "headers", None) or {}
        value = str(headers.get("retry-after", "")).strip()
        if value.isdigit():
            return float(value)
        left = re.search(r";\s*t=(\d+)", str(headers.get("ratelimit", "")))  # '"api";r=0;t=55': until the window ends
        if left and status_of(error) == 429:
            return float(left[1])
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found and len(found) < 10:
        found.append(error)
        error = error.__cause__
    return found
