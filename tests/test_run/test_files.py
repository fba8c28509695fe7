"""Atomic writes: the order of the system calls, and what a person reads when one fails."""

from __future__ import annotations

import errno
import os

import pytest

from eggroll.errors import RunWriteError
from eggroll.run.files import remove_temporaries, write_atomic
from eggroll.run.metrics import JsonLines


@pytest.fixture
def calls(monkeypatch):
    """The file system calls made, with whether a file or a directory was synced."""
    seen = []

    def spy(name):
        real = getattr(os, name)

        def replacement(*arguments, **keywords):
            kind = name
            if name == "fsync":
                kind = "fsync directory" if os.path.isdir(f"/proc/self/fd/{arguments[0]}") else "fsync"
            seen.append(kind)
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, replacement)

    for name in ("write", "fsync", "replace", "ftruncate"):
        spy(name)
    return seen


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, calls):
    write_atomic(tmp_path / "a.json", b"{}")
    assert calls == ["write", "fsync", "replace", "fsync directory"]


def test_a_line_is_one_write_and_one_fsync(tmp_path, calls):
    log = JsonLines(tmp_path / "log.jsonl")
    log.append('{"a": 1}')
    assert calls == ["write", "fsync", "fsync directory"]
    calls.clear()
    log.append('{"a": 2}', '{"a": 3}')
    assert calls == ["write", "fsync"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_atomic(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full \(No space left on device; \d+\.\d MiB free\)\. .* continue with --resume$"),
        (errno.EDQUOT, r"the disk is full \(Disk quota exceeded; "),
        (errno.EFBIG, r"a limit on the size of files is in force \(File too large\)\. .*ulimit -f"),
        (errno.EROFS, r"Read-only file system\. Make it writable, or choose another directory with -o$"),
        (errno.EACCES, r"Permission denied\. Make it writable, or choose another directory with -o$"),
        (errno.EIO, r"Input/output error\. Everything written before is intact$"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_is_explained_and_leaves_the_old_contents(tmp_path, monkeypatch, number, message, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def failing(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(RunWriteError, match=r"a\.json could not be written: " + message) as caught:
        write_atomic(path, b"new")
    assert isinstance(caught.value, OSError)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"


def test_only_leftovers_are_removed(tmp_path):
    for name in (".a.json.17.part", "a.part", ".hidden"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".hidden", "a.part"]
