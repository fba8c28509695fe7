"""Threefry-2x32 with 20 rounds in NumPy, used exactly as ``jax.random`` uses it.

This is version 1 of the noise specification (docs/noise-spec.md): the reference that the PyTorch, Triton and JAX
implementations are tested against. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
and ``jax.random`` with ``jax_threefry_partitionable=True``, its default.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION = 1

Key = tuple[int, int]
"""Two unsigned 32-bit words."""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
_MASK = 0xFFFFFFFF
_LOWEST_UNIFORM = np.nextafter(np.float32(-1.0), np.float32(0.0))


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


def bits_to_normal(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normals (float32) from 32-bit words: ``sqrt(2) * erfinv(u)``, u uniform on [nextafter(-1, 0), 1)."""
    mantissa = (bits >> np.uint32(9)) | np.uint32(0x3F800000)
    unit = mantissa.view(np.float32) - np.float32(1.0)
    span = np.float32(1.0) - _LOWEST_UNIFORM
    uniform = np.maximum(_LOWEST_UNIFORM, unit * span + _LOWEST_UNIFORM)
    return (np.float32(np.sqrt(2.0)) * _erfinv(uniform)).astype(np.float32)


def normal(key: Key, shape: tuple[int, ...], *, start: int = 0) -> NDArray[np.float32]:
    """Standard normals of ``shape`` in float32, in C order, as ``jax.random.normal(key, shape)``.

    ``start`` is the index of the first element within a longer draw.
    """
    count = int(np.prod(shape, dtype=np.int64))
    return bits_to_normal(random_bits(key, count, start=start)).reshape(shape)


def _erfinv(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse error function in float32: Giles' two polynomials (2010), the ones that XLA evaluates."""
    small = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
             -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
    large = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
             0.00943887047, 1.00167406, 2.83297682)  # fmt: skip
    w = -np.log1p(-x * x)
    is_small = w < np.float32(5.0)
    shifted = np.where(is_small, w - np.float32(2.5), np.sqrt(w) - np.float32(3.0)).astype(np.float32)
    result = np.where(is_small, np.float32(small[0]), np.float32(large[0]))
    for low, high in zip(small[1:], large[1:], strict=True):
        result = np.where(is_small, np.float32(low), np.float32(high)) + result * shifted
    return (result * x).astype(np.float32)
