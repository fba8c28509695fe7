"""The memory and the number of all processes of a run together, where no cgroup limits them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from eggroll.llm.rewards.sandbox_cgroup import OWN_PROCESSES

EVERY_S = 0.02
"""Time between two looks."""


class Watch:
    """Looks from time to time how much memory a process and its descendants use, and how many they are.

    Pages that several share count once (their proportional set size), as children share most with their parent. What
    is taken and given back between two looks is not seen: this is a watch, and a cgroup is a limit.
    """

    def __init__(self, pid: int, memory: int, processes: int) -> None:
        self.exceeded = ""
        """What they use too much of."""
        self._pid, self._memory, self._processes, self._next = pid, memory, processes, 0.0

    def look(self) -> bool:
        """Whether they use too much."""
        now = time.monotonic()
        if now >= self._next and not self.exceeded:
            self._next = now + EVERY_S
            pids = descendants(self._pid)
            # resident pages are quick to read and never too few; proportional ones are slow
            if sum(map(_resident, pids)) > self._memory and sum(map(_proportional, pids)) > self._memory:
                self.exceeded = f"{self._memory / 2**20:.0f} MiB together"
            elif len(pids) > self._processes + OWN_PROCESSES:  # the kernel's limit does not hold for root
                self.exceeded = f"{self._processes} processes"
        return bool(self.exceeded)


def can_watch() -> bool:
    """Whether this kernel lists the children of processes; most do."""
    return Path("/proc/thread-self/children").exists()


def descendants(pid: int) -> list[int]:
    """A process and all that came from it; in a process namespace, none can leave."""
    found = [pid]
    for parent in found:  # grows
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return _resident(pid)
