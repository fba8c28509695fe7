"""Checkpoints: one directory each, tensors in safetensors, everything else in a JSON manifest; nothing is pickled.

    checkpoints/generation-000010/tensors-1f3c….safetensors     named after its SHA-256
                                  manifest.json                 written last: without it the checkpoint does not exist

The manifest names the tensor file, its size and its SHA-256. It is written by an atomic rename after the tensors are
on disk, so a crash at any moment leaves this checkpoint or the one before it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eggroll._optional import require
from eggroll.core.reading import OBJECT, TEXT, WHOLE, Kind, check_fields, parse
from eggroll.core.threefry import NOISE_VERSION
from eggroll.errors import CheckpointError, RunWriteError
from eggroll.run.files import (
    check_plain,
    check_tree,
    describe,
    explained,
    fsync_directory,
    fsync_file,
    open_plain,
    read_plain,
    write_atomic,
)
from eggroll.run.metrics import to_json
from eggroll.run.provenance import utc_now

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"generation-(\d+)")
_FILE = re.compile(r"tensors-[0-9a-f]+\.safetensors")
_HEADER = {
    "format": WHOLE, "generation": WHOLE, "noise_version": WHOLE, "run_id": TEXT, "tensors": OBJECT, "state": OBJECT,
}  # fmt: skip
_TENSORS = {
    "file": Kind("the name of a tensor file", lambda value: isinstance(value, str) and bool(_FILE.fullmatch(value))),
    "bytes": WHOLE,
    "sha256": TEXT,
}
_FRAMEWORK = Kind("'pt' or 'numpy'", lambda value: value in ("pt", "numpy"))


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is damaged and an earlier one is used."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after ``generation`` updates."""

    path: Path
    generation: int
    manifest: dict[str, Any] = field(repr=False)
    """What was given to :meth:`RunDir.save_checkpoint`, as JSON values."""
    tensors: dict[str, Any] = field(repr=False)
    """The tensor file: its ``file`` name, ``bytes`` and ``sha256``."""
    log: str | None = None
    """The checksum of the run's log after ``generation`` records; ``None`` if it is not known."""

    def damage(self) -> str | None:
        """What is wrong with the tensor file, or ``None``: its size and SHA-256 are compared with the manifest's."""
        return self._wrong_size() or self._wrong_hash()

    def _wrong_size(self) -> str | None:
        check_plain(self.path / self.tensors["file"])
        try:
            size = (self.path / self.tensors["file"]).stat().st_size
        except OSError as error:
            return f"{self.tensors['file']} cannot be read ({error.strerror})"
        if size != self.tensors["bytes"]:
            what = "is truncated" if size < self.tensors["bytes"] else "is too long"
            return f"{self.tensors['file']} {what}: {size} of {self.tensors['bytes']} bytes"
        return None

    def _wrong_hash(self) -> str | None:
        if _sha256(self.path / self.tensors["file"]) != self.tensors["sha256"]:
            return f"{self.tensors['file']} was changed after it was written: its SHA-256 is not that of the manifest"
        return None

    def load(self) -> dict[str, Any]:
        """The tensors, on the CPU, bit for bit as they were saved; NumPy arrays if that is what was saved.

        Raises:
            CheckpointError: the file is missing, truncated or changed.
        """
        damage = self.damage()
        if damage is not None:
            raise CheckpointError(
                f"the checkpoint {self.path} cannot be used: {damage}. "
                "Remove its directory to continue from the one before"
            )
        module = "safetensors.numpy" if self.tensors.get("framework") == "numpy" else "safetensors.torch"
        return require(module, extra="torch").load_file(self.path / self.tensors["file"])


