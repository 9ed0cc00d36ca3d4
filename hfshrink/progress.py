"""A progress bar that appears after two seconds, and only on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a bar on stderr where that is a terminal and the work lasts more than two seconds."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, total=total, disable=None, delay=2)
