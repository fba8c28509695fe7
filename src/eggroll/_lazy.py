"""Public names of a package that are loaded when they are first used, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from eggroll.errors import MissingExtraError


def lazy(
    package: str, homes: Mapping[str, str], *, extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        homes: each public name and the module that defines it.
        extra: what to install where a library is missing.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            if extra is None or error.name is None or error.name.split(".")[0] == "eggroll":
                raise
            raise MissingExtraError(
                f"{package}.{name} needs '{error.name}', which is not installed. "
                f"Install it with: pip install 'eggroll-es[{extra}]'"
            ) from error
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return get, names