def save(
    directory: Path,
    generation: int,
    tensors: Mapping[str, torch.Tensor] | Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
    *,
    run_id: str,
    keep: int,
    log: str | None = None,
    also: Collection[int] = (),
) -> Path:
    """Write the checkpoint of ``generation`` into ``directory``; only the newest ``keep`` and those of ``also`` stay.

    Returns:
        The checkpoint's own directory.

    Raises:
        RunWriteError: it cannot be written; the checkpoints from before are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep (={keep}) must be at least 1: a run without a checkpoint cannot be continued")
    path = directory / _name(generation)
    check_plain(directory, directory=True)
    check_tree(path)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            saved = _write_tensors(path, tensors)
            header = {
                "format": FORMAT,
                "generation": generation,
                "noise_version": NOISE_VERSION,
                "run_id": run_id,
                "created_utc": utc_now(),
                "tensors": saved,
                "log": log,
                "state": dict(manifest),
            }
            header = json.loads(to_json(header))
            write_atomic(path / MANIFEST, json.dumps({**header, "check": checksum(header)}, indent=1).encode())
        except BaseException:
            _undo(path)
            raise
        fsync_directory(directory)
        fsync_directory(directory.parent)
        _remove_others(path, saved["file"])
        _prune(directory, generation, keep, also)
    return path


def _name(generation: int) -> str:
    return f"generation-{generation:06d}"


def _write_tensors(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    framework = "numpy" if all(isinstance(value, np.ndarray) for value in tensors.values()) else "pt"
    safetensors = require("safetensors.numpy" if framework == "numpy" else "safetensors.torch", extra="torch")
    separate = dict(tensors) if framework == "numpy" else _separate(tensors)
    temporary = path / ".tensors.part"
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.close(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        mode = temporary.stat().st_mode
        try:
            safetensors.save_file(separate, temporary, metadata={"format": framework})
        except Exception as error:
            # safetensors reports a failed write as an error of its own, with the system's number in the text
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            cause = OSError(int(number[1]), os.strerror(int(number[1])))
            raise RunWriteError(describe(path, cause)) from error
        temporary.chmod(mode)  # safetensors makes its file private whatever the umask says
        fsync_file(temporary)
        digest = _sha256(temporary)
        final = path / f"tensors-{digest[:16]}.safetensors"
        os.replace(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path)
    return {
        "file": final.name, "bytes": final.stat().st_size, "sha256": digest, "count": len(tensors),
        "framework": framework,
    }  # fmt: skip


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous and each in memory of its own, as safetensors wants them."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def checksum(values: Mapping[str, Any]) -> str:
    """Of JSON values, however they are written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, *, run_id: str | None = None) -> Checkpoint:
    """The checkpoint in the directory ``path``, without its tensors.

    Args:
        path: the checkpoint's own directory.
        run_id: the run that it must belong to; ``None`` takes any.

    Raises:
        CheckpointError: the manifest is missing or damaged, of another run, or of another version.
        RunError: it is a link.
    """
    check_plain(path, directory=True)
    try:
        header = check_fields(parse(read_plain(path / MANIFEST)), _HEADER, {"log": TEXT.or_null(), "check": TEXT})
        check = header.pop("check", None)
        if check is not None and check != checksum(header):
            raise ValueError("it was changed after the run wrote it: its contents are not what its checksum says")
        tensors = check_fields(header["tensors"], _TENSORS, {"framework": _FRAMEWORK})
        name = _NAME.fullmatch(path.name)
        if name is not None and int(name[1]) != header["generation"]:
            raise ValueError(f"it is of generation {header['generation']}, unlike its directory")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} is missing or damaged ({error})") from error
    checkpoint = Checkpoint(path, header["generation"], header["state"], tensors, header.get("log"))
    version, noise, owner = header["format"], header["noise_version"], header["run_id"]
    if version != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {version}; this eggroll reads format {FORMAT}")
    if noise != NOISE_VERSION:
        raise CheckpointError(
            f"{path} was written with version {noise} of the noise specification, this eggroll draws version "
            f"{NOISE_VERSION}: the run would not continue the same. Use the eggroll that wrote it (environment.json)"
        )
    if run_id is not None and owner != run_id:
        raise CheckpointError(f"{path} belongs to another run (run_id {owner}, not {run_id}); move it away to go on")
    return checkpoint


def found(directory: Path) -> list[tuple[int, Path]]:
    """Generation and directory of all checkpoints that were completed, oldest first, damaged ones included.

    Raises:
        RunError: a directory or a manifest is a link.
    """
    return sorted((generation, path) for generation, path in _begun(directory) if check_plain(path / MANIFEST))


def _begun(directory: Path) -> list[tuple[int, Path]]:
    """The same with those that have no manifest, in any order."""
    if not check_plain(directory, directory=True):
        return []
    begun = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    for _, path in begun:
        check_plain(path, directory=True)
    return begun


def latest(directory: Path, *, run_id: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or ``None`` if there never was one. A damaged one is skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none can be used; the message says why for each.
    """
    problems: list[str] = []
    for _, path in reversed(found(directory)):
        try:
            checkpoint = read(path, run_id=run_id)
            damage = checkpoint.damage()
        except CheckpointError as error:
            damage = str(error)
        if damage is None:
            if problems:
                text = "\n".join(f"  - {problem}" for problem in problems)
                warnings.warn(
                    f"damaged checkpoints are skipped, the one of generation {checkpoint.generation} is used "
                    f"instead:\n{text}",
                    DamagedCheckpointWarning,
                    stacklevel=3,
                )
            return checkpoint
        problems.append(f"{path.name}: {damage}")
    if problems:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(
            f"none of the checkpoints in {directory} can be used:\n{text}\n"
            f"Nothing is lost: move {directory} away, and --resume rebuilds the weights from the base model and "
            "updates.jsonl"
        )
    return None


def exists(directory: Path, generation: int, *, run_id: str | None = None) -> bool:
    """Whether the checkpoint of ``generation`` is there and has its full size; its tensors are not read."""
    check_plain(directory, directory=True)
    try:
        return read(directory / _name(generation), run_id=run_id)._wrong_size() is None
    except CheckpointError:
        return False


def remove_after(directory: Path, generation: int) -> None:
    """Remove all checkpoints of generations after ``generation``."""
    for later, path in found(directory):
        if later > generation:
            _remove(path)


def _prune(directory: Path, generation: int, keep: int, also: Collection[int]) -> None:
    """Keep the newest ``keep`` whole checkpoints up to ``generation``, and those of ``also``.

    A damaged one does not count and is removed.
    """
    intact = 0
    completed = found(directory)
    for other, path in reversed(completed):
        if other > generation:
            continue
        try:
            whole = read(path)._wrong_size() is None
        except CheckpointError:
            whole = False
        if whole and intact < keep:
            intact += 1
        elif not (whole and other in also):
            _remove(path)
    for _, path in _begun(directory):
        if not check_plain(path / MANIFEST):
            shutil.rmtree(path)  # the rest of a checkpoint whose writing or removal was killed


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink()  # first, so that a crash in the middle leaves no checkpoint that looks whole
    shutil.rmtree(path)


def _undo(path: Path) -> None:
    """After a failed save: leave what the manifest of an earlier save of the same generation names, or nothing."""
    with suppress(OSError, CheckpointError):
        if (path / MANIFEST).exists():
            _remove_others(path, read(path).tensors["file"])
        else:
            shutil.rmtree(path)


def _remove_others(path: Path, tensor_file: str) -> None:
    for other in path.iterdir():
        if other.name not in (MANIFEST, tensor_file):
            other.unlink()
