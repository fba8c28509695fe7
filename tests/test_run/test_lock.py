"""Two processes never write to the same run."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from eggroll.errors import RunError
from eggroll.run import lock
from eggroll.run.lock import LOCK, locked

HOLDER = """
import sys
from eggroll.run.lock import locked
with locked(sys.argv[1], ["eggroll", "tune", "tiny"]):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_says_who_has_it(other, tmp_path):
    with pytest.raises(RunError) as caught, locked(tmp_path):
        pytest.fail("two processes have the lock")
    text = str(caught.value)
    assert text.startswith(f"the run in {tmp_path} is in use: process {other.pid} on {socket.gethostname()!a}, since '")
    assert text.endswith(
        "(eggroll tune tiny) is writing to it. Only one process may go on with a run: wait until it is done, or stop it"
    )
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "left\n"
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_process_that_was_killed_is_free(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_one_process_takes_it_once(tmp_path):
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(RunError, match="is in use: this process is writing to it already"), locked(tmp_path):
                pytest.fail("taken twice")
        check = "import sys; from eggroll.run.lock import locked; locked(sys.argv[1]).__enter__()"
        done = subprocess.run([sys.executable, "-c", check, tmp_path], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} on " in done.stderr  # the attempts have not freed it


@pytest.mark.parametrize("owner", ["", "{", "[]", '{"pid": 1.5}', '{"pid": 1, "host": "\\u001b[2J"}', "\xff" * 100])
def test_what_is_in_a_lock_file_that_nobody_holds_does_not_matter(tmp_path, owner):
    (tmp_path / LOCK).write_text(owner)
    with locked(tmp_path):
        pass


def test_a_linked_lock_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=r"\.lock is a symbolic link where a file belongs"), locked(run):
        pytest.fail("a link was followed")
    assert (tmp_path / "precious").read_text() == "mine"


class TestWithoutLocks:
    """A network file system that has none."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def refused(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(lock.fcntl, "lockf", refused)

    def owner(self, **changes):
        about = {"pid": os.getppid(), "host": socket.gethostname(), "since_utc": "2026", "command": ""}
        return json.dumps({**about, "started": lock._started(os.getppid()), **changes})

    def test_it_is_taken_and_freed(self, tmp_path):
        with locked(tmp_path):
            assert (tmp_path / LOCK).exists()
        assert not (tmp_path / LOCK).exists()

    def test_a_process_that_lives_has_it(self, tmp_path):
        (tmp_path / LOCK).write_text(self.owner())
        with pytest.raises(RunError, match=f"in use: process {os.getppid()} on ") as caught, locked(tmp_path):
            pytest.fail("taken")
        assert str(caught.value).endswith(
            f". If it has ended without a word, remove {tmp_path / LOCK}, as this file system has no locks"
        )

    def test_a_process_elsewhere_may_live(self, tmp_path):
        (tmp_path / LOCK).write_text(self.owner(host="elsewhere", pid=2**22 + 1))
        with pytest.raises(RunError, match=r"process 4194305 on 'elsewhere'"), locked(tmp_path):
            pytest.fail("taken")

    @pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "1"}])
    def test_a_process_that_is_gone_has_it_no_more(self, tmp_path, changes):
        """Nor has one that got its number."""
        (tmp_path / LOCK).write_text(self.owner(**changes))
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
