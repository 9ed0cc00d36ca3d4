"""What must not be published: tokens, values of secret environment variables, paths of this machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError

REMOVED = "[removed]"
SECRET_NAMES = re.compile(r"TOKEN(?!I)|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY|API_KEY|APIKEY")
SHORTEST_SECRET = 8  # characters of a variable's value; shorter ones are found in any text
TOKEN_SHAPES = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_[A-Za-z0-9._-]{20,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[A-Z0-9]{16}\b)"
)
MACHINE_PATH = re.compile(r"(?:file://|~|[A-Za-z]:)?[\\/](?:[^\\/\s]+[\\/])+[^\\/\n]*")
"""A text that is a path, with a folder."""
CHUNK = 16 * 2**20  # bytes of a file that are searched at a time
OVERLAP = 4096  # bytes that two chunks share, so that nothing hides on the border

logger = logging.getLogger(__name__)


def known_secrets(token: Any = None) -> dict[str, str]:
    """What it is -> its text, of all secrets that this process knows: the token in use and environment variables."""
    named = {name: value.strip() for name, value in os.environ.items() if SECRET_NAMES.search(name.upper())}
    found = {
        f"the value of the environment variable {name}": value
        for name, value in named.items()
        if len(value) >= SHORTEST_SECRET and not value.isdigit() and not value.startswith(("/", "~", "http"))
    }
    if isinstance(token, str) and token:
        found["the token of this push"] = token
    return found


def scrub(text: str, secrets: dict[str, str]) -> str:
    """A message without secrets, without the queries of addresses, which may be signed, and without the home folder.

    Example:
        >>> scrub("PUT http://host/file?signature=abc with hf_abcdefghijklmnopqrstuvwxyz", {})
        'PUT http://host/file with [removed]'
    """
    for secret in secrets.values():
        text = text.replace(secret, REMOVED)
    text = TOKEN_SHAPES.sub(REMOVED.encode(), text.encode("utf-8", "replace")).decode("utf-8", "replace")
    return without_home(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text))


def without_home(text: str) -> str:
    """A text with `~` in the place of the home folder."""
    home = str(Path.home()).rstrip("/\\")
    return re.sub(re.escape(home) + r"(?=[\\/]|$|[\s'\":,;])", "~", text) if len(home) > 1 else text


def clean(value: Any, secrets: dict[str, str]) -> Any:
    """JSON without secrets and paths of this machine: of a path the last part stays.

    Example:
        >>> clean({"data": "/data/people/ada/rows", "rows": 3}, {})
        {'data': 'rows', 'rows': 3}
    """
    if isinstance(value, dict):
        return {scrub(str(key), secrets): clean(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, secrets) for item in value]
    if isinstance(value, str):
        return _without_paths(scrub(value, secrets))
    return value


def without_machine_paths(value: Any) -> Any:
    """JSON in which texts that are a path lose its folders, and others the home folder; tokens such as `/s` stay.

    Example:
        >>> without_machine_paths({"text_config": {"name": "/data/ada/base"}, "eos_token": "/s"})
        {'text_config': {'name': 'base'}, 'eos_token': '/s'}
    """
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if MACHINE_PATH.fullmatch(value) else without_home(value)


def _without_paths(text: str) -> str:
    if re.fullmatch(r"(?:/|~[\\/]|\\\\|[A-Za-z]:[\\/]|file://)[^\n]*", text) and len(text) > 1:
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return re.sub(r"(?<![\w:/.<])/(?:[\w.@+-]+/)+([\w.@+-]+)", r"\1", text)


def check_file(name: str, content: Path | bytes, secrets: dict[str, str]) -> None:
    """Refuse a file that holds a secret, and warn of one that names this user's home folder.

    Args:
        name: Its path in the repository.
        content: The file, or its bytes.
        secrets: As of `known_secrets`.

    Raises:
        CheckpointError: It does. The message never holds the secret itself.
    """
    home = str(Path.home()).encode()
    has_home = False
    for chunk in chunks(content):
        for what, secret in secrets.items():
            if secret.encode() in chunk:
                raise CheckpointError(f"{name} holds {what}. Take it out of that file; nothing was uploaded.")
        if TOKEN_SHAPES.search(chunk):
            raise CheckpointError(f"{name} holds what looks like an access token. Take it out; nothing was uploaded.")
        has_home = has_home or (len(home) > 1 and home + b"/" in chunk)
    if has_home:
        logger.warning("%s names files below your home folder, and with them your user name.", name)


def chunks(content: Path | bytes) -> Iterator[bytes]:
    """A file in pieces that overlap, so that what is searched for lies whole in one of them."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        kept = b""
        while piece := file.read(CHUNK):
            yield kept + piece
            kept = piece[-OVERLAP:]
