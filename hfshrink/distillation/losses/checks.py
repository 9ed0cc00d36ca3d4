"""Checks of the numbers that losses and their like are set with."""

from __future__ import annotations

import math
from collections.abc import Callable
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
