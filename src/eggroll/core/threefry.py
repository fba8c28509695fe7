"""Threefry-2x32 with 20 rounds in NumPy, used exactly as ``jax.random`` uses it.

This is version 1 of the noise specification (docs/noise-spec.md): the reference that the PyTorch, Triton and JAX
implementations are tested against. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
and ``jax.random`` with ``jax_threefry_partitionable=True``, its default.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from eggroll.core.normal import bits_to_normal

NOISE_VERSION = 1

Key = tuple[int, int]
"""Two unsigned 32-bit words."""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
_MASK = 0xFFFFFFFF


def threefry2x32(
    key: Key, counter_hi: NDArray[np.uint32], counter_lo: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The Threefry-2x32 block cipher, 20 rounds, on arrays of counters of one shape. Returns its two output words."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x0 = counter_hi.astype(np.uint32) + np.uint32(schedule[0])
    x1 = counter_lo.astype(np.uint32) + np.uint32(schedule[1])
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 += x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 ^= x0
        x0 += np.uint32(schedule[(group + 1) % 3])
        x1 += np.uint32((schedule[(group + 2) % 3] + group + 1) & _MASK)
    return x0, x1


def seed_key(seed: int) -> Key:
    """The key of a seed: its upper and lower 32 bits, as ``jax.random.key`` makes it.

    Raises:
        ValueError: the seed is negative or needs more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed (={seed}) must be a whole number from 0 to 2**64 - 1")
    return seed >> 32, seed & _MASK


def fold_in(key: Key, data: int) -> Key:
    """A new key from a key and an unsigned 32-bit number, as ``jax.random.fold_in``."""
    if not 0 <= data <= _MASK:
        raise ValueError(f"fold_in takes an unsigned 32-bit number, got {data}")
    zero = np.zeros(1, np.uint32)
    hi, lo = threefry2x32(key, zero, np.full(1, data, np.uint32))
    return int(hi[0]), int(lo[0])


def name_hash(name: str) -> int:
    """BLAKE2b-64 of the UTF-8 name, read as a big-endian unsigned integer."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def random_bits(key: Key, count: int, *, start: int = 0) -> NDArray[np.uint32]:
    """Elements ``start`` to ``start + count`` of the draw of ``key``: ``(count,)`` unsigned 32-bit words.

    Element ``i`` has the counter ``(i >> 32, i & 0xffffffff)``; its bits are the XOR of the two output words, so any
    part of a draw can be made without the rest.
    """
    index = np.arange(start, start + count, dtype=np.uint64)
    x0, x1 = threefry2x32(key, (index >> np.uint64(32)).astype(np.uint32), (index & np.uint64(_MASK)).astype(np.uint32))
    return x0 ^ x1


def normal(key: Key, shape: tuple[int, ...], *, start: int = 0) -> NDArray[np.float32]:
    """Standard normals of ``shape`` in float32, in C order, as ``jax.random.normal(key, shape)``.

    ``start`` is the index of the first element within a longer draw.
    """
    count = int(np.prod(shape, dtype=np.int64))
    return bits_to_normal(random_bits(key, count, start=start)).reshape(shape)
