"""Threefry and normals in one Triton kernel: nothing but the results touches the memory of the GPU.

Imports triton, so this module is itself imported only when a draw is for a CUDA device. The floats are those of
``threefry_eager``, bit for bit: products and sums are not fused, divisions and square roots are the rounded ones.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import numpy as np
import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from numpy.typing import NDArray
from torch import Tensor

from eggroll.core import normal as spec

MAX_BLOCK = 1024

C0, C1, C2, C3, C4, C5, C6, C7, C8 = map(tl.constexpr, spec.CENTER)
T0, T1, T2, T3, T4, T5, T6, T7, T8 = map(tl.constexpr, spec.TAIL)
L0, L1, L2 = map(tl.constexpr, spec.LOG)
MINUS_LN_2, SQRT_2, TAIL_FROM = map(tl.constexpr, (spec.MINUS_LN_2, spec.SQRT_2, spec.TAIL_FROM))
SQRT_HALF_BITS = tl.constexpr(spec.SQRT_HALF_BITS)


@triton.jit
def _four_rounds(x0, x1, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, r3: tl.constexpr, inject0, inject1):
    x0 += x1
    x1 = ((x1 << r0) | (x1 >> (32 - r0))) ^ x0
    x0 += x1
    x1 = ((x1 << r1) | (x1 >> (32 - r1))) ^ x0
    x0 += x1
    x1 = ((x1 << r2) | (x1 >> (32 - r2))) ^ x0
    x0 += x1
    x1 = ((x1 << r3) | (x1 >> (32 - r3))) ^ x0
    return x0 + inject0, x1 + inject1


@triton.jit
def _bits(k0, k1, hi, lo):
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0 = hi + k0
    x1 = lo + k1
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, k1, k2 + 1)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, k2, k0 + 2)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, k0, k1 + 3)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, k1, k2 + 4)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, k2, k0 + 5)
    return x0 ^ x1


@triton.jit
def _normal(bits):
    n = (bits ^ 0x80000000).to(tl.int32, bitcast=True) >> 9
    x = n.to(tl.float32) * 2.384185791015625e-07 + 5.960464477539063e-08
    s = 1.0 - x * x
    s_bits = s.to(tl.int32, bitcast=True)
    e = (s_bits - SQRT_HALF_BITS) >> 23
    m = (s_bits - (e << 23)).to(tl.float32, bitcast=True)
    g = tl.math.div_rn(m - 1.0, m + 1.0)
    h = g * g
    w = ((L0 * h + L1) * h + L2) * g + e.to(tl.float32) * MINUS_LN_2
    z = w - 2.5
    center = (((((((C0 * z + C1) * z + C2) * z + C3) * z + C4) * z + C5) * z + C6) * z + C7) * z + C8
    z = tl.math.sqrt_rn(w) - 3.0
    tail = (((((((T0 * z + T1) * z + T2) * z + T3) * z + T4) * z + T5) * z + T6) * z + T7) * z + T8
    return tl.where(w < TAIL_FROM, center, tail) * x * SQRT_2


@triton.jit(do_not_specialize=["start"])
def threefry_kernel(keys, out, start, count, blocks_per_row, BLOCK: tl.constexpr, NORMAL: tl.constexpr):
    """Program ``p`` fills columns ``BLOCK (p % blocks_per_row)`` and on of row ``p // blocks_per_row`` of ``out``."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    column = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    counter = start + column
    bits = _bits(k0, k1, (counter >> 32).to(tl.uint32), counter.to(tl.uint32))
    if NORMAL:
        result = _normal(bits).to(out.dtype.element_ty)
    else:
        result = bits.to(tl.int32, bitcast=True)
    tl.store(out + row * count + column, result, mask=column < count)


def fill_bits(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """As ``threefry_eager.fill_bits``; ``out`` is contiguous."""
    _launch(out, keys, start, normal=False)


def fill_normals(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """As ``threefry_eager.fill_normals``; ``out`` is contiguous."""
    _launch(out, keys, start, normal=True)


def _launch(out: Tensor, keys: NDArray[np.uint32], start: int, *, normal: bool) -> None:
    num_keys, count = out.shape
    block = min(MAX_BLOCK, triton.next_power_of_2(count))
    blocks_per_row = triton.cdiv(count, block)
    words = torch.from_numpy(np.ascontiguousarray(keys).view(np.int32)).to(out.device, non_blocking=True)
    with torch.cuda.device_of(out):
        threefry_kernel[(num_keys * blocks_per_row,)](
            words, out, start, count, blocks_per_row, BLOCK=block, NORMAL=normal, enable_fp_fusion=False
        )
