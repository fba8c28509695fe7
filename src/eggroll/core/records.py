"""Update records: all that a replica needs to rebuild an update, besides the addresses of the noise."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    def from_json(cls, line: str) -> UpdateRecord:
        """The inverse of :meth:`to_json`. Raises ``ValueError`` or ``KeyError`` on a line that is not one."""
        values = json.loads(line)
        if PACKED in values:
            packed = np.frombuffer(base64.b64decode(values[PACKED], validate=True), np.int8)
            shaped = (packed / 16.0).tolist()
        else:
            shaped = values["shaped_fitness"]
        return cls(values["generation"], values["sigma"], values["lr"], tuple(shaped))


def read_records(path: Path) -> Iterator[UpdateRecord]:
    """The records of an ``updates.jsonl`` in order. A torn last line (a crash while writing) is left out.

    Raises:
        RunError: a line in the middle is not a record, or generations are missing.
    """
    lines = path.read_text().splitlines()
    expected = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = UpdateRecord.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return
            raise RunError(f"{path}, line {number} is not an update record ({error}); the log cannot be used") from None
        if record.generation != expected:
            raise RunError(
                f"{path}, line {number} is of generation {record.generation}, expected {expected}; a part is missing"
            )
        expected += 1
        yield record
