"""Models of timm, one or two of each family, at the smallest sizes that they take."""

from __future__ import annotations

from collections.abc import Iterator

from .case import Case

NAMES: dict[str, dict] = {}


def cases() -> Iterator[Case]:
    """One case for each name; none where timm is not installed."""
    yield from ()
