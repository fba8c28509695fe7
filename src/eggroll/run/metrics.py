"""JSON lines that survive crashes, and the table of what is measured in a run.

A line is appended with one write and one fsync. A crash can therefore tear only the last line; readers leave a torn
last line out, and the next append removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll.core.reading import NUMBER, Kind, check_fields, parse
from eggroll.errors import RunError
from eggroll.run.files import explained, fsync_directory, open_plain, read_plain, write_all, write_atomic


@dataclass(frozen=True)
class Metric:
    """How a key of ``metrics.jsonl`` is called for people: its group and name in trackers, and its axis label."""

    group: str
    name: str
    label: str


METRICS: dict[str, Metric] = {
    "fitness_mean": Metric("fitness", "mean", "fitness, mean of the population"),
    "fitness_max": Metric("fitness", "max", "fitness, best member"),
    "fitness_min": Metric("fitness", "min", "fitness, worst member"),
    "fitness_std": Metric("fitness", "std", "fitness, standard deviation"),
    "split_half": Metric("signal", "split_half", "split-half reliability of members' scores"),
    "member_spread": Metric("signal", "member_spread", "spread between members without the noise between prompts"),
    "prompt_noise": Metric("signal", "prompt_noise", "noise of a member's score on one prompt"),
    "invalid_scores": Metric("fitness", "invalid_scores", "members whose score was NaN or infinite"),
    "scores": Metric("fitness", "scores", "scores of a generation"),
    "heldout_reward": Metric("reward", "heldout", "reward on held-out prompts"),
    "sigma": Metric("update", "sigma", "sigma"),
    "lr": Metric("update", "lr", "learning rate"),
    "update_norm": Metric("update", "norm", "norm of the update"),
    "update_cosine": Metric("update", "cosine", "cosine of an update and the one before"),
    "members_per_s": Metric("speed", "members_per_s", "members per second"),
    "tokens_per_s": Metric("speed", "tokens_per_s", "tokens per second"),
    "memory_bytes": Metric("memory", "bytes", "memory of the process, bytes"),
    "gpu_memory_bytes": Metric("memory", "gpu_bytes", "memory on the GPU at most, bytes"),
    "draw_s": Metric("time", "draw_s", "drawing noise, seconds"),
    "evaluate_s": Metric("time", "evaluate_s", "evaluating members, seconds"),
    "update_s": Metric("time", "update_s", "updating, seconds"),
    "elapsed_s": Metric("time", "elapsed_s", "since the start, seconds"),
}
"""The keys that every kind of training writes. Units are part of a key: ``_s`` seconds, ``_per_s`` per second."""
MEASURED = dict.fromkeys(METRICS, NUMBER.or_null())
"""Of what kind they are in a line that is read."""


def to_json(values: Mapping[str, Any]) -> str:
    """``values`` as one line of strict JSON. NaN and infinities, which JSON does not have, become ``null``.

    Text stays readable (not ASCII-escaped). NumPy and torch scalars become numbers.
    """
    line = json.dumps(_plain(values), ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate: valid in a str and, escaped, in JSON, but not in UTF-8
        line = json.dumps(_plain(values), allow_nan=False)
    return line


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise RunError(f"{value!r} of type {type(value).__name__} cannot be written as JSON; use numbers, text or lists")


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Reading never changes the file, so a run can be looked at while it goes on.

    Args:
        path: the file.
        required, optional: of what kind entries of a line must be; see :func:`eggroll.core.reading.check_fields`.
    """

    def __init__(
        self, path: Path, required: Mapping[str, Kind] | None = None, optional: Mapping[str, Kind] | None = None
    ) -> None:
        self.path = path
        self._required, self._optional = required, optional
        self._size: int | None = None  # after our last append; another size means another writer

    def append(self, *lines: str) -> None:
        """Append ``lines`` (JSON without line ends) with one write and one fsync: all of them, or on an error none.

        Raises:
            RunWriteError: the disk is full, or the file cannot be written; it is as it was before.
            RunError: another process has written to the file since our last append.
        """
        if not lines:
            return
        data = "".join(line + "\n" for line in lines).encode()
        with explained(self.path):
            descriptor = open_plain(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                size = self._size_for_append(descriptor)
                try:
                    write_all(descriptor, data)
                    os.fsync(descriptor)
                except BaseException:
                    self._size = None
                    with suppress(OSError):
                        os.ftruncate(descriptor, size)
                    raise
                self._size = size + len(data)
            finally:
                os.close(descriptor)
            if size == 0:
                fsync_directory(self.path.parent)

    def _size_for_append(self, descriptor: int) -> int:
        size = os.fstat(descriptor).st_size
        if self._size is None:
            return self._mend(descriptor, size)
        if size != self._size:
            raise RunError(
                f"{self.path} was changed by another process (expected {self._size} bytes, found {size}). "
                "Only one process may continue a run: stop the other one, then continue with --resume"
            )
        return size

    def _mend(self, descriptor: int, size: int) -> int:
        """End the file with a whole line again: a last line that a crash has torn is removed."""
        data = read_plain(self.path) if size else b""
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return size
        if _is_object(tail):  # only the line end is missing
            write_all(descriptor, b"\n")
            return size + 1
        os.ftruncate(descriptor, size - len(tail))
        return size - len(tail)

    def lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Every line, as written and parsed; a torn last line is left out, a missing file is empty.

        Raises:
            RunError: a line is not a JSON object, or its entries are not of the right kind.
        """
        try:
            data = read_plain(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}") from error
        found = []
        pieces = data.split(b"\n")
        for number, piece in enumerate(pieces, start=1):
            if not piece.strip():
                continue
            try:
                found.append((piece, check_fields(parse(piece), self._required, self._optional)))
            except ValueError as error:
                if number == len(pieces):  # without a line end: torn by a crash
                    break
                what = f": {error}" if _is_object(piece) else f" is not a JSON object: {_start(piece)}"
                raise RunError(
                    f"{self.path}, line {number}{what}. "
                    "The file was changed or damaged after it was written; remove that line to go on without it"
                ) from None
        return found

    def read(self) -> list[dict[str, Any]]:
        """Every line, parsed; see :meth:`lines`."""
        return [values for _, values in self.lines()]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop, atomically, the lines that are not ``wanted``; the others stay byte for byte. Returns how many went."""
        lines = self.lines()
        kept = [line for line, values in lines if wanted(values)]
        if len(kept) < len(lines):
            write_atomic(self.path, b"".join(line + b"\n" for line in kept))
        self._size = None
        return len(lines) - len(kept)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse(line), dict)
    except ValueError:
        return False


def _start(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def series(metrics: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The generations at which ``key`` was measured, and its values there; ``null`` and missing ones are left out."""
    points = [
        (line["generation"], float(line[key]))
        for line in metrics
        if isinstance(line.get(key), int | float)
        and math.isfinite(line[key])
        and isinstance(line.get("generation"), int)
    ]
    return [generation for generation, _ in points], [value for _, value in points]
