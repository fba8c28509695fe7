"""Writing files so that a crash at any moment leaves either the old contents or the new ones, never a mixture."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eggroll.errors import RunWriteError

TEMPORARY_SUFFIX = ".part"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block, which writes ``path``, into a :class:`RunWriteError` that says what to do."""
    try:
        yield
    except RunWriteError:
        raise
    except OSError as error:
        raise RunWriteError(describe(path, error)) from error


def describe(path: Path, error: OSError) -> str:
    """Why ``path`` could not be written, what is still there, and the way out."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{path} could not be written: the disk is full ({reason}; {_free(path)} free). "
            "Everything written before is intact: free some space, then continue with --resume"
        )
    if error.errno == errno.EFBIG:
        return (
            f"{path} could not be written: a limit on the size of files is in force ({reason}). "
            "Everything written before is intact: raise the limit (ulimit -f), then continue with --resume"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} could not be written: {reason}. Make it writable, or choose another directory with -o"
    return f"{path} could not be written: {reason}. Everything written before is intact"


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB"
    return "unknown space"


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; ``os.write`` alone may write a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_directory(directory: Path) -> None:
    """Make names that were created, replaced or removed in ``directory`` survive a power cut."""
    if os.name == "nt":  # Windows cannot open directories; NTFS journals names itself
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the contents of ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises:
        RunWriteError: the file cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with explained(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Remove what an atomic write that was killed has left behind."""
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            leftover.unlink()
