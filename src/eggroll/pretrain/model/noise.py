"""Noise of the integer model: int8 normals out of a table at hashed offsets, or from a counter without a table.

Either way a draw is a pure function of ``(seed, parameter, generation // noise_reuse, pair)``, whose key is that of the
noise specification (:mod:`eggroll.core.address`), and is ``rank * (inputs + outputs)`` int8 normals: rank by rank first
B (inputs), then A (outputs).

    counter   normal j of a draw is half of word j // 2 of the key's random bits, looked up in ``normal_table``
    table     a draw is a run of one table of normals that all draws share, from an offset that the key is hashed to

In the table, draws of two pairs overlap with a probability of about ``2 length / size``, and overlap as shifted runs:
entry by entry the perturbations remain uncorrelated, as both factors would have to be shifted alike and are not
compared with themselves. Only equal offsets make equal perturbations, which for P pairs are expected
``P (P - 1) / (2 (size - length + 1))`` times per parameter (docs/pretrain.md has measurements).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eggroll.core import threefry
from eggroll.core.address import draw_keys, generation_key, parameter_key
from eggroll.core.threefry import Key
from eggroll.errors import ConfigError
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.oracle import normals
from eggroll.pretrain.model.shape import ModelShape, Parameter

NoiseKind = Literal["table", "counter"]

DEFAULT_TABLE_SIZE = 1 << 24
"""Entries (bytes) of the table; the paper has 2^30."""
FEWEST_PLACES = 1 << 12
"""Places in the table where the longest draw must be able to begin."""
TABLE_NAME = "pretrain/noise-table"
_PART = 1 << 20


@dataclass(frozen=True)
class Noise:
    """Where the draws of a run come from.

    Attributes:
        seed: of the run.
        rank: of the perturbations.
        kind: ``table`` or ``counter``.
        table_size: entries of the table, one byte each.
        reuse: generations that share the same noise.
    """

    seed: int = 0
    rank: int = 1
    kind: NoiseKind = "table"
    table_size: int = DEFAULT_TABLE_SIZE
    reuse: int = 1
    _tables: list[NDArray[np.int8]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(NoiseKind):
            raise ConfigError(f"noise (={self.kind!r}) must be one of: {', '.join(get_args(NoiseKind))}")

    def check(self, shape: ModelShape) -> None:
        """Refuse a table in which the longest draw has fewer than 2^12 places to begin.

        Raises:
            ConfigError: it is too small (with few places, pairs have the same draw), or so large that 32 random bits do
                not reach all of it.
        """
        if self.kind != "table":
            return
        longest = max(shape.parameters, key=lambda p: p.draw_length(self.rank))
        needed = longest.draw_length(self.rank)
        least = needed + FEWEST_PLACES - 1
        if self.table_size < least:
            problem = (
                "is smaller than the largest draw"
                if self.table_size < needed
                else f"leaves the largest draw {self.table_size - needed + 1} places to begin, so pairs would be alike"
            )
            better = max(DEFAULT_TABLE_SIZE, 1 << (4 * needed).bit_length())
            raise ConfigError(
                f"noise_table_size (={self.table_size}) {problem}: {longest.name} takes {needed} normals at rank "
                f"{self.rank}; use at least {least} (better {better}), or noise='counter'"
            )
        if self.table_size > 2**31:
            raise ConfigError(f"noise_table_size (={self.table_size}) must be at most 2**31; the paper has 2**30")

    def table(self) -> NDArray[np.int8]:
        """The table, ``(table_size,)`` int8, made at the first call: the draw of one key."""
        if not self._tables:
            key = parameter_key(self.seed, TABLE_NAME)
            made = np.empty(self.table_size, np.int8)
            for start in range(0, self.table_size, _PART):
                count = min(_PART, self.table_size - start)
                words = threefry.random_bits(key, (count + 1) // 2, start=start // 2)
                halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
                made[start : start + count] = fixed_point.normal_table()[halves.reshape(-1)[:count]]
            self._tables.append(made)
        return self._tables[0]

    def keys(self, parameter: Parameter, generation: int, pairs: Sequence[int] | NDArray) -> NDArray[np.uint32]:
        """The keys of draws, ``(len(pairs), 2)``."""
        return draw_keys(self.seed, parameter.name, generation, pairs, noise_reuse=self.reuse)

    def generation_key(self, parameter: Parameter, generation: int) -> Key:
        """Element ``p`` of this key's random bits is the word that the offset of pair ``p`` is hashed from."""
        return generation_key(self.seed, parameter.name, generation // self.reuse)

    def places(self, parameter: Parameter) -> int:
        """Offsets that a draw may have: ``size - length + 1``."""
        return self.table_size - parameter.draw_length(self.rank) + 1

    def offsets(self, parameter: Parameter, generation: int, pairs: Sequence[int] | NDArray) -> NDArray[np.int64]:
        """Where in the table draws begin, ``(len(pairs),)``: ``word * (size - length + 1) >> 32``."""
        keys = self.keys(parameter, generation, pairs)
        places = np.uint64(self.places(parameter))
        words = (keys[:, 0] ^ keys[:, 1]).astype(np.uint64)
        return ((words * places) >> np.uint64(32)).astype(np.int64)

    def draw(self, parameter: Parameter, generation: int, pairs: Sequence[int] | NDArray) -> NDArray[np.int8]:
        """The draws of some pairs: ``(len(pairs), rank, inputs + outputs)`` int8, first B, then A."""
        length = parameter.draw_length(self.rank)
        form = (len(pairs), self.rank, parameter.inputs + parameter.outputs)
        if self.kind == "table":
            index = self.offsets(parameter, generation, pairs)[:, None] + np.arange(length)
            return self.table()[index].reshape(form)
        keys = self.keys(parameter, generation, pairs)
        made = [normals((int(hi), int(lo)), length) for hi, lo in keys]
        return np.array(made, np.int8).reshape(form)
