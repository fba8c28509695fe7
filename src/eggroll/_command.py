"""How programs of this environment are typed in the shell that started this process."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAMES = ("eggroll", "eggroll.exe")


def typed(name: str = "eggroll") -> str:
    """A program as it has to be typed here: its name where the shell finds it so, else its path.

    An environment that is not activated (``make demo``, ``.venv/bin/eggroll``) has its programs beside its Python, and
    not on the path; or another environment's program of that name is there.

    Args:
        name: a program that the environment installs; ``eggroll`` works without being installed, too.
    """
    here = shutil.which(name, path=str(Path(sys.executable).parent))
    if here is None and name == "eggroll" and Path(sys.argv[0]).name in NAMES:  # pip install --user
        here = shutil.which(sys.argv[0])
    found = shutil.which(name)
    if here is None:
        if found or name != "eggroll":
            return name
        return f"{shlex.quote(_short(sys.executable))} -m eggroll.cli.main"
    if found and os.path.samefile(found, here):
        return name
    return shlex.quote(_short(here))


def _short(path: str) -> str:
    """A path from the current directory, if it is below it."""
    here = os.getcwd()
    below = here != os.path.dirname(here) and os.path.abspath(path).startswith(os.path.join(here, ""))
    return os.path.relpath(path) if below else path
