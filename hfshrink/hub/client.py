"""The client of the Hub: one place that makes it, and what its errors become."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError, HfshrinkError, SettingError
from hfshrink.hub.leaks import known_secrets, scrub
from hfshrink.hub.retries import is_connection, reason, status_of
from hfshrink.saving import LEFTOVER_SECONDS

ADVICE = {
    401: "The token is not valid (any more), or the repository is private: run `hf auth login`.",
    403: "The token has no right to do this.",
    404: "There is no such repository, or the token may not see it.",
    429: "The Hub takes no more requests of yours for a while: try again later.",
}
"""status -> what to do."""
STAGING = "hfshrink-push-"


def hub_api(token: Any = None) -> Any:
    """The client that all calls go through; its address is `HF_ENDPOINT`, which huggingface_hub reads at import.

    Raises:
        SettingError: A token that can't be one.
    """
    from huggingface_hub import HfApi

    from hfshrink.record import versions

    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise SettingError("token= must be a token of the Hub, without spaces and line breaks; it is not shown here.")
    return HfApi(token=token, library_name="hfshrink", library_version=versions().get("hfshrink", ""))


@contextlib.contextmanager
def told(what: str | Callable[[], str], api: Any) -> Iterator[None]:
    """Turn errors of the client and the network into ours, without secrets and without the chain that holds them."""
    try:
        yield
    except HfshrinkError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | ValueError) and not is_connection(error):
            raise
        text = scrub(" ".join(str(error).split())[:500], secrets_of(api))
        begin = what() if callable(what) else what
        advice = ADVICE.get(status_of(error) or 0, "")
        raise CheckpointError(f"{begin}: {reason(error)}. {text}{' ' if advice else ''}{advice}") from None


def secrets_of(api: Any) -> dict[str, str]:
    """What this process knows that must not be published or shown: the client's token and environment variables."""
    return known_secrets(api.token if isinstance(api.token, str) else saved_token())


def saved_token() -> str | None:
    """The token that `hf auth login` saved, or that of the environment."""
    from huggingface_hub.utils import get_token

    return get_token()


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """No progress bars of huggingface_hub, transformers and datasets where nobody sees them."""
    import datasets
    from transformers.utils import logging

    bars, tables = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    quiet = not sys.stderr.isatty()
    if quiet and bars:
        logging.disable_progress_bar()
    if quiet and tables:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet and bars:
            logging.enable_progress_bar()
        if quiet and tables:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A folder for files on their way, removed afterwards; a disk without room is an error of ours."""
    from safetensors import SafetensorError

    try:
        for left in Path(tempfile.gettempdir()).glob(f"{STAGING}*"):  # of a push that was killed
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=STAGING) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Can't write the files aside in {tempfile.gettempdir()}: {getattr(error, 'strerror', None) or error}. "
            "Make room there, or set TMPDIR. Nothing was uploaded."
        ) from None
