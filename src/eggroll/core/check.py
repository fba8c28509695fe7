"""Checks that settings of every kind share: whole numbers and numbers within bounds, one sentence for each problem."""

from __future__ import annotations

import math
from typing import Any

MOST = 2**31 - 1
"""The largest whole number of a setting, apart from seeds and counts of steps: libraries count in 32 or 64 bits."""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (and no truth value) that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def whole(config: Any, *, most: int | None = MOST, **minima: int) -> list[str]:
    """A sentence for each attribute of ``config`` that is no whole number of at least its minimum.

    Args:
        config: the settings.
        most: the largest number allowed; ``None`` for any.
        minima: attributes and their minima.
    """
    found = []
    for name, minimum in minima.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            found.append(f"{name} (={shortened(value)}) must be a whole number of at least {minimum}")
        elif most is not None and value > most:
            found.append(f"{name} (={shortened(value)}) is too large; it can be at most {most}")
    return found


def shortened(value: Any) -> str:
    """``repr`` of a value, cut in its middle where it is long. Python refuses to write numbers of 4,301 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def numbers(config: Any, **bounds: tuple[float, bool]) -> list[str]:
    """A sentence for each attribute that is no number above its bound (or at it, where that is allowed)."""
    found = []
    for name, (bound, inclusive) in bounds.items():
        value = getattr(config, name)
        if not is_number(value) or value < bound or (value == bound and not inclusive):
            found.append(f"{name} (={shortened(value)}) must be {'at least' if inclusive else 'above'} {bound:g}")
    return found
