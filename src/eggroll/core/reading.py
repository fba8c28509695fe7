"""JSON that may come from anyone, read with limits: its depth, its numbers, and the types of what it must hold.

Everything that is read from a run's directory comes through here, so that a file which was changed or damaged is told
in one sentence, whatever is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eggroll.core.check import is_number

MAX_DEPTH = 100
"""Lists and objects within each other; what eggroll writes needs fewer than ten."""
LONGEST_WHOLE = 19
"""Characters of a whole number that stays one (64 bits); a longer one becomes a float, perhaps infinite."""


@dataclass(frozen=True)
class Kind:
    """What a value must be: in words for a message, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """The same, or ``null``."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.holds(value))


def _are_numbers(value: Any) -> bool:
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.asarray(value, np.float64).astype(np.float32)).all())


def _is_list_of(kind: type[Any]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


TEXT = Kind("text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number from 0", lambda value: type(value) is int and value >= 0)
NUMBER = Kind("a finite number", is_number)
NUMBERS = Kind("a list of numbers that float32 holds", _are_numbers)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of texts", _is_list_of(str))
OBJECTS = Kind("a list of objects", _is_list_of(dict))


def parse(text: str | bytes) -> Any:
    """What JSON text holds.

    Raises:
        ValueError: it is no JSON (NaN and infinities are none), no UTF-8, or nested more than :data:`MAX_DEPTH` deep.
    """
    text = text if isinstance(text, str) else text.decode()
    try:
        values = json.loads(text, parse_int=_whole, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(values):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return values


def check_fields(
    values: Any, required: Mapping[str, Kind] | None = None, optional: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """``values`` as an object whose entries are of these kinds; it may have others.

    Raises:
        ValueError: the value is not an object, or an entry is missing or has the wrong type; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is {shown(values)}, not an object")
    for name in required or ():
        if name not in values:
            raise ValueError(f"{name!r} is missing")
    for name, kind in {**(required or {}), **(optional or {})}.items():
        if name in values and not kind.holds(values[name]):
            raise ValueError(f"{name!r} must be {kind.words}, not {shown(values[name])}")
    return values


def shown(value: Any, limit: int = 60) -> str:
    """A value of JSON for a message, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number out of range"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_WHOLE else float(digits)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a number of JSON")


def _is_deep(values: Any) -> bool:
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value) if isinstance(item, list | dict)]
        if not level:
            return False
    return True


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
