"""Settings as the record holds them: JSON, without secrets, objects and paths of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

SECRET_WORDS = ("auth", "credentials", "key", "password", "secret", "token")
"""Entries with one of these words in their names are left out."""
MOST_ENTRIES, MOST_CHARACTERS = 1000, 400  # of a list, and of a text in it: beyond, it is data and no setting


def plain(value: Any) -> Any:
    """A setting as JSON holds it: objects by the names of their types, files and folders without the way to them.

    Example:
        >>> plain({"bits": 4, "hf_token": "hf_…", "device_map": {"": torch.device("cpu")}})
        {'bits': 4, 'device_map': {'': 'cpu'}}
    """
    value = value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return Path(value).name if _is_path(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items() if not is_secret(str(name))}
    if isinstance(value, list | tuple | set):
        is_data = len(value) > MOST_ENTRIES or any(isinstance(p, str) and len(p) > MOST_CHARACTERS for p in value)
        return f"{len(value)} entries" if is_data else [plain(part) for part in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return type(value).__name__


def is_secret(name: str) -> bool:
    """Whether an entry of that name may hold what nobody else should read.

    Example:
        >>> is_secret("api_key"), is_secret("tokenizer")
        (True, False)
    """
    return any(word in name.lower().split("_") for word in SECRET_WORDS)


def _is_path(value: str | Path) -> bool:
    try:
        return Path(value).is_absolute() or (str(value) != "" and Path(value).exists())
    except (OSError, ValueError):  # too long, or with a null character
        return False
