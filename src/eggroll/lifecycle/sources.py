"""Digests of what a run reads besides its options: a user's programs, files and folders.

They are in ``config.json``; a resumed run must find the same again (:attr:`eggroll.lifecycle.Plan.fingerprints`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from eggroll.core.settings import may_change
from eggroll.lifecycle.trust import code_of

DIGITS = 16
"""Hexadecimal digits of a digest: enough to tell one file from another."""


def program_fingerprints(options: Any) -> dict[str, str]:
    """Digests of the sources of the programs that options name (a reward, an environment's module), by option.

    The source is the program's file with those that it imports from its own folder. A lambda is in the options.
    """
    found, free = {}, may_change(options)
    for name, value in code_of(options).items():
        file = _file_of(value) if isinstance(value, str) and name not in free else None
        if file is not None:
            found[f"{name}_source"] = file_digest(*sorted(_with_imports(file)))
    return found


def file_digest(*paths: Path) -> str:
    """Of the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:DIGITS]


def digest_of(parts: Iterable[bytes]) -> str:
    """Of pieces of bytes, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:DIGITS]


def _file_of(value: str) -> Path | None:
    """The file that ``score.py``, ``score.py:function`` or ``package.module:function`` means, if there is one."""
    if value.strip().startswith(("lambda", "{")):
        return None
    for text in (value.strip(), value.strip().rpartition(":")[0]):
        path = Path(text).expanduser()
        if text and path.suffix == ".py" and path.is_file():
            return path.resolve()
    module = value.partition(":")[0].rpartition("/")[2].strip()
    if ":" not in value or not all(part.isidentifier() for part in module.split(".")):
        return None
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    finally:
        sys.path.remove(str(Path.cwd()))
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return Path(found.origin).resolve()


def _with_imports(file: Path) -> set[Path]:
    """A Python file and those beside it that it imports, and so on."""
    found, new = set(), [file]
    while new:
        path = new.pop()
        if path not in found:
            found.add(path)
            new += [other for name in _imported(path) for other in _beside(path.parent, name)]
    return found


def _imported(file: Path) -> Iterator[str]:
    with suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                stem = f"{node.module}." if node.module else ""
                yield from (node.module or "", *(stem + alias.name for alias in node.names))


def _beside(folder: Path, name: str) -> Iterator[Path]:
    """The files of the module ``name`` in ``folder``, its packages' included."""
    place = folder
    for part in name.split(".") if name else ():
        place /= part
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                yield path.resolve()
