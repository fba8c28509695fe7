"""Running model-written Python in a subprocess with limits.

What each run gets: limits on CPU time, memory, file size, processes and open files; an empty temporary directory; an
interpreter without site packages; an environment without the caller's variables; and an end, with all that it started,
when its time is over or (on Linux) the caller dies. What it can reach beyond that depends on the machine;
:func:`isolation` finds the strongest way by trying, and :meth:`Isolation.describe` says in one line which protections
are in force.

What this is not: a boundary for hostile code. It shares the kernel, and it can read the files of the system. It stops
what models write by accident or find by trial: endless loops, floods of memory, files and processes, deletions,
downloads, early exits. For code that someone wrote against you, put a virtual machine around the whole training.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from eggroll.errors import ConfigError, RewardError
from eggroll.llm.rewards.sandbox_cgroup import Group, delegated
from eggroll.llm.rewards.sandbox_folder import Folder, remove_leftovers
from eggroll.llm.rewards.sandbox_layers import Isolation, choices, command
from eggroll.llm.rewards.sandbox_watch import Watch

CHILD = Path(__file__).with_name("sandbox_child.py")
PROBE = "import decimal, json\nopen('probe', 'w').write('x')\nprint(json.dumps('ready'))"


class SandboxWarning(UserWarning):
    """Code is run with fewer protections than Linux can give."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use."""

    seconds: float = 5.0
    """Wall-clock time of the whole run; CPU time is limited to the next whole second."""
    memory: int = 512 * 2**20
    """Bytes of address space of one process, and of memory of all processes of the run together."""
    file_size: int = 2**20
    """Bytes of one file, standard output included."""
    disk: int = 16 * 2**20
    """Bytes of all files (only where the run has a file system of its own)."""
    processes: int = 16
    """Processes and threads. Where there are no namespaces, a run is one process with one thread."""
    open_files: int = 64
    """Open files."""

    def __post_init__(self) -> None:
        small = [f"{name} (={value}) must be above 0" for name, value in asdict(self).items() if value <= 0]
        if small:
            raise ConfigError.from_problems("Limits", small)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    output: str
    """Standard output, as far as the file size limit let it."""
    error: str
    """The end of standard error."""
    timed_out: bool
    """Whether it was killed when its time was over."""
    status: int
    """Exit status; negative or above 128 after a signal."""
    results: dict[int, str]
    """What each test that was reached said: ``passed`` or what went wrong; -1 is the candidate itself."""


