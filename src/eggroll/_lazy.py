"""Public names of a package that are imported on first use, so that importing the package itself costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from eggroll._optional import missing


def attach(
    package: str, homes: Mapping[str, str], *, extra: str, eager: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package's ``__init__`` needs to offer names that live in its modules, in the way of ``lazy_loader``.

        >>> __getattr__, __dir__, __all__ = attach(__name__, {"Population": "eggroll.torch.population"}, extra="torch")

    Type checkers do not see through this: repeat the imports under ``if TYPE_CHECKING:``.

    Args:
        package: the package's ``__name__``.
        homes: public name to the module that defines it.
        extra: the extra of this distribution that installs what those modules need, for the error message.
        eager: public names that the package defines itself.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` of the package.
    """
    names = sorted({*homes, *eager})

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "eggroll":
                raise
            raise missing(f"{package}.{name} needs '{error.name}', which is not installed", extra) from error
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    return load, lambda: list(names), names
