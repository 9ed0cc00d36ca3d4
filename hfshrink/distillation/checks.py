"""Checks of the settings and texts that the files of this room are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hfshrink.errors import SettingError


def check_weights(weight: Any, final_weight: Any) -> None:
    """Check the two factors that every loss has.

    Raises:
        SettingError: Not a finite number of at least 0 (`final_weight` may be None).

    Example:
        >>> check_weights(1.0, None)
        >>> check_weights(True, None)
        Traceback (most recent call last):
            ...
        hfshrink.errors.SettingError: weight must be a number of at least 0, got True.
    """
    check_number("weight", weight, "of at least 0", lambda value: value >= 0)
    if final_weight is not None:
        check_number("final_weight", final_weight, "of at least 0", lambda value: value >= 0)


def check_number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> None:
    """Check one numeric setting.

    Args:
        name: Of the setting.
        value: What came; NaN, infinity, booleans, and strings are refused.
        wanted: The condition in words, after "a number".
        fits: The condition.

    Raises:
        SettingError: The value is no such number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise SettingError(f"{name} must be a number {wanted}, got {value!r}.")


def check_counts(**counts: Any) -> None:
    """Check settings by their names.

    Raises:
        SettingError: One is no whole number from 1 on.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {value!r}.")


def check_flags(**flags: Any) -> None:
    """Check settings by their names.

    Raises:
        SettingError: One is neither True nor False.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise SettingError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check a setting that is one of a few names.

    Raises:
        SettingError: It is none of them.
    """
    choices = list(choices)
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_texts(texts: Sequence[Any], where: str) -> None:
    """Check texts that are to be read.

    Raises:
        SettingError: One is no text, or empty; the message has its row.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise SettingError(f"{where} must hold text, got {text!r} ({type(text).__name__}) in row {row}.")
        if not text.strip():
            raise SettingError(f"{where} has an empty text in row {row}. Filter such rows out.")
