"""The working folder of a run, and what is left of folders whose driver was killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from eggroll.llm.rewards.sandbox_child import NOBODY
from eggroll.llm.rewards.sandbox_layers import Isolation

PREFIX = "eggroll-code-"
INSIDE = "/tmp"
"""The folder of runs with a file system of their own, which ends with them."""


class Folder:
    """An empty folder for one run; removed with all that the run made in it.

    Where a run has no file system of its own, the folder is a real one. The driver holds a lock on it for as long as it
    lives, so that a later one can tell what may go.
    """

    def __init__(self, how: Isolation) -> None:
        self._how = how
        self._path, self._lock = INSIDE, -1

    def __enter__(self) -> str:
        while not self._how.namespaces and self._lock < 0:
            self._path = tempfile.mkdtemp(prefix=PREFIX)
            self._lock = _locked(self._path)  # -1: somebody who cleans up was faster
        if not self._how.namespaces and self._how.drop_user:
            os.chown(self._path, NOBODY, NOBODY)
        return self._path

    def __exit__(self, *_: object) -> None:
        if not self._how.namespaces:
            _remove(self._path)
            os.close(self._lock)


def remove_leftovers() -> None:
    """Remove folders of this user's killed drivers."""
    mine = {os.geteuid()} | ({NOBODY} if os.geteuid() == 0 else set())
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_dir() or path.stat().st_uid not in mine:
                continue
            lock = _locked(str(path))
            if lock >= 0:
                _remove(str(path))
                os.close(lock)


def _locked(path: str) -> int:
    """A descriptor that holds the lock of a folder; -1 if somebody else has it, or the folder is gone."""
    import fcntl  # not at the top: Windows has none

    lock = -1
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == os.stat(path, follow_symlinks=False).st_ino:
            return lock
    except OSError:
        pass
    if lock >= 0:
        os.close(lock)
    return -1


def _remove(path: str) -> None:
    """Remove a folder; never follows links. ``rm`` holds few files open however deep it is, ``shutil.rmtree`` all."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
    subprocess.run(["rm", "-rf", "--", path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
