"""Ways to shut a run of model-written code in, from strong to weak: bubblewrap, namespaces of our own, limits alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eggroll.llm.rewards.sandbox_watch import can_watch

SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Folders at the top that bubblewrap shows; often links into ``/usr``, which it shows, too."""
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/nix/store", "/gnu/store")
"""What else interpreters need, where it is there."""

DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True)
class Isolation:
    """What this machine offers beyond limits."""

    namespaces: bool
    """Own network, processes and files, enforced by the kernel."""
    drop_user: bool
    """Root becomes nobody."""
    bubblewrap: str | None = None
    """The ``bwrap`` program that makes the namespaces; without it, they are made here."""
    group: str | None = None
    """A cgroup in which each run gets one of its own, with limits on memory and processes together."""

    def describe(self) -> str:
        """One line for people: which protections are in force, and which are not."""
        user = "as nobody" if self.drop_user else "as root" if os.geteuid() == 0 else "as the same user"
        if self.namespaces:
            by = "bubblewrap" if self.bubblewrap else "namespaces"
            total = "total memory by cgroup" if self.group else "total memory watched"
            if not self.group and not can_watch():
                total = "memory limited for each process only"
            return (
                f"sandbox ({by}): no network, no sockets on disk, no other processes, no files but the system's and "
                f"Python's (read-only), {user}, {total}"
            )
        alone = "no child processes or threads" if self.single else "child processes only blocked in Python"
        advice = "; install bubblewrap for more" if sys.platform == "linux" else ""
        return (
            f"sandbox (limits only): Python-level network block only, {alone}, {user}: code can read and delete "
            f"what that user can, and see all processes{advice}"
        )

    @property
    def single(self) -> bool:
        """A run is one process with one thread: the kernel refuses it any more. It makes an exception for root."""
        return not self.namespaces and (self.drop_user or os.geteuid() != 0)


def choices(group: str | None) -> Iterator[Isolation]:
    """The ways that may work here, the strongest first."""
    root, linux = os.geteuid() == 0, sys.platform == "linux"
    users = (True, False) if root else (False,)
    bubblewrap = shutil.which("bwrap")
    for place in (group, None) if group else (None,):
        for drop_user in users:
            if linux and bubblewrap:
                yield Isolation(True, drop_user, bubblewrap, place)
            if linux:
                yield Isolation(True, drop_user, None, place)
    for drop_user in users:
        yield Isolation(False, drop_user)


def command(how: Isolation, child: Path, options: list[str]) -> list[str]:
    """The command that starts the child; one argument, the number of the file with its settings, is still to come."""
    if how.bubblewrap is None:
        return [sys.executable, *options, str(child)]
    # Root makes the namespaces as root and becomes nobody inside: nobody may have no way to Python in root's home.
    # So there is no user namespace then; the child makes one of its own, in either case.
    wrap = [how.bubblewrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--die-with-parent"]
    wrap += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if how.drop_user:
        wrap += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        wrap += ["--unshare-user"]
    wrap += ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            wrap += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            wrap += ["--ro-bind", str(path), str(path)]
    python = getattr(sys, "_base_executable", None) or sys.executable
    places = {*SYSTEM_FILES, sys.base_prefix, sys.base_exec_prefix, os.path.realpath(python)}
    for place in sorted(places):  # a folder comes before what is in it
        if os.path.exists(place) and not place.startswith(("/usr/", "/bin/")) and place != "/usr":
            for parent in list(Path(place).parents)[-2::-1]:  # those that bubblewrap makes are root's alone
                wrap += ["--perms", "0755", "--dir", str(parent)]
            wrap += ["--ro-bind", place, place]
    inside = f"/{child.name}"
    wrap += ["--ro-bind", str(child), inside, "--proc", "/proc"]
    # not --dev: its terminals need a second user namespace, in which the child could not mount
    for name in DEVICES:
        wrap += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    wrap += ["--symlink", "/proc/self/fd", "/dev/fd"]
    wrap += ["--dir", "/tmp", "--remount-ro", "/"]  # the child mounts its own small file system there
    return [*wrap, "--", python, *options, inside]
