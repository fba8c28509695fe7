"""Writing files so that a crash at any moment leaves either the old contents or the new ones, never a mixture.

A run's directory may come from anyone, so no link in it is ever followed: what is written through one, or removed
behind one, would be a file elsewhere. Named pipes and other special files, at which a program would wait without end,
are refused as well.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eggroll.errors import RunError, RunWriteError

TEMPORARY_SUFFIX = ".part"
SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_plain(path: Path, *, directory: bool = False) -> bool:
    """Whether ``path``, which belongs to a run, is there.

    Args:
        path: a file of a run.
        directory: it shall be a directory.

    Raises:
        RunError: it is a link, a special file, or a file where a directory belongs (or the other way round).
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    what = "a directory" if directory else "a file"
    if stat.S_ISLNK(mode) or (hasattr(path, "is_junction") and path.is_junction()):
        raise RunError(
            f"{path} is a symbolic link where {what} belongs. Links in a run's directory are not followed, as files "
            "elsewhere would be overwritten or removed; put what it leads to in its place, or remove it"
        )
    kind = stat.S_IFMT(mode)
    if kind != (stat.S_IFDIR if directory else stat.S_IFREG):
        other = SPECIAL.get(kind, "a file" if directory else "a directory")
        raise RunError(f"{path} is {other}, where {what} belongs; move it away")
    return True


def check_tree(directory: Path) -> None:
    """:func:`check_plain` for a directory of a run and everything in it; one that is not there is fine.

    Raises:
        RunError: there is a link or a special file.
    """
    if not check_plain(directory, directory=True):
        return
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            check_tree(entry)
        else:
            check_plain(entry)


def open_plain(path: Path, flags: int) -> int:
    """``os.open`` for a file of a run, which is no link and no special file.

    Raises:
        RunError: it is one of those.
        OSError: as ``os.open``.
    """
    if not path.is_dir() or path.is_symlink():  # of a directory, the system says it in its own words
        check_plain(path)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # the first two for what takes its place after the check
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


def read_plain(path: Path) -> bytes:
    """The contents of a file of a run, which is no link and no special file.

    Raises:
        RunError: it is a link or a special file.
        OSError: it is not there, or cannot be read.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read()


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
            with suppress(FileNotFoundError):
                temporary.unlink()  # of another process with this number, or a link
            descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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
