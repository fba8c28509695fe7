"""Limits on all processes of a run together, where Linux lets this user make cgroups (version 2)."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import Any

PREFIX = "eggroll-code-"
NEEDED = {"memory", "pids"}
OWN_PROCESSES = 4
"""What bubblewrap and the child need beside the scored code."""


class Group:
    """A cgroup for one run, inside ``parent``; without a parent, nothing happens.

    Args:
        parent: a folder below which this user may make cgroups; see :func:`delegated`.
        limits: a :class:`~eggroll.llm.rewards.sandbox.Limits`, for ``memory``, ``disk`` and ``processes``.
        values: what is written to which file, instead.
    """

    def __init__(self, parent: str | None, limits: Any, values: dict[str, int] | None = None) -> None:
        self._path = None if parent is None else Path(parent, f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
        if values is None:
            memory = limits.memory + limits.disk  # files in memory count as memory here
            values = {"memory.max": memory, "memory.swap.max": 0, "pids.max": limits.processes + OWN_PROCESSES}
        self._values = values

    def __enter__(self) -> Group:
        if self._path is not None:
            self._path.mkdir()
            for name, value in self._values.items():
                try:
                    _write(self._path / name, str(value))
                except FileNotFoundError:
                    if name != "memory.swap.max":  # kernels without swap accounting
                        raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self.kill()
            _remove(self._path)

    def enter(self) -> list[str]:
        """What to put in front of a command so that it runs in the group from its first instruction."""
        if self._path is None:
            return []
        return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self._path / "cgroup.procs")]

    def kill(self) -> None:
        """End all processes in the group."""
        if self._path is not None:
            with contextlib.suppress(OSError):  # Linux before 5.14: the namespace ends them
                _write(self._path / "cgroup.kill", "1")


def delegated(mounts: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup") -> str | None:
    """The nearest cgroup, from this process's own upwards, in which this user can make some with limits on memory and
    processes; ``None`` if there is none. What killed drivers left there is removed.

    Args:
        mounts: where the mounts are read.
        own: where this process's cgroup is read.
    """
    try:
        fields = [line.split() for line in Path(mounts).read_text().splitlines()]
        top = next(Path(line[4]) for line in fields if line[line.index("-") + 1] == "cgroup2")
        group = next(line[3:] for line in Path(own).read_text().splitlines() if line.startswith("0::"))
        start = top / group.lstrip("/")
        for place in (start, *start.parents):
            handed_on = set((place / "cgroup.subtree_control").read_text().split())
            if handed_on >= NEEDED and os.access(place, os.W_OK) and os.access(place / "cgroup.procs", os.W_OK):
                for left in place.glob(f"{PREFIX}*"):
                    if not _alive(left.name):
                        with contextlib.suppress(OSError):
                            _write(left / "cgroup.kill", "1")
                        _remove(left)
                return str(place)
            if place == top:
                break
    except (OSError, ValueError, StopIteration, IndexError):
        pass
    return None


def _write(path: Path, text: str) -> None:
    with open(path, "r+", encoding="ascii") as stream:  # never makes a file
        stream.write(text)


def _alive(name: str) -> bool:
    return Path("/proc", name.removeprefix(PREFIX).partition("-")[0]).exists()


def _remove(path: Path) -> None:
    """Remove a group; the kernel takes a moment until killed processes are out of it."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
