"""How far one update points the way of the one before: the cosine of the angle between them.

Near 0, updates are unrelated: noise, or a population too small to see a direction. Above 0, they agree; momentum alone
gives that, too. Below 0, each takes back a part of the one before: the learning rate is too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENTRIES = 4096
"""Entries of a parameter that are looked at, at most. A million in all give the cosine to about 0.001."""


def stride_of(shape: Sequence[int]) -> int:
    """The distance, in the flat parameter, between two entries that are looked at.

    It has no divisor in common with the length of a row, so that the entries are of all columns.
    """
    stride = -(-math.prod(shape) // ENTRIES)
    row = shape[-1] if len(shape) else 1
    while stride > 1 and math.gcd(stride, row) > 1:
        stride += 1
    return stride


class Turning:
    """The cosine of successive updates, from the same sample of each parameter's entries every time.

    One update after the other: :meth:`add` for every parameter, then :meth:`finish`. ``cosine`` is then that of the
    update and the one before, ``None`` after the first or when one of the two changed nothing.
    """

    def __init__(self) -> None:
        self.cosine: float | None = None
        self._before: dict[str, NDArray[np.float32]] = {}
        self._now: dict[str, NDArray[np.float32]] = {}
        self._weights: dict[str, int] = {}

    def add(self, name: str, change: Any, stride: int = 1) -> None:
        """Note the change of a parameter: its entries ``[::stride]``, each of which stands for ``stride`` ones."""
        self._now[name] = np.array(change, np.float32).reshape(-1)
        self._weights[name] = stride

    def finish(self) -> None:
        """The update is complete."""
        names = self._now.keys() & self._before.keys()
        dot, now, before = (
            math.fsum(self._weights[name] * float(np.vdot(left[name], right[name])) for name in names)
            for left, right in ((self._now, self._before), (self._now, self._now), (self._before, self._before))
        )
        self.cosine = dot / math.sqrt(now * before) if now > 0 and before > 0 else None
        self._before, self._now = self._now, {}

    def forget(self) -> None:
        """Start again: the parameters were set to other values."""
        self.cosine, self._before, self._now = None, {}, {}
