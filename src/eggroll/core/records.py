"""Update records: all that a replica needs to rebuild an update, besides the addresses of the noise."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.core.reading import NUMBER, NUMBERS, TEXT, WHOLE, check_fields, parse
from eggroll.errors import RunError

PACKED = "shaped_fitness_in_sixteenths"
"""Base64 of int8: in a log in the place of many numbers that are whole sixteenths, as integer pretraining has."""
PACKED_FROM = 256
"""Members from which numbers are packed: a log of few members can be read without help."""


@dataclass(frozen=True)
class UpdateRecord:
    """One generation's update: ``sigma`` and ``lr`` in force and the ``(N,)`` shaped fitness.

    ``totals`` are sums over the generation's members that some replicas need as well (statistics of observations). They
    travel to the replicas of a run, but are not in its log.
    """

    generation: int
    sigma: float
    lr: float
    shaped_fitness: tuple[float, ...]
    totals: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def make(
        cls,
        generation: int,
        sigma: float,
        lr: float,
        shaped_fitness: NDArray[np.float32],
        totals: Mapping[str, Any] | None = None,
    ) -> UpdateRecord:
        """A record from an array: the shortest decimals that are the float32 values again, half as long in the log."""
        decimals = tuple(float(str(value)) for value in np.asarray(shaped_fitness, dtype=np.float32))
        return cls(generation, float(sigma), float(lr), decimals, totals or {})

    @property
    def weights(self) -> NDArray[np.float32]:
        """The shaped fitness as a ``(N,)`` float32 array."""
        return np.asarray(self.shaped_fitness, dtype=np.float32)

    def to_json(self) -> str:
        """One line of ``updates.jsonl``."""
        head = {"generation": self.generation, "sigma": self.sigma, "lr": self.lr}
        sixteenths = 16.0 * np.asarray(self.shaped_fitness)
        if len(sixteenths) >= PACKED_FROM and np.all((np.rint(sixteenths) == sixteenths) & (abs(sixteenths) < 128)):
            packed = base64.b64encode(sixteenths.astype(np.int8).tobytes()).decode()
            return json.dumps({**head, PACKED: packed})
        return json.dumps({**head, "shaped_fitness": list(self.shaped_fitness)})

    @classmethod
    def from_json(cls, line: str | bytes) -> UpdateRecord:
        """The inverse of :meth:`to_json`. Raises ``ValueError`` on a line that is not one."""
        values = check_fields(parse(line), _FIELDS, {PACKED: TEXT})
        if PACKED in values:
            packed = np.frombuffer(base64.b64decode(values[PACKED], validate=True), np.int8)
            shaped = (packed / 16.0).tolist()
        else:
            shaped = check_fields(values, {"shaped_fitness": NUMBERS})["shaped_fitness"]
        return cls(values["generation"], values["sigma"], values["lr"], tuple(shaped))


_FIELDS = {"generation": WHOLE, "sigma": NUMBER, "lr": NUMBER}
_CHECK = re.compile(rb', "check": "([0-9a-f]{16})"\}$')


def with_check(line: str, before: str) -> tuple[str, str]:
    """A record's line with a checksum at its end, and the checksum: of the line and all lines before it.

    Args:
        line: of :meth:`UpdateRecord.to_json`.
        before: the checksum after the line before it; empty for the first line.
    """
    check = _check(line.encode(), before)
    return f'{line[:-1]}, "check": "{check}"}}', check


def _check(line: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + b"\n" + line).hexdigest()[:16]


def read_log(data: bytes, path: Path) -> Iterator[tuple[UpdateRecord, str]]:
    """The records of an ``updates.jsonl`` in order, each with the checksum after its line.

    A torn last line (a crash while writing), which has no line end, is left out. Logs of older versions have no
    checksums in their lines, or none up to where the run was resumed.

    Args:
        data: its contents.
        path: its name, for messages.

    Raises:
        RunError: a line is not a record or was changed, or generations are missing.
    """
    lines = data.split(b"\n")
    check, checked = "", False
    for number, line in enumerate(lines, start=1):
        if not line.strip() and number == len(lines):
            return
        found = _CHECK.search(line)
        line = line if found is None else line[: found.start()] + b"}"
        try:
            record = UpdateRecord.from_json(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RunError(f"{path}, line {number} is not an update record ({error}); the log cannot be used") from None
        if record.generation != number - 1:
            raise RunError(
                f"{path}, line {number} is of generation {record.generation}, expected {number - 1}; a part is missing"
            )
        check = _check(line, check)
        if checked if found is None else found[1].decode() != check:
            what = "has no checksum, unlike those before it" if found is None else "is not what its checksum says"
            raise RunError(
                f"{path}, line {number} {what}: this line or one before it was changed after the run wrote it, and the "
                "run would go on as another one. Restore the file from a copy, or start the run again"
            )
        checked = found is not None
        yield record, check


def read_records(path: Path) -> Iterator[UpdateRecord]:
    """The records of an ``updates.jsonl``, see :func:`read_log`."""
    return (record for record, _ in read_log(path.read_bytes(), path))
