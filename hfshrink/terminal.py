"""What people look at: a progress bar that appears after two seconds and only on a terminal, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a bar on stderr where that is a terminal and the work lasts more than two seconds."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, total=total, disable=None, delay=2)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table, as good to read in a terminal as on a page; pipes in cells are escaped.

    Example:
        >>> print(table(("model", "MB"), [("teacher", "90.9")]))
        | model   | MB   |
        |---------|------|
        | teacher | 90.9 |
    """
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
