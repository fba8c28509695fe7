"""Bytes to learn from: memory-mapped streams in which a 0 begins a document.

A stream is a ``.txt`` file (any file of bytes, one document), a ``.npy`` of bytes, a folder of ``.txt`` files, a folder
with ``train`` and ``validation`` of either, or a text data set of the hub, which is written to the cache once.
Without a validation part the last tenth is held out.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll._environment import cache_directory
from eggroll._optional import require
from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.errors import DataError

BOUNDARY = 0
"""The byte before every document, at which the hidden state is reset."""
HUB_ALIASES = {"minipile": "JeanKaddour/minipile", "tinystories": "roneneldan/TinyStories"}
VALIDATION_SHARE = 10
"""One part in this many, the last, is held out if the data have no validation part."""
WINDOWS_NAME = "pretrain/windows"
CACHED = "pretrain"
"""The folder of the cache that holds joined streams."""
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "test")}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes.

    Attributes:
        name: as it was asked for.
        train: ``(n,)`` uint8, memory-mapped.
        validation: ``(m,)`` uint8, memory-mapped.
    """

    name: str
    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]

    def fingerprint(self) -> str:
        """A hash of the sizes and of the first and last 64 KiB, which every run has kept."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part[: 1 << 16].tobytes() + part[-(1 << 16) :].tobytes())
        return digest.hexdigest()

    def contents(self) -> str:
        """A hash of everything; a second for 2 GB."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part.data)
        return digest.hexdigest()[:16]

    def check(self, length: int) -> None:
        """Check that both parts have at least one window.

        Raises:
            DataError: a part is shorter than ``length`` bytes.
        """
        for part, stream in (("training", self.train), ("validation", self.validation)):
            if len(stream) < length:
                raise DataError(
                    f"the {part} part of {self.name} has {len(stream)} bytes, fewer than one window of {length} "
                    "(context + tokens + 1); use smaller --context and --tokens, or more text"
                )


def load_corpus(source: str, *, text_column: str = "text") -> Corpus:
    """The bytes that ``source`` names.

    Args:
        source: a ``.npy`` file of bytes, any other file (read as it is), a folder, or a hub id (``name`` or
            ``name:config``; ``minipile`` is JeanKaddour/minipile). A folder with ``train.npy`` (or ``.txt``) and
            ``validation.npy`` has its parts in them; otherwise its ``.txt`` files, sorted, are documents.
        text_column: of a hub data set.

    Raises:
        DataError: there is no such thing, it is empty, or it is not bytes.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(source, path)
    if path.is_file():
        return _halves(source, _stream(path))
    if path.suffix in (".txt", ".npy") or source.startswith((".", "/", "~")):
        raise DataError(
            f"data {source!r}: there is no such file or folder (looked in {Path.cwd()}). --data takes a .txt, a .npy "
            f"of bytes, a folder of them, or a text data set of the hub, such as {', '.join(HUB_ALIASES)}"
        )
    return load_hub(source, text_column=text_column)


def load_hub(source: str, *, text_column: str = "text") -> Corpus:
    """A text data set of the Hugging Face hub, from the cache if it was loaded before.

    Args:
        source: ``name`` or ``name:config``.
        text_column: which column holds the documents.

    Raises:
        DataError: it cannot be loaded.
        MissingExtraError: ``datasets`` is not installed.
    """
    name, _, config = source.partition(":")
    folder = (
        cache_directory()
        / CACHED
        / ("hub-" + hashlib.blake2b(f"{source}:{text_column}".encode(), digest_size=8).hexdigest())
    )
    parts: dict[str, NDArray[np.uint8]] = {}
    for part in _SPLITS:
        if (folder / f"{part}.npy").exists():
            parts[part] = _stream(folder / f"{part}.npy")
    if "train" not in parts:
        datasets: Any = require("datasets", extra="llm")
        try:
            found = datasets.load_dataset(HUB_ALIASES.get(name, name), config or None)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"data {source!r} is neither a file or folder here nor could it be loaded from the Hugging Face hub: "
                f"{first}. Without a network, give a .txt file, a folder of them, or a .npy of bytes"
            ) from error
        for part, splits in _SPLITS.items():
            split = next((found[key] for key in splits if key in found), None)
            if split is not None:
                parts[part] = write_stream(folder / f"{part}.npy", _documents(source, split, text_column))
    if "train" not in parts:
        raise DataError(f"data {source!r} has no split 'train'")
    if not all(stream.size for stream in parts.values()):
        raise DataError(f"data {source!r}: column {text_column!r} has no text in one of its splits")
    return Corpus(source, parts["train"], parts["validation"]) if len(parts) == 2 else _halves(source, parts["train"])


def _documents(source: str, split: Any, text_column: str) -> Iterator[bytes]:
    """The texts of a split as bytes, without what has none."""
    for row in split:
        if text_column not in row:
            raise DataError(
                f"data {source!r} has no column {text_column!r}; its columns are {', '.join(row)} "
                "(choose with --text_column)"
            )
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"data {source!r}: column {text_column!r} holds {type(text).__name__}, not text")
        yield (text or "").encode(errors="replace")


def write_stream(path: Path, documents: Iterable[bytes]) -> NDArray[np.uint8]:
    """Write documents as one ``.npy`` of bytes, a 0 before each, atomically; returns it memory-mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            header = np.lib.format.header_data_from_array_1_0(np.zeros(0, np.uint8))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (10**15,)})  # room for the real length
            start, size = file.tell(), 0
            for document in documents:
                if document:
                    size += file.write(b"\0" + document)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (size,)})
            if file.tell() != start:  # the format leaves room for a shape to grow, so this does not happen
                raise DataError(f"{path} could not be written: its header has changed its size")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return _stream(path)


