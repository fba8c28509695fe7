"""Checks that settings of every kind share: whole numbers and numbers within bounds, one sentence for each problem."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (and no truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(config: Any, **minima: int) -> list[str]:
    """A sentence for each attribute of ``config`` that is no whole number of at least its minimum."""
    found = []
    for name, minimum in minima.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            found.append(f"{name} (={value!r}) must be a whole number of at least {minimum}")
    return found


def numbers(config: Any, **bounds: tuple[float, bool]) -> list[str]:
    """A sentence for each attribute that is no number above its bound (or at it, where that is allowed)."""
    found = []
    for name, (bound, inclusive) in bounds.items():
        value = getattr(config, name)
        if not is_number(value) or value < bound or (value == bound and not inclusive):
            found.append(f"{name} (={value!r}) must be {'at least' if inclusive else 'above'} {bound:g}")
    return found
