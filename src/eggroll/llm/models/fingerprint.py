"""What tells a model from one that was changed: a digest of its files, or the revision that the hub has."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eggroll._optional import require
from eggroll.lifecycle.sources import digest_of, file_digest
from eggroll.llm.models.locate import locate

NOTES = (".md", ".png", ".jpg", ".gif")
"""Endings of files that do not change a model."""


def model_fingerprint(source: str, revision: str | None = None) -> str | None:
    """The digest of a directory's (or a file's) contents, frozen weights included; of a hub id its revision.

    Reading takes about a second for 2 GB.

    Args:
        source, revision: as for :func:`eggroll.llm.load`.

    Returns:
        ``None`` for a hub id that is not in this machine's cache.

    Raises:
        ModelError: there is no such directory or file.
    """
    located = locate(source, revision=revision)
    path = Path(located.path)
    if located.gguf is not None:
        return _digest([path / located.gguf])
    if located.pth:
        return _digest([path])
    if path.is_dir():
        entries = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
        return _digest(entry for entry in entries if _counts(entry))
    hub = require("huggingface_hub", extra="llm")
    cached = hub.try_to_load_from_cache(located.path, "config.json", revision=revision)
    return f"revision {Path(cached).parent.name}" if isinstance(cached, str) else None


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in NOTES


def _digest(files: Iterable[Path]) -> str:
    with ThreadPoolExecutor(4) as threads:  # hashing runs beside Python
        return digest_of(digest.encode() for digest in threads.map(file_digest, sorted(files)))
