"""How many threads a run computes with: as many as there are cores, fewer where other programs use them."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from eggroll import _environment
from eggroll.distributed.host import set_threads

LOOKS, BETWEEN_S = 15, 0.02
"""How often the machine is looked at, and the time in between, seconds."""
STAT = Path("/proc/stat")


def choose_threads(options: Any) -> str | None:
    """Compute with fewer threads if other programs use the cores; returns a line that says so.

    Threads that share a core hold each other up: every product is as slow as the last of them. The number is kept with
    the run, as sums may be rounded otherwise with another one, and a resumed run has the same. Nothing is changed if
    the user has set the number, or where PyTorch does not compute in this process.

    Args:
        options: of a run: ``resume``, ``workers`` and perhaps ``threads`` count.
    """
    torch = sys.modules.get("torch")
    given = getattr(options, "workers", None) is not None or getattr(options, "threads", None) is not None
    if torch is None or given or _environment.chose_threads():
        return None
    usual = torch.get_num_threads()
    if options.resume is not None:
        kept = _threads_of(options.resume)
        if kept is None or kept >= usual:
            return None
        set_threads(kept)
        return f"{_count(kept)} as the run began with, of {usual} (OMP_NUM_THREADS sets another number)"
    others, cores = others_running(), _cores()
    if others is None or usual == 1 or (threads := max(1, cores - round(others))) >= usual:
        return None
    set_threads(threads)
    return (
        f"{_count(threads)} instead of {usual}: other programs keep {min(others, cores):.0f} of {cores} cores busy "
        "(OMP_NUM_THREADS sets the number)"
    )


def others_running() -> float | None:
    """How many threads of other programs are running or wait for a core, on average over a moment."""
    found: list[int] = []
    while len(found) < LOOKS:
        time.sleep(BETWEEN_S)
        try:
            match = re.search(r"^procs_running (\d+)", STAT.read_text(), re.MULTILINE)
        except OSError:
            match = None
        if match is None:
            return None
        found.append(int(match[1]) - 1)  # this thread
    return sum(found) / len(found)


def _cores() -> int:
    """Cores of the machine, whoever may use them: the number above is the machine's, too."""
    return os.cpu_count() or 1


def _threads_of(run: str) -> int | None:
    from eggroll.run.run_dir import RunDir

    kept = RunDir.open(run).environment.get("threads")
    return kept if isinstance(kept, int) and not isinstance(kept, bool) and kept > 0 else None


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
