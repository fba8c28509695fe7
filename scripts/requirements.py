"""Print what an extra of pyproject.toml requires, without eggroll itself: python scripts/requirements.py llm,ray

The Dockerfile installs this before it copies the source, so that a changed source does not install the libraries again.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str]) -> list[str]:
    """Requirements of the project and of its ``extras``, those that extras name in turn included, each once.

    Raises:
        SystemExit: there is no such extra; the message lists those there are.
    """
    optional, found, seen = project["optional-dependencies"], list(project["dependencies"]), set()
    waiting = list(extras)
    while waiting:
        extra = waiting.pop(0)
        if extra not in optional:
            raise SystemExit(f"there is no extra {extra!r}; there are {', '.join(sorted(optional))}")
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in optional[extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[([^]]+)\]", requirement)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(requirement)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    file = next(folder / "pyproject.toml" for folder in (here, here.parent) if (folder / "pyproject.toml").exists())
    given = [extra for argument in sys.argv[1:] for extra in argument.split(",") if extra]
    print("\n".join(requirements(tomllib.loads(file.read_text(encoding="utf-8"))["project"], given)))
