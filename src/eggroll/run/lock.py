"""Only one process at a time may write to a run: a lock on the file ``.lock`` in its directory.

The lock is the operating system's (POSIX record locks), so that one whose process has died is free by itself, however
it died. The file says who holds it: process, machine, time and command. Where a file system has no locks, as some
network file systems, what the file says is all there is: a process on this machine that is gone frees the lock, and one
on another machine keeps it until the file is removed.

Reading needs no lock: a run can be looked at, reported and replayed while it goes on.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eggroll.core.reading import TEXT, WHOLE, check_fields, parse
from eggroll.errors import RunError
from eggroll.run.files import explained, open_plain, write_all
from eggroll.run.provenance import utc_now

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
FREE, HELD, UNKNOWN = "free", "held", "unknown"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_OWNER = {"pid": WHOLE, "host": TEXT, "since_utc": TEXT, "command": TEXT, "started": TEXT}
_held: dict[tuple[int, int], int] = {}
"""Lock files that this process holds, by device and number, with the process: a fork does not inherit them."""


@contextmanager
def locked(directory: str | Path, command: Sequence[str] = ()) -> Iterator[None]:
    """Hold the lock of the run in ``directory``, which is there, for the length of the block.

    Args:
        directory: the run's directory.
        command: what this process does, for the message that another one shows.

    Raises:
        RunError: another process has it; the message says which one.
        RunWriteError: the directory cannot be written.
    """
    path = Path(directory) / LOCK
    with explained(path):
        descriptor = _take(path)
        facts = os.fstat(descriptor)
    number = _number(facts)
    _held[number] = os.getpid()
    try:
        with explained(path):
            _write_owner(descriptor, command)
        yield
    finally:
        del _held[number]
        with suppress(OSError):  # before it is closed: whoever takes it later looks whether it is still there
            path.unlink()
        os.close(descriptor)


def holder(directory: str | Path) -> dict[str, Any] | None:
    """What is known of the process that writes to the run in ``directory``; ``None`` if there is none.

    The lock itself is not touched, so that whoever wants it meanwhile can have it.
    """
    path = Path(directory) / LOCK
    try:
        if _held.get(_number(path.lstat())) == os.getpid():  # to close it would free the lock
            return {"pid": os.getpid(), "host": socket.gethostname()}
        descriptor = open_plain(path, os.O_RDONLY)
    except (OSError, RunError):
        return None
    try:
        owner = _read_owner(descriptor)
    finally:
        os.close(descriptor)
    return None if _is_gone(owner) else owner


def _take(path: Path) -> int:
    """The open file ``path`` with its lock."""
    while True:
        with suppress(FileNotFoundError):
            # To open it again and close it would free the lock that this process has.
            if _held.get(_number(path.lstat())) == os.getpid():
                raise RunError(f"the run in {path.parent} is in use: this process is writing to it already")
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        try:
            state = _state(descriptor)
            if state != FREE:
                owner = _read_owner(descriptor)
                if state == HELD or not _is_gone(owner):
                    hint = f". If it has ended without a word, remove {path}, as this file system has no locks"
                    raise RunError(_in_use(path, owner, hint if state == UNKNOWN else ""))
            with suppress(FileNotFoundError):
                if _number(path.lstat()) == _number(os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file between our two steps: there is another one now


def _number(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _state(descriptor: int) -> str:
    """``FREE``, and then locked, or ``HELD``; ``UNKNOWN`` where there are no locks and the file names a holder."""
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return FREE
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return HELD
            if error.errno not in NO_LOCKS:
                raise
    return FREE if os.fstat(descriptor).st_size == 0 else UNKNOWN


def _write_owner(descriptor: int, command: Sequence[str]) -> None:
    pid = os.getpid()
    owner = {
        "pid": pid, "host": socket.gethostname(), "started": _started(pid), "since_utc": utc_now(),
        "command": " ".join(command),
    }  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, json.dumps(owner).encode())
    os.fsync(descriptor)


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """What the holder has written; ``None`` if it has not come to that."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return check_fields(parse(os.read(descriptor, 2**16)), _OWNER)
    except (OSError, ValueError):
        return None


def _is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether the holder was a process of this machine that has ended; another one may have its number by now."""
    if owner is None or owner["host"] != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return bool(owner["started"]) and owner["started"] != _started(owner["pid"])


def _started(pid: int) -> str:
    """When a process began, in ticks of this machine's clock since it was started; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _in_use(path: Path, owner: dict[str, Any] | None, hint: str = "") -> str:
    who = "another process"
    if owner is not None:
        who = f"process {owner['pid']} on {owner['host']!a}, since {owner['since_utc']!a}"
        who += f" ({owner['command']})" if owner["command"] and owner["command"].isprintable() else ""
    return (
        f"the run in {path.parent} is in use: {who} is writing to it. Only one process may go on with a run: wait "
        f"until it is done, or stop it{hint}"
    )
