"""Threefry and normals from plain PyTorch operations: the version that runs everywhere.

Every eager operation is a pass over memory, about 160 of them per number, so the work goes block by block through a few
buffers that stay in the cache, in place where possible; on a CPU PyTorch splits each pass over its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.core.normal import CENTER, LOG, MINUS_LN_2, SQRT_2, SQRT_HALF_BITS, TAIL, TAIL_FROM
from eggroll.core.threefry import PARITY, ROTATIONS

BLOCK_PER_THREAD = 1 << 16
BLOCK_ON_DEVICE = 1 << 24
SHORT_DRAW = 48
"""Draws shorter than this run with the keys along the inner dimension, because long inner loops are the fast ones."""

_LOW = 0xFFFFFFFF
_SIGN = 1 << 31
_INTS = (9, 23, SQRT_HALF_BITS, 0x40400000, 0x4B400000)
_FLOATS = (3.0, 2.0**-24, 1.0, 12582912.0, MINUS_LN_2, 2.5, SQRT_2, *LOG, *CENTER, *TAIL)


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
        target.copy_(work.as_rows(work.normals(target.numel()), target))


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
    """The int32 buffers of one block, and the constants as 0-dim tensors.

    0-dim tensors, because at this size PyTorch needs up to a third less time for ``x + tensor`` than for ``x + 1.5``.
    """

    def __init__(self, out: Tensor) -> None:
        self.device = out.device
        on_cpu = self.device.type == "cpu"
        self.block = BLOCK_PER_THREAD * torch.get_num_threads() if on_cpu else BLOCK_ON_DEVICE
        size = min(self.block, out.numel())
        num_buffers = 5 if out.dtype.is_floating_point else 3
        self.buffers = [torch.empty(size, dtype=torch.int32, device=self.device) for _ in range(num_buffers)]
        self.index = torch.arange(min(size, out.shape[1]), dtype=torch.int32, device=self.device)
        self.keys_inside = out.shape[1] < min(SHORT_DRAW, out.shape[0])
        rotations = [r for group in ROTATIONS for r in group]
        self.shifts = dict(zip(rotations, _constants([32 - r for r in rotations], torch.int32), strict=True))
        self.masks = dict(zip(rotations, _constants([(1 << r) - 1 for r in rotations], torch.int32), strict=True))
        self.ints = dict(zip(_INTS, _constants(_INTS, torch.int32), strict=True))
        self.floats = dict(zip(_FLOATS, _constants(_FLOATS, torch.float32), strict=True))

    @property
    def a(self) -> Tensor:
        """The buffer that holds the bits."""
        return self.buffers[0]

    def as_rows(self, flat: Tensor, like: Tensor) -> Tensor:
        """The first elements of a buffer in the shape of ``like``, ``(rows, columns)``."""
        shaped = self._shaped(flat, *like.shape)
        return shaped.t() if self.keys_inside else shaped

    def cipher(self, keys: NDArray[np.uint32], first: int, columns: int, *, flip: int) -> None:
        """Bits of elements ``first`` to ``first + columns`` for each of ``keys``, XOR ``flip``, into buffer ``a``."""
        x0, x1, x2 = (self._shaped(buffer, len(keys), columns) for buffer in self.buffers[:3])
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

    def normals(self, size: int) -> Tensor:
        """Normals from the bits, sign flipped, in buffer ``a``, in the order of operations of the specification.

        An integer ``n`` of up to 23 bits becomes a float without a pass to another buffer: ``n`` added to the bits of
        3.0, whose last bit counts ``2**-22``, are the bits of ``3 + n 2**-22``; likewise with ``1.5 * 2**23``.
        """
        a, b, c = (buffer[:size] for buffer in self.buffers[:3])
        x, s, e, h, r = (buffer[:size].view(torch.float32) for buffer in self.buffers)
        ints, floats = self.ints, self.floats
        a.bitwise_right_shift_(ints[9]).add_(ints[0x40400000])
        x.sub_(floats[3.0]).add_(floats[2.0**-24])
        torch.mul(x, x, out=s)
        torch.sub(floats[1.0], s, out=s)
        torch.sub(b, ints[SQRT_HALF_BITS], out=c).bitwise_right_shift_(ints[23])
        torch.sub(b, c, alpha=1 << 23, out=b)  # s = m 2^e: from here on b holds m, c holds e
        torch.add(s, floats[1.0], out=h)
        g = s.sub_(floats[1.0]).div_(h)
        torch.mul(g, g, out=h)
        g.mul_(self._horner(LOG, h, out=r))
        c.add_(ints[0x4B400000])
        w = g.add_(e.sub_(floats[12582912.0]).mul_(floats[MINUS_LN_2]))
        finish = self._finish_sparsely if self.device.type == "cpu" else self._finish_densely
        return finish(w, x, h, r)

    def _finish_sparsely(self, w: Tensor, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """Normals from ``w`` and ``x``. Only one number in 300 is in the tail: those go through NumPy, by index."""
        w_np = w.numpy()
        index = np.flatnonzero(w_np >= np.float32(TAIL_FROM))
        z, x_tail = np.sqrt(w_np[index]) - np.float32(3.0), x.numpy()[index]
        tail = np.full_like(z, TAIL[0])
        for coefficient in TAIL[1:]:
            tail *= z
            tail += np.float32(coefficient)
        self._horner(CENTER, w.sub_(self.floats[2.5]), out=r).mul_(x).mul_(self.floats[SQRT_2])
        r.numpy()[index] = tail * x_tail * np.float32(SQRT_2)
        return r

    def _finish_densely(self, w: Tensor, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """The same without leaving the device: both polynomials for every number.

        The square root goes through float64, because that of float32 is not rounded correctly everywhere (not by MKL).
        """
        in_tail = w >= TAIL_FROM
        root = w.sqrt() if self.device.type == "mps" else w.double().sqrt_().float()  # MPS has no float64
        self._horner(TAIL, root.sub_(3.0), out=h)
        self._horner(CENTER, w.sub_(2.5), out=r)
        return torch.where(in_tail, h, r).mul_(x).mul_(self.floats[SQRT_2])

    def _horner(self, coefficients: tuple[float, ...], z: Tensor, *, out: Tensor) -> Tensor:
        """The polynomial, highest power first. Products and sums apart: fused ones would round differently."""
        first, second, *rest = (self.floats[coefficient] for coefficient in coefficients)
        torch.mul(z, first, out=out).add_(second)
        for coefficient in rest:
            out.mul_(z).add_(coefficient)
        return out


def _constants(values: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.tensor(values, dtype=dtype, device="cpu").unbind()
