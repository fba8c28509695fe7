"""What runs inside the sandbox: shuts itself in, then runs one program or one candidate with its tests.

This file is a script of its own, started by :mod:`eggroll.llm.rewards.sandbox` with ``python -P -S -s -B``; it imports
only the standard library. Its one argument is the number of a file descriptor that holds the settings as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import sys
import time
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x2000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 0x1, 442
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
CANDIDATE, STARTED = -1, -2
"""Numbers in the result file that are no tests: the candidate itself, and that everything was set up."""


class TooSlow(BaseException):
    """A single test ran out of its time. Not an ``Exception``, so that candidates rarely catch it."""


def main() -> NoReturn:
    """Read the settings, shut this process in, run."""
    with os.fdopen(int(sys.argv[1]), encoding="utf-8") as stream:
        settings: dict[str, Any] = json.load(stream)
    sys.argv[:] = ["solution.py"]
    if settings["drop_user"]:
        if sys.platform == "linux":
            _open_way_to_python(settings["folder"])
        _become_nobody()
    if settings["namespaces"]:
        _enter_namespaces(settings["folder"], settings["disk"])
        _continue_in_child()
    os.chdir(settings["folder"])
    _limit(settings)
    if sys.platform == "linux":
        _give_up_privileges()
    if not settings["namespaces"]:
        _block_sockets()
    os.write(settings["result"], json.dumps([settings["word"], STARTED, ""]).encode() + b"\n")
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


def _open_way_to_python(folder: str) -> None:
    """Lets other users read the standard library where root has it in a private home, and hides that home."""
    prefix = sys.base_prefix
    parts = prefix.strip("/").split("/")
    parents = ["/" + "/".join(parts[:count]) for count in range(1, len(parts))]
    private = next((parent for parent in parents if not os.stat(parent).st_mode & stat.S_IXOTH), None)
    if private is None:
        return
    libc = _libc()
    _check(libc.unshare(CLONE_NEWNS), "unshare")
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount --make-rprivate")
    _check(libc.mount(os.fsencode(prefix), os.fsencode(folder), None, MS_BIND, None), "mount --bind")
    _check(libc.mount(b"tmpfs", os.fsencode(private), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755"), "mount tmpfs")
    os.makedirs(prefix)
    _check(libc.mount(os.fsencode(folder), os.fsencode(prefix), None, MS_MOVE, None), "mount --move")


def _become_nobody() -> None:
    """Root is exempt from the limit on processes and may write everywhere; nobody is not."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    # a change of user makes /proc/self belong to root, but the user map is written there
    _libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def _enter_namespaces(folder: str, disk: int) -> None:
    """No network, no other process in sight, all files read-only but for a small file system in memory."""
    libc = _libc()
    uid, gid = os.getuid(), os.getgid()
    _check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as stream:
            stream.write(text)
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount --make-rprivate")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), size), "mount_setattr"
    )
    options = f"size={disk},nr_inodes=1024,mode=0700".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount tmpfs")


def _continue_in_child() -> None:
    """A process enters a new process namespace only by its children: the first is its init, whose end ends them all."""
    child = os.fork()
    if child == 0:
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _limit(settings: dict[str, Any]) -> None:
    """Hard limits of this process and its children. Soft equals hard: nothing can be raised or caught."""
    import resource  # not at the top: Windows has none, and the parent imports this file

    limits = {
        "RLIMIT_CPU": settings["cpu_seconds"],
        "RLIMIT_AS": settings["memory"],
        "RLIMIT_FSIZE": settings["file_size"],
        "RLIMIT_NPROC": settings["processes"],
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


def _block_sockets() -> None:
    """Where there is no network namespace: Python code that opens a connection gets an error. C code does not."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event.startswith("socket.") or event in ("ctypes.dlopen", "os.system", "subprocess.Popen", "os.exec"):
            raise PermissionError(f"{event} is not allowed in the sandbox")

    sys.addaudithook(hook)


def _run_program(code: str) -> None:
    """A whole program, which reads standard input and writes standard output."""
    exec(compile(code, "solution.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _run_tests(settings: dict[str, Any]) -> None:
    """The candidate once, then each test in the namespace it made; one line per test to the result file.

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
