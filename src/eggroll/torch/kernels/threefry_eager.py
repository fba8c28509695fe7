"""Threefry and normals from plain PyTorch operations: the version that runs everywhere.

Every eager operation is a pass over memory, about 150 of them per number, so the work goes block by block through four
buffers that stay in the cache; on a CPU PyTorch splits each pass over its threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.core.threefry import PARITY, ROTATIONS
from eggroll.torch.kernels.threefry_spec import CENTRE, LOG, MINUS_LN_2, SQRT_2, SQRT_HALF_BITS, TAIL, TAIL_FROM

BLOCK_PER_THREAD = 1 << 16
BLOCK_ON_DEVICE = 1 << 24
SHORT_DRAW = 48
"""Draws shorter than this run with the keys along the inner dimension, because long inner loops are the fast ones."""

_LOW = 0xFFFFFFFF
_SIGN = 1 << 31


def fill_bits(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """Fill ``out``, int32 ``(K, count)``, with the bits of elements ``start`` to ``start + count`` of each draw."""
    work = _Workspace(out)
    for rows, columns in _blocks(out, work.block, start):
        target = out[rows, columns]
        work.cipher(keys[rows], start + columns.start, target.shape[1], flip=0)
        target.copy_(work.as_rows(work.a, target))


def fill_normals(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """Fill ``out``, ``(K, count)`` of a float dtype, with the normals of those elements, computed in float32."""
    work = _Workspace(out)
    for rows, columns in _blocks(out, work.block, start):
        target = out[rows, columns]
        work.cipher(keys[rows], start + columns.start, target.shape[1], flip=_SIGN)
        work.normals(target.numel())
        target.copy_(work.as_rows(work.a.view(torch.float32), target))


def _blocks(out: Tensor, size: int, start: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``(K, count)`` into blocks of at most ``size`` elements whose counters share their upper 32 bits."""
    num_keys, count = out.shape
    num_rows = max(1, size // count)
    for row in range(0, num_keys, num_rows):
        begin = 0
        while begin < count:
            end = min(begin + size, count, begin + (1 << 32) - ((start + begin) & _LOW))
            yield slice(row, min(row + num_rows, num_keys)), slice(begin, end)
            begin = end


class _Workspace:
    """Four int32 buffers of one block, and the small constants as 0-dim tensors.

    0-dim tensors, because at this size PyTorch needs up to a third less time for ``x + tensor`` than for ``x + 1.5``.
    """

    def __init__(self, out: Tensor) -> None:
        self.device = out.device
        on_cpu = self.device.type == "cpu"
        self.block = BLOCK_PER_THREAD * torch.get_num_threads() if on_cpu else BLOCK_ON_DEVICE
        size = min(self.block, out.numel())
        self.a, self.b, self.c, self.d = (torch.empty(size, dtype=torch.int32, device=self.device) for _ in range(4))
        self.index = torch.arange(min(size, out.shape[1]), dtype=torch.int32, device=self.device)
        self.keys_inside = out.shape[1] < min(SHORT_DRAW, out.shape[0])
        self.shifts = {r: _int(32 - r) for group in ROTATIONS for r in group}
        self.masks = {r: _int((1 << r) - 1) for group in ROTATIONS for r in group}

    def as_rows(self, flat: Tensor, like: Tensor) -> Tensor:
        """The first elements of a buffer in the shape of ``like``, ``(rows, columns)``."""
        rows, columns = like.shape
        return (
            flat[: rows * columns].view(columns, rows).t()
            if self.keys_inside
            else flat[: rows * columns].view(like.shape)
        )

    def cipher(self, keys: NDArray[np.uint32], first: int, columns: int, *, flip: int) -> None:
        """Bits of elements ``first`` to ``first + columns`` for each of ``keys``, XOR ``flip``, into buffer ``a``."""
        x0, x1, x2 = (self._shaped(buffer, len(keys), columns) for buffer in (self.a, self.b, self.c))
        index = self.index[:columns].view((-1, 1) if self.keys_inside else (1, -1))
        begin0, begin1, *injections = self._schedule(keys, first, flip)
        torch.add(index, begin1, out=x1)
        torch.add(x1, begin0, out=x0)  # the first round's addition: before it x0 is the same for all elements
        for turn in range(20):
            rotation = ROTATIONS[turn // 4 % 2][turn % 4]
            if turn > 0:
                x0.add_(x1)
            # The shift to the right copies the sign, hence the mask; the sum with 2**rotation x1 is the rotation.
            torch.bitwise_right_shift(x1, self.shifts[rotation], out=x2).bitwise_and_(self.masks[rotation])
            torch.add(x2, x1, alpha=1 << rotation, out=x1).bitwise_xor_(x0)
            if turn % 4 == 3:
                x0.add_(injections[turn // 2 - 1])
                x1.add_(injections[turn // 2])
        x0.bitwise_xor_(x1)

    def _shaped(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        return flat[: rows * columns].view((columns, rows) if self.keys_inside else (rows, columns))

    def _schedule(self, keys: NDArray[np.uint32], first: int, flip: int) -> tuple[Tensor, ...]:
        """What is added to x0 and x1, at the start and after every fourth round: 12 tensors that broadcast over rows.

        Flipping the sign of the last addend of x1 flips the sign of the result: it saves a pass.
        """
        k0, k1 = keys[:, 0].astype(np.uint64), keys[:, 1].astype(np.uint64)
        k = (k0, k1, k0 ^ k1 ^ np.uint64(PARITY))
        addends = [k0 + np.uint64(first >> 32), k1 + np.uint64(first & _LOW)]
        for group in range(1, 6):
            addends += [k[group % 3], k[(group + 1) % 3] + np.uint64(group)]
        addends[-1] = addends[-1] + np.uint64(flip)
        words = torch.from_numpy(np.stack(addends).astype(np.uint32).view(np.int32))
        if len(keys) == 1:
            return words.view(-1).unbind()
        return words.to(self.device).view((12, 1, -1) if self.keys_inside else (12, -1, 1)).unbind()

    def normals(self, size: int) -> None:
        """Normals from bits whose sign is flipped, both in buffer ``a``, in the order of operations of the spec."""
        a, b, c, d = (buffer[:size] for buffer in (self.a, self.b, self.c, self.d))
        s, x, f, h = (buffer.view(torch.float32) for buffer in (a, b, c, d))
        a.bitwise_right_shift_(_int(9))
        x.copy_(a).mul_(_float(2.0**-22)).add_(_float(2.0**-24))
        torch.mul(x, x, out=s)
        torch.sub(_float(1.0), s, out=s)
        # s = m 2^e; a holds the bits of s, then of m.
        torch.sub(a, _int(SQRT_HALF_BITS), out=c).bitwise_right_shift_(_int(23))
        torch.sub(a, c, alpha=1 << 23, out=a)
        torch.add(s, _float(1.0), out=h)
        g = s.sub_(_float(1.0)).div_(h)
        torch.mul(g, g, out=h)
        g.mul_(_horner(LOG, h, out=torch.empty_like(h)))
        h.copy_(c).mul_(_float(MINUS_LN_2))
        w = g.add_(h)
        if self.device.type == "cpu":
            _finish_sparsely(w, x, f)
        else:
            _finish_densely(w, x, f)


def _finish_sparsely(w: Tensor, x: Tensor, buffer: Tensor) -> None:
    """Overwrite ``w`` by the normals. Only one number in 300 is in the tail: those go through NumPy, by index."""
    w_np, x_np = w.numpy(), x.numpy()
    index = np.flatnonzero(w_np >= np.float32(TAIL_FROM))
    x_tail = x_np[index]
    z = np.sqrt(w_np[index]) - np.float32(3.0)
    r = np.full_like(z, TAIL[0])
    for coefficient in TAIL[1:]:
        r *= z
        r += np.float32(coefficient)
    w.sub_(_float(2.5))
    torch.mul(_horner(CENTRE, w, out=buffer), x, out=w).mul_(_float(SQRT_2))
    w_np[index] = r * x_tail * np.float32(SQRT_2)


def _finish_densely(w: Tensor, x: Tensor, buffer: Tensor) -> None:
    """The same without leaving the device: both polynomials for every number."""
    in_tail = w >= TAIL_FROM
    tail = _horner(TAIL, w.sqrt().sub_(3.0), out=buffer)
    centre = _horner(CENTRE, w.sub_(2.5), out=torch.empty_like(w))
    torch.mul(torch.where(in_tail, tail, centre), x, out=w).mul_(SQRT_2)


def _horner(coefficients: tuple[float, ...], z: Tensor, *, out: Tensor) -> Tensor:
    """The polynomial, highest power first. Products and sums apart, never fused: fused ones would round differently."""
    torch.mul(z, _float(coefficients[0]), out=out).add_(_float(coefficients[1]))
    for coefficient in coefficients[2:]:
        out.mul_(z).add_(_float(coefficient))
    return out


def _int(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device="cpu")


def _float(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")
