"""Running model-written Python in a subprocess with limits.

What each run gets: a process group of its own, killed as a whole when its time is over; limits on CPU time, memory,
file size, processes and open files; an empty temporary directory; an interpreter without site packages; an environment
without the caller's variables; and no network. Where Linux allows user namespaces to ordinary users (most systems do)
it also sees no process but its own, cannot write outside a small file system in memory, and, when the caller is root,
runs as nobody.

What this is not: a boundary for hostile code. It shares the kernel, and it can read what the user can read. It stops
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
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from eggroll.errors import ConfigError, RewardError
from eggroll.llm.rewards.sandbox_child import STARTED

CHILD = Path(__file__).with_name("sandbox_child.py")
PROBE = "import decimal, json\nopen('probe', 'w').write('x')\nprint(json.dumps('ready'))"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use."""

    seconds: float = 5.0
    """Wall-clock time of the whole run; CPU time is limited to the next whole second."""
    memory: int = 512 * 2**20
    """Bytes of address space of one process."""
    file_size: int = 2**20
    """Bytes of one file, standard output included."""
    disk: int = 16 * 2**20
    """Bytes of all files (only where the run has a file system of its own)."""
    processes: int = 16
    """Processes and threads. Where there are no namespaces, those of the user outside the sandbox count too."""
    open_files: int = 64
    """Open files."""

    def __post_init__(self) -> None:
        small = [f"{name} (={value}) must be above 0" for name, value in asdict(self).items() if value <= 0]
        if small:
            raise ConfigError.from_problems("Limits", small)


@dataclass(frozen=True)
class Isolation:
    """What this machine offers beyond limits."""

    namespaces: bool
    """No network, no other processes, read-only files, enforced by the kernel."""
    drop_user: bool
    """Root becomes nobody."""

    def describe(self) -> str:
        """One sentence for people."""
        network = "no network (namespace)" if self.namespaces else "Python-level network block only"
        files = "read-only files" if self.namespaces else "the user's file permissions"
        return f"sandbox: {network}, {files}, {'as nobody' if self.drop_user else 'as the same user'}"


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
    """The strongest isolation that works here, found by trying.

    Raises:
        RewardError: not even a plain run works.
    """
    if os.name != "posix":
        raise RewardError("code execution needs POSIX resource limits; this system has none. Run it on Linux or macOS")
    root = os.geteuid() == 0
    choices = [Isolation(True, True), Isolation(True, False), Isolation(False, True), Isolation(False, False)]
    reason = "no way of isolation is known for it"
    for choice in choices:
        if (choice.drop_user and not root) or (choice.namespaces and sys.platform != "linux"):
            continue
        try:
            outcome = _run(PROBE, None, "", Limits(seconds=20), choice)
        except RewardError as error:
            reason = str(error)
            continue
        if outcome.output.strip() == '"ready"':
            return choice
        reason = outcome.error.strip()
    raise RewardError(f"code execution does not work on this system: {reason}")


def _run(code: str, tests: list[str] | None, stdin: str, limits: Limits, how: Isolation) -> Outcome:
    word = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="eggroll-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as settings,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as error,
        tempfile.TemporaryFile() as results,
    ):
        os.chmod(folder, 0o777 if how.drop_user else 0o700)
        source.write(stdin.encode())
        source.seek(0)
        values = {
            **asdict(limits),
            **asdict(how),
            "cpu_seconds": int(limits.seconds) + 1,
            "folder": folder,
            "code": code,
            "tests": tests,
            "word": word,
            "result": results.fileno(),
        }
        settings.write(json.dumps(values).encode())
        settings.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-S", "-s", "-B", "-X", "utf8", str(CHILD), str(settings.fileno())],
            stdin=source,
            stdout=output,
            stderr=error,
            cwd="/",
            env=_environment(folder),
            pass_fds=(settings.fileno(), results.fileno()),
            start_new_session=True,
        )
        timed_out = _wait(process, limits.seconds)
        reports = _results(_read(results, limits.file_size), word)
        messages = _read(error, limits.file_size)[-2000:]
        if reports.pop(STARTED, None) is None and not timed_out:
            reason = messages.strip().splitlines()[-1:] or [f"status {process.returncode}"]
            raise RewardError(f"the sandbox for code did not start: {reason[0]}")
        return Outcome(_read(output, limits.file_size), messages, timed_out, process.returncode, reports)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the caller's. A fixed hash seed, so that the same code gets the same score."""
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for the end, then kills whatever is left of the process group. Returns whether the time ran out."""
    deadline = time.monotonic() + seconds
    while not (ended := _has_ended(process)) and time.monotonic() < deadline:
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
    found: dict[int, str] = {}
    for line in text.splitlines():
        try:
            record: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, list) and len(record) == 3 and record[0] == word:
            found.setdefault(record[1], record[2])
    return found
