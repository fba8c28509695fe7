"""Loading a reward's file or module so that processes that the reward starts can import it, too.

``multiprocessing`` sends functions and objects by the name of their module, and a process that is spawned (the default
on macOS and Windows) imports it anew, with this process's ``sys.path``. The name of a reward file is not good enough
for that: another module may have it. So the module gets a name of its own, and a folder on ``sys.path`` has a file of
that name, which runs the reward file.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BRIDGE = '''"""Made by eggroll, so that processes that a reward starts can import its file."""
import sys

__file__ = {path!r}
sys.path.insert(0, {folder!r})
try:
    with open(__file__, "rb") as _file:
        exec(compile(_file.read(), __file__, "exec", dont_inherit=True))
finally:
    sys.path.remove({folder!r})
'''


def import_file(path: Path) -> ModuleType | None:
    """The module of a Python file, run anew; ``None`` if its name does not end with ``.py``.

    What it raises is raised.
    """
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=4).hexdigest()
    name = f"eggroll_reward_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return None
    folder = path.resolve().parent
    module = importlib.util.module_from_spec(spec)
    bridge = BRIDGE.format(path=str(path.resolve()), folder=str(folder))
    bridges = _bridges(os.getpid())
    (Path(bridges) / f"{name}.py").write_text(bridge, encoding="utf-8", errors="surrogateescape")
    _put_last(bridges)
    sys.modules[name] = module
    try:
        with _first_on_path(folder):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_module(name: str) -> ModuleType:
    """An installed module, or one in the current folder. What it raises is raised."""
    with _first_on_path(Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Lets a reward import what lies beside it, as a script can.

    Afterwards the folder is the last on the path: for what is imported later, here or in a process that is started.
    """
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        _put_last(entry)


def _put_last(entry: str) -> None:
    if entry not in sys.path:
        sys.path.append(entry)


@functools.cache
def _bridges(process: int) -> str:
    """The folder of this process for :data:`BRIDGE` files."""
    folder = tempfile.mkdtemp(prefix="eggroll-rewards-")
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: str, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
