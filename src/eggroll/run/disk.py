"""The disk that a run takes, and which checkpoints of a finished run are not worth theirs."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from eggroll.run import checkpoint
from eggroll.run.run_dir import RunDir

LARGE = 256e6
"""Checkpoints of a finished run that take more bytes than this together are thinned out to the newest one."""


def bytes_of(folder: Path) -> int:
    """Bytes of all files in a folder; links are not followed."""
    found = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a run that goes on replaces files
                found += os.lstat(os.path.join(place, name)).st_size
    return found


def thin_checkpoints(run: RunDir, also: Collection[int] = ()) -> None:
    """Keep only the newest checkpoint of a finished run and those of ``also``, if they are large and it is whole.

    The others are there for the case that the newest is damaged while the run goes on. Without any, the weights can
    still be rebuilt from the log.
    """
    there = checkpoint.found(run.checkpoints)
    if len(there) > 1 and bytes_of(run.checkpoints) > LARGE and run.has_checkpoint(there[-1][0]):
        for generation, path in there[:-1]:
            if generation not in also:
                checkpoint._remove(path)


def size(count: float) -> str:
    """Bytes as people say them: 812 kB, 3.4 MB, 1.4 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
