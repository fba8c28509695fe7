"""Noise of many parameters and pairs at once, drawn by address (noise specification, version 1).

Draws of one size are made in one call, so that a model of 200 parameters costs a handful of calls per generation. The
draws of a generation are kept for its update if they are small enough; they are the same numbers when drawn again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from eggroll.core.address import draw_keys
from eggroll.core.select import ParameterSpec
from eggroll.torch.threefry import normals

CACHE_BYTES = 512 * 2**20
CHUNK_BYTES = 64 * 2**20


@dataclass
class Noise:
    """The noise of a set of parameters.

    Args:
        specs: the perturbed parameters.
        rank: rank of the matrices' factors.
        seed: seed of the run.
        noise_reuse: generations that share their noise.
        cache_bytes: keep a whole generation's draws if they need at most this much.
    """

    specs: Sequence[ParameterSpec]
    rank: int
    seed: int
    noise_reuse: int = 1
    cache_bytes: int = CACHE_BYTES
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _cached: tuple[int, int, str] | None = field(default=None, repr=False)

    @property
    def draw_size(self) -> int:
        """Normals per pair over all parameters."""
        return sum(spec.draw_size(self.rank) for spec in self.specs)

    def prepare(self, generation: int, num_pairs: int, device: torch.device) -> bool:
        """Draw a whole generation now if it fits into the cache; whether it did. Speed only, results do not change."""
        if num_pairs * self.draw_size * 4 > self.cache_bytes:
            self._cache, self._cached = {}, None
            return False
        wanted = (generation // self.noise_reuse, num_pairs, str(device))
        if self._cached != wanted:
            self._cache, self._cached = {}, None  # the old draws go before the new ones come
            self._cache = self._draw(generation, range(num_pairs), device)
            self._cached = wanted
        return True

    def draw(self, generation: int, pairs: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """``name -> (len(pairs), draw_size)`` float32 normals for all parameters."""
        if self._holds(generation, pairs, device):
            rows = _rows(pairs)
            return {name: draws[rows] for name, draws in self._cache.items()}
        return self._draw(generation, pairs, device)

    def chunks(
        self, spec: ParameterSpec, generation: int, pairs: Sequence[int], device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """One parameter's draws in chunks of pairs of bounded size: ``(slice into pairs, (k, draw_size))``.

        The chunks depend on the parameter alone, never on how members were evaluated: sums over them have one order.
        """
        step = max(1, CHUNK_BYTES // (4 * spec.draw_size(self.rank)))
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step]
            if self._holds(generation, part, device):
                draws = self._cache[spec.name][_rows(part)]
            else:
                keys = draw_keys(self.seed, spec.address, generation, part, noise_reuse=self.noise_reuse)
                draws = normals(keys, spec.draw_size(self.rank), device=device)
            yield slice(start, start + len(part)), draws

    def factors(self, spec: ParameterSpec, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Draws ``(k, draw_size)`` as ``A (k, *batch, m, r)`` and ``B (k, *batch, n, r)``, not scaled."""
        m, n = spec.matrix_shape
        both = draws.view(draws.shape[0], *spec.batch_shape, n + m, self.rank)
        return both[..., n:, :], both[..., :n, :]

    def _holds(self, generation: int, pairs: Sequence[int], device: torch.device) -> bool:
        if self._cached is None or len(pairs) == 0:
            return False
        epoch, held, where = self._cached
        return epoch == generation // self.noise_reuse and where == str(device) and max(pairs) < held

    def _draw(self, generation: int, pairs: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        by_size: dict[int, list[ParameterSpec]] = defaultdict(list)
        for spec in self.specs:
            by_size[spec.draw_size(self.rank)].append(spec)
        result: dict[str, Tensor] = {}
        for size, group in by_size.items():
            keys = [
                draw_keys(self.seed, spec.address, generation, pairs, noise_reuse=self.noise_reuse) for spec in group
            ]
            drawn = normals(np.concatenate(keys), size, device=device).view(len(group), len(pairs), size)
            result.update((spec.name, drawn[index]) for index, spec in enumerate(group))
        return result


def _rows(pairs: Sequence[int]) -> slice | list[int]:
    """Pairs as a slice where they are consecutive (no copy), else as they are."""
    if isinstance(pairs, range) and pairs.step == 1:
        return slice(pairs.start, pairs.stop)
    return list(pairs)
