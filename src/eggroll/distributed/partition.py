"""Which worker scores which members: fixed ranges, and a ledger of who has what. No processes, no clock of its own.

Ranges depend on the population alone, never on the number of workers: a batched forward rounds differently in batches
of different shapes, so the same members must always be computed together for results that are equal bit for bit.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eggroll.errors import ConfigError

RANGES = 16
"""A population is cut into at least about so many ranges, so that small clusters are kept busy to the end."""
MOST_MEMBERS = 64
"""Members of a range at most, unless the caller says otherwise."""


def default_range_size(population_size: int, most: int = MOST_MEMBERS) -> int:
    """Members of a range: a sixteenth of the population, even, at least 2 and at most ``most``."""
    even = -(-population_size // (2 * RANGES)) * 2
    return max(2, min(even, most - most % 2))


def ranges(members: int | range, range_size: int | None = None) -> list[range]:
    """Consecutive ranges of ``range_size`` members; the last may be shorter.

    Args:
        members: which, or how many from 0 on.
        range_size: ``None`` takes :func:`default_range_size`.

    Raises:
        ConfigError: the range size is not an even number of at least 2.
    """
    members = range(members) if isinstance(members, int) else members
    size = default_range_size(len(members)) if range_size is None else range_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
        raise ConfigError(
            f"range_size (={range_size!r}) must be an even number of at least 2, so that pairs stay together; "
            f"use None for the default ({default_range_size(len(members))})"
        )
    return [range(start, min(start + size, members.stop)) for start in range(members.start, members.stop, size)]


@dataclass
class Ledger:
    """One generation's ranges: which are waiting, which are with whom, which are done.

    Times are the caller's, in seconds on any clock that does not go back.

    Args:
        ranges: from :func:`ranges`.
        patience_s: a range that is out for less than this is never given to a second worker.
        factor: nor one that is out for less than ``factor`` times the median of the finished ones.
    """

    ranges: Sequence[range]
    patience_s: float = 10.0
    factor: float = 2.0
    results: dict[int, Any] = field(default_factory=dict)
    repeated: int = 0
    """Ranges that were given out again, because their worker was lost or slow."""
    _waiting: deque[int] = field(default_factory=deque, repr=False)
    _out: dict[int, dict[int, float]] = field(default_factory=dict, repr=False)  # range -> worker -> since when
    _held: Counter[int] = field(default_factory=Counter, repr=False)  # ranges that each worker has
    _durations: list[float] = field(default_factory=list, repr=False)
    _next: tuple[float, int] | None = field(default=None, repr=False)  # kept: thousands of idle workers ask for it
    _next_known: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._waiting.extend(range(len(self.ranges)))

    @property
    def done(self) -> bool:
        """Whether every range has a result."""
        return len(self.results) == len(self.ranges)

    @property
    def waiting(self) -> int:
        """Ranges that nobody has."""
        return len(self._waiting)

    def take(self, worker: int, now: float) -> int | None:
        """The next range for a worker (its index), or ``None`` if there is nothing useful to do.

        A worker may take further ranges before it has answered, to have its next one at hand; it works them off in
        order. Only one that has nothing left is given what another one is slow with.
        """
        if self._waiting:
            index = self._waiting.popleft()
        else:
            due = None if self._held[worker] else self._due()
            if due is None or due[0] > now:
                return None
            index = due[1]
            self.repeated += 1
        self._out.setdefault(index, {})[worker] = now
        self._held[worker] += 1
        self._next_known = False
        return index

    def finish(self, worker: int, index: int, result: Any, now: float) -> bool:
        """A worker has answered. False if the range was done already, or taken from it: its result does not count."""
        workers = self._out.get(index, {})
        if worker not in workers:
            return False
        insort(self._durations, now - workers.pop(worker))
        self._held[worker] -= 1
        self._next_known = False
        if not workers:
            del self._out[index]
        if self._held[worker]:
            for others in self._out.values():
                if worker in others:
                    others[worker] = now  # it has been waiting until now
        if index in self.results:
            return False
        self.results[index] = result
        return True

    def lost(self, worker: int) -> list[int]:
        """A worker is gone: its ranges go to the front of the queue, unless others have them or they are done."""
        freed = []
        for index, workers in self._out.items():
            if worker in workers:
                del workers[worker]
                if not workers and index not in self.results:
                    freed.append(index)
        self._held[worker] = 0
        self._next_known = False
        self._waiting.extendleft(reversed(freed))
        self.repeated += len(freed)
        return freed

    def next_repeat(self) -> float | None:
        """When the next slow range may be given to a second worker, or ``None`` if none is out."""
        due = None if self._waiting else self._due()
        return None if due is None else due[0]

    def assemble(self) -> list[Any]:
        """The results in the order of members.

        Every member is in exactly one of them: a ledger in which it is not is a bug, not a user's mistake.
        """
        members = [member for index in sorted(self.results) for member in self.ranges[index]]
        expected = [member for part in self.ranges for member in part]
        assert members == expected[: len(members)], "members are scored twice or out of order"
        assert self.done, "members are not scored"
        return [self.results[index] for index in range(len(self.ranges))]

    def _due(self) -> tuple[float, int] | None:
        """Of the ranges that are out, the one that a further worker may have first, and from when on."""
        if not self._next_known:
            median = self._durations[len(self._durations) // 2] if self._durations else 0.0
            longest = max(self.patience_s, self.factor * median)
            # The third copy waits twice as long, and so on: someone may be on the way with the second.
            waits = (
                (min(workers.values()) + longest * len(workers), index)
                for index, workers in self._out.items()
                if workers and index not in self.results
            )
            self._next, self._next_known = min(waits, default=None), True
        return self._next
