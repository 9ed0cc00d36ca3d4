"""Clients of the test Hub: Python in a process of its own, or this process made to believe in ``HF_ENDPOINT``."""

import os
import subprocess
import sys
from pathlib import Path

from hub.server import Hub


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """The variables with which a fresh process works on this Hub; ``home`` keeps its caches; token "" for none."""
    token = hub.token if token is None else token
    told = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its uploads need a server that isn't built here
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | told | ({"HF_TOKEN": token} if token else {})


def run_python(hub: Hub, home: Path, code: str, *args: str, token: str | None = None, timeout: float = 300) -> str:
    """Runs code in a fresh process that works on this Hub, in the folder ``home``; what it printed.

    Raises:
        AssertionError: It failed; what it said on stderr is in the message.
    """
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(hub, home, token), cwd=home, timeout=timeout
    )
    if done.returncode:
        raise AssertionError(f"the client failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def work_on(hub: Hub, monkeypatch, home: Path, token: str | None = None) -> None:
    """Makes huggingface_hub and transformers of this process work on the Hub, as ``HF_ENDPOINT`` does at import.

    Quicker than a process, and enough where nothing is downloaded by data sets (``datasets`` keeps file systems).
    """
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    for name, value in environment(hub, home, token).items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
    if token == "":
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