def window_starts(
    stream: NDArray[np.uint8], count: int, length: int, *, seed: int, generation: int, first: int = 0
) -> NDArray[np.int64]:
    """Where the windows of a generation begin: ``(count,)``, hashed from ``(seed, generation, number)``.

    Args:
        stream: to take windows of.
        count: windows.
        length: of a window.
        seed: of the run.
        generation: which.
        first: number of the first window.
    """
    key = threefry.fold_in(parameter_key(seed, WINDOWS_NAME), generation)
    numbers = np.arange(first, first + count, dtype=np.uint32)
    hi, lo = threefry.threefry2x32(key, np.zeros(count, np.uint32), numbers)
    places = len(stream) - length + 1
    if places < 2**32:
        return ((hi.astype(np.uint64) * np.uint64(places)) >> np.uint64(32)).astype(np.int64)
    words = (hi.astype(np.uint64) << np.uint64(32)) | lo
    return (words % np.uint64(places)).astype(np.int64)


def windows(stream: NDArray[np.uint8], starts: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    """``(len(starts), length)`` bytes."""
    made = np.empty((len(starts), length), np.uint8)
    for row, start in zip(made, starts, strict=True):
        row[:] = stream[start : start + length]
    return made


def _stream(path: Path) -> NDArray[np.uint8]:
    """One file as a memory-mapped stream."""
    try:
        if path.suffix != ".npy":
            if path.stat().st_size == 0:
                raise DataError(f"data {path} is empty")
            return np.memmap(path, np.uint8, "r")
        stream = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data {path} cannot be read: {error}") from error
    if not isinstance(stream, np.ndarray):
        raise DataError(f"data {path} holds several arrays (.npz); save the one of bytes with numpy.save")
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise DataError(f"data {path} must hold bytes: one dimension, uint8; it holds {stream.dtype} {stream.shape}")
    if stream.size == 0:
        raise DataError(f"data {path} is empty")
    if stream.dtype != np.uint8:
        low, high = int(stream.min()), int(stream.max())
        if low < 0 or high > 255:
            raise DataError(
                f"data {path} holds tokens from {low} to {high}; the vocabulary is that of bytes, 0 to 255. "
                "Give the text itself"
            )
        return np.asarray(stream, np.uint8)
    return stream


def _halves(name: str, stream: NDArray[np.uint8]) -> Corpus:
    cut = len(stream) - len(stream) // VALIDATION_SHARE
    return Corpus(name, stream[:cut], stream[cut:])


def _folder(name: str, path: Path) -> Corpus:
    parts = {}
    for part, names in _SPLITS.items():
        for candidate in (path / f"{split}{suffix}" for split in names for suffix in (".npy", ".txt")):
            if candidate.is_file() and part not in parts:
                parts[part] = _stream(candidate)
    if "train" in parts:
        if "validation" in parts:
            return Corpus(name, parts["train"], parts["validation"])
        return _halves(name, parts["train"])
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if files and not any(file.stat().st_size for file in files):
        raise DataError(f"data {name!r}: all {len(files)} .txt files of the folder are empty")
    if not files:
        raise DataError(f"data {name!r}: the folder has neither train.npy nor train.txt nor any .txt file")
    facts = repr([(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    digest = hashlib.blake2b(f"{path.resolve()}{facts}".encode(), digest_size=8).hexdigest()
    cached = cache_directory() / CACHED / f"folder-{digest}.npy"
    stream = _stream(cached) if cached.exists() else write_stream(cached, (file.read_bytes() for file in files))
    return _halves(name, stream)