def run_program(code: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a whole program on the given standard input.

    Raises:
        RewardError: this system has no POSIX processes.
    """
    return _run(code, None, stdin, limits or Limits(), isolation())


def run_tests(code: str, tests: list[str], *, limits: Limits | None = None) -> Outcome:
    """Run a candidate, and then each test in the names that it defined. A test passes if it raises nothing.

    Raises:
        RewardError: this system has no POSIX processes.
    """
    return _run(code, tests, "", limits or Limits(), isolation())


@functools.cache
def isolation() -> Isolation:
    """The strongest isolation that works here, found by trying. Removes what killed runs left behind.

    Raises:
        RewardError: not even a plain run works.
    """
    if os.name != "posix":
        raise RewardError("code execution needs POSIX resource limits; this system has none. Run it on Linux or macOS")
    remove_leftovers()
    reason = "no way of isolation is known for it"
    for choice in choices(delegated()):
        try:
            outcome = _run(PROBE, None, "", Limits(seconds=20), choice)
        except (RewardError, OSError) as error:
            reason = str(error)
            continue
        if outcome.output.strip() == '"ready"':
            if not choice.namespaces:
                warnings.warn(choice.describe(), SandboxWarning, stacklevel=2)
            return choice
        reason = outcome.error.strip()
    raise RewardError(f"code execution does not work on this system: {reason}")


def _run(code: str, tests: list[str] | None, stdin: str, limits: Limits, how: Isolation) -> Outcome:
    word = secrets.token_hex(16)
    with (
        Folder(how) as folder,
        Group(how.group, limits) as group,
        tempfile.TemporaryFile() as settings,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as error,
        _Pipe() as started,
        _Pipe() as results,
    ):
        source.write(stdin.encode(errors="replace"))
        source.seek(0)
        values = {
            **asdict(limits),
            "namespaces": how.namespaces,
            "drop_user": how.drop_user,
            "wrapped": how.bubblewrap is not None,
            "driver": os.getpid(),
            "cpu_seconds": int(limits.seconds) + 1,
            "folder": folder,
            "code": code,
            "tests": tests,
            "word": word,
            "started": started.writer,
            "result": results.writer,
        }
        settings.write(json.dumps(values).encode())
        settings.seek(0)
        inner = ["-P", "-S", "-s", "-B", "-X", "utf8"]
        process = subprocess.Popen(
            [*group.enter(), *command(how, CHILD, inner), str(settings.fileno())],
            stdin=source,
            stdout=output,
            stderr=error,
            cwd="/",
            env=_environment(folder),
            pass_fds=(settings.fileno(), started.writer, results.writer),
            start_new_session=True,
        )
        started.close_writer()
        results.close_writer()
        watch = Watch(process.pid, limits.memory, limits.processes) if how.namespaces and not how.group else None
        timed_out = _wait(process, limits.seconds, lambda: results.drain(limits.file_size), watch)
        group.kill()
        reports = _results(results.drain(limits.file_size), word)
        messages = _read(error, limits.file_size)[-2000:]
        if not started.drain(1) and not timed_out:
            reason = messages.strip().splitlines()[-1:] or [f"status {process.returncode}"]
            raise RewardError(f"the sandbox for code did not start: {reason[0]}")
        if watch is not None and watch.exceeded:
            messages += f"\nkilled: it used more than {watch.exceeded}"
        return Outcome(_read(output, limits.file_size), messages, timed_out, process.returncode, reports)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the caller's. A fixed hash seed, so that the same code gets the same score."""
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


class _Pipe:
    """What the child says to the driver. Unlike a file, it cannot be cut off or written over by scored code."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._open, self._text = [self._reader, self.writer], b""

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._open:
            os.close(number)

    def close_writer(self) -> None:
        """Leave the writing to the child."""
        os.close(self.writer)
        self._open.remove(self.writer)

    def drain(self, size: int) -> str:
        """All that was written so far, but not more than ``size`` bytes; never waits."""
        for _ in range(64):  # a child that writes without end must not hold up its time limit
            try:
                block = os.read(self._reader, 65536)
            except BlockingIOError:
                break
            if not block:
                break
            self._text += block[: max(size - len(self._text), 0)]
        return self._text.decode("utf-8", errors="replace")


def _wait(
    process: subprocess.Popen[bytes], seconds: float, pump: Callable[[], Any], watch: Watch | None = None
) -> bool:
    """Waits for the end, then kills whatever is left of the process group. Returns whether the time ran out."""
    deadline = time.monotonic() + seconds
    while not (ended := _has_ended(process)) and time.monotonic() < deadline:
        pump()
        if watch is not None and watch.look():
            ended = True
            break
        time.sleep(0.005)
    # the leader is not reaped yet, so the number of the group cannot belong to anyone else
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not ended


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(stream: IO[bytes], size: int) -> str:
    stream.seek(0)
    return stream.read(size).decode("utf-8", errors="replace")


def _results(text: str, word: str) -> dict[int, str]:
    """What the tests said. Scored code can write here, too, and whatever it writes must do no harm."""
    found: dict[int, str] = {}
    for line in text.split("\n"):
        if not line.startswith(f'["{word}"'):
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, list) and len(record) == 3:
            _, number, said = record
            if type(number) is int and isinstance(said, str):
                found.setdefault(number, said)
    return found
