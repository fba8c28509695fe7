"""What a run is about to take of this machine's memory, in the same words for every kind of run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from eggroll.errors import MemoryBudgetError


def host_memory() -> tuple[int, int]:
    """Total and free bytes of this machine; a container's limit counts as the total."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024  # also what the file cache would give back
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        total = min(total, int(limit[0]))
        free = min(free, max(0, total - int(used[0])))
    return total, free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except OSError:
        return []


def generation_line(work: str, population_size: int, members: int, peak: int) -> str:
    """A line about what each generation takes.

    Args:
        work: what the members do, such as ``"1,000 tokens"``.
        population_size: members of a generation.
        members: how many are evaluated together.
        peak: bytes of memory.
    """
    passes = -(-population_size // members)
    return (
        f"a generation is at most {work} in {passes:,} pass{'es' * (passes != 1)} of {members:,} members; about "
        f"{gigabytes(peak)} of memory"
    )


def ensure_fits(what: str, parts: Mapping[str, int], ways_out: Sequence[str], limit: int | None = None) -> None:
    """Refuse a run that cannot fit, before anything is allocated.

    Args:
        what: the run, such as ``"a population of 1,000 members"``.
        parts: bytes by what they are for.
        ways_out: what would make the run smaller, the strongest first.
        limit: bytes of memory; ``None`` is that of this machine.

    Raises:
        MemoryBudgetError: the parts together are beyond the limit.
    """
    limit, peak = host_memory()[0] if limit is None else limit, sum(parts.values())
    if peak > limit:
        listed = ", ".join(f"{key} {gigabytes(value)}" for key, value in parts.items() if value)
        raise MemoryBudgetError(
            f"{what} needs {gigabytes(peak)} ({listed}), and this machine has {gigabytes(limit)}. "
            f"Ways out: {'; '.join(ways_out)}"
        )


def gigabytes(size: int) -> str:
    """A size for people: ``1.50 GB``, ``12.3 MB``."""
    if size >= 10**9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
