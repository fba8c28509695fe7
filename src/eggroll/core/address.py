"""Addresses of noise: which key a parameter's perturbation has in a generation and a pair (noise version 1).

Nothing random is stored or sent. A perturbation is a pure function of ``(seed, parameter name, generation, pair)``:

    key(parameter) = fold_in(fold_in(key(seed), H(name) >> 32), H(name) & 0xffffffff)      H = BLAKE2b-64
    key(draw)      = fold_in(fold_in(key(parameter), generation // noise_reuse), pair)
    factors        = normal(key(draw), (..., n + m, r));   B = first n rows, A = last m rows
    dense          = normal(key(draw), shape)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from eggroll.core import threefry
from eggroll.core.select import ParameterSpec
from eggroll.core.threefry import Key


@dataclass(frozen=True)
class Member:
    """One member of the population: which draw it has, and with which sign.

    ``pair`` counts draws. With antithetic sampling the members ``2k`` and ``2k + 1`` share the draw ``k`` with the
    signs +1 and -1; with one-sided sampling every member has a draw of its own and the sign +1.
    """

    pair: int
    sign: int


def member_of(index: int, *, antithetic: bool) -> Member:
    """The draw and the sign of member ``index``."""
    if antithetic:
        return Member(index // 2, 1 - 2 * (index % 2))
    return Member(index, 1)


@lru_cache(maxsize=65536)
def parameter_key(seed: int, name: str) -> Key:
    """The key of a parameter under a seed."""
    digest = threefry.name_hash(name)
    return threefry.fold_in(threefry.fold_in(threefry.seed_key(seed), digest >> 32), digest & 0xFFFFFFFF)


@lru_cache(maxsize=65536)
def generation_key(seed: int, name: str, epoch: int) -> Key:
    """The key of a parameter in ``epoch``, which is ``generation // noise_reuse``."""
    return threefry.fold_in(parameter_key(seed, name), epoch)


def draw_key(seed: int, name: str, generation: int, pair: int, *, noise_reuse: int = 1) -> Key:
    """The key of one draw: the perturbation of ``name`` in ``pair`` of ``generation``."""
    return threefry.fold_in(generation_key(seed, name, generation // noise_reuse), pair)


def draw_keys(
    seed: int, name: str, generation: int, pairs: Sequence[int] | NDArray[np.int64], *, noise_reuse: int = 1
) -> NDArray[np.uint32]:
    """The keys of many draws at once: ``(len(pairs), 2)`` unsigned 32-bit words, row for row as :func:`draw_key`."""
    data = np.asarray(pairs, dtype=np.int64)
    key = generation_key(seed, name, generation // noise_reuse)
    hi, lo = threefry.threefry2x32(key, np.zeros(data.shape, np.uint32), data.astype(np.uint32))
    return np.stack([hi, lo], axis=-1)


def factor_draw(
    spec: ParameterSpec, rank: int, seed: int, generation: int, pair: int, *, noise_reuse: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``A`` of shape ``(*batch, m, r)`` and ``B`` of shape ``(*batch, n, r)``: iid N(0, 1), float32, not scaled."""
    m, n = spec.matrix_shape
    key = draw_key(seed, spec.address, generation, pair, noise_reuse=noise_reuse)
    factors = threefry.normal(key, (*spec.batch_shape, n + m, rank))
    return factors[..., n:, :], factors[..., :n, :]


def dense_draw(
    spec: ParameterSpec, seed: int, generation: int, pair: int, *, noise_reuse: int = 1
) -> NDArray[np.float32]:
    """A dense N(0, 1) perturbation of the parameter's shape, float32, not scaled."""
    return threefry.normal(draw_key(seed, spec.name, generation, pair, noise_reuse=noise_reuse), spec.shape)
