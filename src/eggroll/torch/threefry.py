"""Noise on any device: Threefry-2x32 bits and standard normals for many keys at once (docs/noise-spec.md, version 1).

The same draw as ``eggroll.core.threefry``: element ``i`` of the draw of a key has the 64-bit counter ``i``, so results
depend only on (key, element): not on chunking, threads, or which keys are drawn together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.core.threefry import PARITY, ROTATIONS

Keys = NDArray[np.uint32] | torch.Tensor

_CHUNK = 1 << 17


def normals(
    keys: Keys, count: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, start: int = 0
) -> torch.Tensor:
    """Standard normals ``(K, count)``: row ``k`` holds elements ``start`` to ``start + count`` of the draw of ``keys[k]``."""
    bits = random_bits(keys, count, device=device, start=start)
    out = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    flat, result = bits.view(-1), out.view(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        result[begin : begin + _CHUNK] = _bits_to_normals(flat[begin : begin + _CHUNK])
    return out


def random_bits(keys: Keys, count: int, *, device: torch.device | str = "cpu", start: int = 0) -> torch.Tensor:
    """The 32 random bits of each element as int32 ``(K, count)``; see :func:`normals`."""
    words = np.asarray(keys.cpu() if isinstance(keys, torch.Tensor) else keys).astype(np.int64).reshape(-1, 2)
    out = torch.empty((len(words), count), dtype=torch.int32, device=device)
    for row, (first, second) in enumerate(words.tolist()):
        for begin in range(0, count, _CHUNK):
            stop = min(begin + _CHUNK, count)
            index = torch.arange(start + begin, start + stop, dtype=torch.int64, device=device)
            _cipher(first, second, index, out[row, begin:stop])
    return out


def _cipher(first: int, second: int, index: torch.Tensor, out: torch.Tensor) -> None:
    schedule = (first, second, first ^ second ^ PARITY)
    x0 = _wrap(index >> 32).add_(_signed(schedule[0]))
    x1 = _wrap(index).add_(_signed(schedule[1]))
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 += x1
            x1 = ((x1 << rotation) | ((x1 >> (32 - rotation)) & ((1 << rotation) - 1))) ^ x0
        x0 += _signed(schedule[(group + 1) % 3])
        x1 += _signed(schedule[(group + 2) % 3] + group + 1)
    torch.bitwise_xor(x0, x1, out=out)


def _wrap(index: torch.Tensor) -> torch.Tensor:
    return index.view(torch.int32)[::2].clone()


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _bits_to_normals(bits: torch.Tensor) -> torch.Tensor:
    small = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
             -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
    large = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
             0.00943887047, 1.00167406, 2.83297682)  # fmt: skip
    uniform = ((bits ^ -(2**31)) >> 9).float().mul_(2.0**-22).add_(2.0**-24)
    w = -torch.log1p(-(uniform * uniform))
    is_small = w < 5.0
    z = torch.where(is_small, w - 2.5, w.sqrt() - 3.0)
    result = torch.where(is_small, small[0], large[0])
    for low, high in zip(small[1:], large[1:], strict=True):
        result = (result * z).add_(torch.where(is_small, low, high))
    return (result * uniform).mul_(float(np.float32(np.sqrt(2.0))))
