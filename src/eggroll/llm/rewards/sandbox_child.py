"""What runs inside the sandbox: shuts itself in, then runs one program or one candidate with its tests.

This file is a script of its own, started by :mod:`eggroll.llm.rewards.sandbox` with ``python -P -S -s -B``; it imports
only the standard library. Its one argument is the number of a file descriptor that holds the settings as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 0x1, 442
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
CANDIDATE = -1
"""The number of a result that is no test's: that of the candidate itself."""
BLOCKED = (
    "socket.", "ctypes.dlopen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.spawn",
    "subprocess.Popen",
)  # fmt: skip
"""Audit events (their beginnings) that are errors where there are no namespaces."""
SHOWN = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "dev", "proc", "nix", "gnu")
"""Folders at the top that a run in namespaces sees."""


class TooSlow(BaseException):
    """A single test ran out of its time. Not an ``Exception``, so that candidates rarely catch it."""


def main() -> NoReturn:
    """Read the settings, shut this process in, run."""
    with os.fdopen(int(sys.argv[1]), encoding="utf-8") as stream:
        settings: dict[str, Any] = json.load(stream)
    sys.argv[:] = ["solution.py"]
    os.environ.pop("PWD", None)  # bubblewrap sets it
    folder, wrapped, namespaces = settings["folder"], settings["wrapped"], settings["namespaces"]
    if wrapped:
        _mount_folder(folder, settings["disk"])
    elif namespaces:
        _enter_namespaces(folder, settings["disk"], as_root=settings["drop_user"])
        parent = _continue_in_child(settings["driver"])
        _mount_proc()
    if settings["drop_user"]:  # after the mounts: nobody may have no way to Python in root's home
        _become_nobody()
    os.chdir(folder)
    if namespaces:
        # An unmapped user namespace: processes are counted for this run alone, and it can make no further namespaces.
        _check(_libc().unshare(CLONE_NEWUSER), "unshare")
    _limit(settings)
    if sys.platform == "linux":
        _give_up_privileges()
    if namespaces and not wrapped:
        _die_with(lambda: not select.select([parent], [], [], 0)[0])
        os.close(parent)
    if not namespaces:
        _die_with(lambda: os.getppid() == settings["driver"])
        _block_calls()
    os.write(settings["started"], b"1")
    os.close(settings["started"])
    if settings["tests"] is None:
        os.close(settings["result"])
        _run_program(settings["code"])
    else:
        _run_tests(settings)
    sys.stdout.flush()
    os._exit(0)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _become_nobody() -> None:
    """Root is exempt from the limit on processes and may write everywhere; nobody is not."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _mount(kind: bytes, target: str, options: str = "", flags: int = 0) -> None:
    flags |= MS_NOSUID | MS_NODEV
    _check(_libc().mount(kind, os.fsencode(target), kind, flags, options.encode()), f"mount {target}")


def _mount_folder(folder: str, disk: int) -> None:
    """A small file system in memory, the only place to write."""
    _mount(b"tmpfs", folder, f"size={disk},nr_inodes=1024,mode=0777")


def _enter_namespaces(folder: str, disk: int, *, as_root: bool) -> None:
    """No network; of the files only those of the system and the interpreter, read-only; a small place to write."""
    libc = _libc()
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    _check(libc.unshare(flags if as_root else flags | CLONE_NEWUSER), "unshare")
    if not as_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as stream:
                stream.write(text)
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount --make-rprivate")
    places = dict.fromkeys(os.path.abspath(path) for path in (sys.base_prefix, sys.base_exec_prefix))
    python = [(place, os.open(place, os.O_PATH | os.O_DIRECTORY)) for place in places]
    # Whatever lies elsewhere (homes, /run, /tmp, /var) may hold sockets and secrets.
    hidden = [path for name in os.listdir("/") if name not in SHOWN and os.path.isdir(path := "/" + name)]
    for path in [*hidden, "/dev/shm", "/dev/mqueue"]:
        if os.path.isdir(path) and not os.path.islink(path):
            _mount(b"tmpfs", path, "mode=0755")
    for place, number in python:
        os.makedirs(place, exist_ok=True)
        source = f"/proc/self/fd/{number}".encode()
        _check(libc.mount(source, os.fsencode(place), None, MS_BIND | MS_REC, None), "mount --bind")
        os.close(number)
    os.makedirs(folder, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), size), "mount_setattr"
    )
    _mount_folder(folder, disk)


def _continue_in_child(driver: int) -> int:
    """A process enters a new process namespace only by its children: the first is its init, whose end ends them all.

    Returns the end of a pipe that is silent for as long as the parent lives; from inside, the parent has no number.
    """
    _die_with(lambda: os.getppid() == driver)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        return reader
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _die_with(alive: Callable[[], bool]) -> None:
    """End when the parent ends, however it does. A change of user or capabilities would undo it, so this comes last.

    Args:
        alive: whether the parent is still there; it may have ended before it could be tied to.
    """
    if sys.platform == "linux":
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not alive():
        os._exit(1)


def _mount_proc() -> None:
    """The processes of the namespace only. Where a container does not allow that, none at all."""
    try:
        _mount(b"proc", "/proc", flags=MS_NOEXEC)
    except OSError:
        _mount(b"tmpfs", "/proc", "mode=0555", MS_RDONLY)


def _limit(settings: dict[str, Any]) -> None:
    """Hard limits of this process and its children. Soft equals hard: nothing can be raised or caught."""
    import resource  # not at the top: Windows has none, and the parent imports this file

    limits = {
        "RLIMIT_CPU": settings["cpu_seconds"],
        "RLIMIT_AS": settings["memory"],
        "RLIMIT_FSIZE": settings["file_size"],
        # Without a process namespace, what a run leaves behind could not be found. It counts those of the user, too.
        "RLIMIT_NPROC": settings["processes"] if settings["namespaces"] else 0,
        "RLIMIT_NOFILE": settings["open_files"],
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # elsewhere (macOS) some limits cannot be set


def _give_up_privileges() -> None:
    """Set-user-id programs gain nothing, and the capabilities within the namespaces go."""
    libc = _libc()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(libc.capset(ctypes.byref(header), ctypes.byref(none)), "capset")


def _block_calls() -> None:
    """Where there are no namespaces: Python code that opens a connection, starts or signals a process gets an error.

    C code does not; but the kernel refuses it processes, too (see :func:`_limit`).
    """
    own = os.getpid()
    import socket  # only here: it takes a while

    inside = int(getattr(socket, "AF_UNIX", -1))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.__new__" and arguments[1] == inside:
            return  # of no use without connect or bind, but asyncio makes a pair to wake itself up
        if event == "os.kill" and arguments[0] == own:
            return
        if event.startswith(BLOCKED):
            raise PermissionError(f"{event} is not allowed in the sandbox")

    sys.addaudithook(hook)


def _run_program(code: str) -> None:
    """A whole program, which reads standard input and writes standard output."""
    exec(compile(code, "solution.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _run_tests(settings: dict[str, Any]) -> None:
    """The candidate once, then each test in the namespace it made; one line per test to the result pipe.

    A line counts only with the random word that the settings brought, so a candidate that prints, or exits early with
    status 0, passes nothing.
    """
    result, word = settings["result"], settings["word"]
    deadline = time.monotonic() + 0.9 * settings["seconds"]
    signal.signal(signal.SIGALRM, _alarm)
    namespace: dict[str, Any] = {"__name__": "solution", "__builtins__": __builtins__}

    def report(number: int, outcome: str) -> None:
        os.write(result, json.dumps([word, number, outcome[:300]]).encode() + b"\n")

    failure = _attempt(settings["code"], "solution.py", namespace, deadline)
    if failure is not None:
        report(CANDIDATE, failure)
        return
    for number, test in enumerate(settings["tests"]):
        failure = _attempt(test, "test.py", namespace, deadline)
        report(number, "passed" if failure is None else failure)


def _attempt(code: str, name: str, namespace: dict[str, Any], deadline: float) -> str | None:
    """Runs code for at most half of the time that is left; what went wrong, or ``None``.

    Halves, so that one endless test leaves time for the others however many there are.
    """
    seconds = max((deadline - time.monotonic()) / 2, 0.01)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            exec(compile(code, name, "exec"), namespace)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TooSlow:
        return f"took longer than {seconds:.2g} s"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


def _alarm(*_: Any) -> None:
    raise TooSlow


if __name__ == "__main__":
    main()
