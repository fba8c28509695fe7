"""Optional dependencies: their import, and the line that installs them."""

from __future__ import annotations

import importlib
import logging
import shlex
from pathlib import Path
from types import ModuleType

from eggroll._command import typed
from eggroll.errors import MissingExtraError

DISTRIBUTION = "eggroll-evolve"
"""The name on the package index; the import name and the command are ``eggroll``."""
FOREIGN = "eggroll-es"
"""Another project's distribution, which has the same import name and the same command."""

_OF_NO_CONCERN = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "inputs will be cast from",
}
"""What libraries of quantized weights log about kernels that another machine would have: logger and words."""


def _hush() -> None:
    """Leave out those lines, and no others; transformers imports these libraries wherever they are installed."""
    for name, words in _OF_NO_CONCERN.items():
        logger = logging.getLogger(name)
        if not any(getattr(kept, "words", None) == words for kept in logger.filters):
            logger.addFilter(_Without(words))


class _Without(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


def install_line(extra: str) -> str:
    """The command that installs an extra where this copy of eggroll came from: a checkout, a wheel or an index."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "constraints.txt").is_file():
        here = checkout == Path.cwd()
        constraints = "constraints.txt" if here else str(checkout / "constraints.txt")
        target = "." if here else str(checkout)
        return f"{typed('pip')} install -c {shlex.quote(constraints)} -e {shlex.quote(f'{target}[{extra}]')}"
    wheel = _origin(DISTRIBUTION)
    return f"{typed('pip')} install {shlex.quote(f'{wheel or DISTRIBUTION}[{extra}]')}"


def missing(what: str, extra: str) -> MissingExtraError:
    """The error about something that an extra installs.

    Args:
        what: a sentence without its full stop: what is missing.
        extra: the extra.
    """
    text = f"{what}. Install it with: {install_line(extra)}"
    return MissingExtraError(f"{text}. {foreign}" if (foreign := foreign_package()) else text)


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return ``module``, or say how the extra that has it is installed.

    Raises:
        MissingExtraError: the module (or one that it needs) is not installed.
    """
    _hush()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(f"'{module}' is needed here and could not be imported ({error})", extra) from error


def foreign_package() -> str:
    """A sentence if the other project's package is installed beside this one; empty otherwise."""
    from importlib import metadata

    try:
        version = metadata.version(FOREIGN)
    except metadata.PackageNotFoundError:
        return ""
    if _origin(FOREIGN) is not None:  # a checkout of this project, from before it had its own name
        return ""
    return (
        f"The package {FOREIGN} {version}, which is installed here, belongs to another project with the same import "
        f"name: remove it with {typed('pip')} uninstall {FOREIGN}, then install eggroll again"
    )


def _origin(distribution: str) -> str | None:
    """The local file or folder that a distribution was installed from; ``None`` for one from an index, or none."""
    import json
    from importlib import metadata
    from urllib.parse import unquote, urlparse

    try:
        about = metadata.distribution(distribution).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = urlparse(str(json.loads(about).get("url", ""))) if about else None
    return unquote(url.path) if url is not None and url.scheme == "file" else None
