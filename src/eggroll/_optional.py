"""Import of optional dependencies, with the pip line in the error."""

from __future__ import annotations

import importlib
from types import ModuleType

from eggroll.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return ``module``, or say which extra of eggroll-es installs it.

    Raises:
        MissingExtraError: the module (or one that it needs) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"'{module}' is needed here and could not be imported ({error}). "
            f"Install it with: pip install 'eggroll-es[{extra}]'"
        ) from error
