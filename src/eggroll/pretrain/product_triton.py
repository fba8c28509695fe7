"""The integer model's product as one Triton kernel: int8 tensor cores, low-rank term, floor division, clipping.

Everything after the sums is fused into one pass:

    out = I8((x W^T + (((x . B) A) >> shift)) // divisor)           row by row, each with its member's A and B

The sums are int32 and exact, so the result is that of every other engine, bit for bit. Imports triton, so it is itself
imported only for a CUDA device.

Suffixes: M members (rows), n inputs, m outputs, r rank. In the kernel R, M and N are the rows, outputs and inputs of a
tile.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor


@triton.jit
def product_kernel(
    x, weight, out, a, b, rows, m, n, divisor,
    RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of outputs. Everything lies contiguously; SHIFT is the divisor's logarithm, or -1 if it is no power."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    # Tiles that run at the same time share rows and weights: eight tiles of rows go through all outputs together.
    row_tile, m_tile = tl.swizzle2d(program // m_tiles, program % m_tiles, tl.cdiv(rows, BLOCK_R), m_tiles, 8)
    row_R = (row_tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_M = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows, in_outputs = (row_R < rows)[:, None], (m_M < m)[None, :]
    x_R, weight_M = x + row_R[:, None] * n, weight + m_M.to(tl.int64)[None, :] * n
    total = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.int32)
    for first in range(0, n, BLOCK_N):
        n_N = first + tl.arange(0, BLOCK_N)
        x_RN = tl.load(x_R + n_N[None, :], mask=in_rows & (n_N < n)[None, :], other=0)
        weight_NM = tl.load(weight_M + n_N[:, None], mask=in_outputs & (n_N < n)[:, None], other=0)
        total = tl.dot(x_RN, weight_NM, total, out_dtype=tl.int32)
    if RANK > 0:
        term = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.int32)
        for k in tl.static_range(RANK):
            scale = tl.zeros((BLOCK_R,), dtype=tl.int32)
            for first in range(0, n, BLOCK_N):
                n_N = first + tl.arange(0, BLOCK_N)
                mask = in_rows & (n_N < n)[None, :]
                x_RN = tl.load(x_R + n_N[None, :], mask=mask, other=0).to(tl.int32)
                b_RN = tl.load(b + (row_R[:, None] * RANK + k) * n + n_N[None, :], mask=mask, other=0).to(tl.int32)
                scale += tl.sum(x_RN * b_RN, axis=1)
            place = (row_R[:, None] * RANK + k) * m + m_M[None, :]
            a_RM = tl.load(a + place, mask=in_rows & in_outputs, other=0).to(tl.int32)
            term += scale[:, None] * a_RM
        total += term >> NOISE_SHIFT
    if SHIFT >= 0:
        total = total >> SHIFT
    else:
        quotient = total // divisor  # towards zero, on a GPU
        rest = total - quotient * divisor
        total = tl.where(rest < 0, quotient - 1, quotient)
    total = tl.minimum(tl.maximum(total, -127), 127)
    tl.store(out + row_R[:, None] * m + m_M[None, :], total.to(tl.int8), mask=in_rows & in_outputs)


def product(
    x_Mn: Tensor, weight_mn: Tensor, divisor: int, a_Mrm: Tensor | None, b_Mrn: Tensor | None, noise_shift: int
) -> Tensor:
    """The product of all rows, ``(M, m)`` int8.

    Args:
        x_Mn: ``(M, n)`` int8.
        weight_mn: ``(m, n)`` int8.
        divisor: ``16 sqrt(n)``, to the nearest integer.
        a_Mrm: ``(M, r, m)`` int8, or ``None``: no low-rank term.
        b_Mrn: ``(M, r, n)`` int8.
        noise_shift: of the term.
    """
    (rows, n), m = x_Mn.shape, weight_mn.shape[0]
    out = torch.empty((rows, m), dtype=torch.int8, device=x_Mn.device)
    if out.numel() == 0:
        return out
    shift = divisor.bit_length() - 1 if divisor & (divisor - 1) == 0 else -1
    factors = [None if f is None else f.contiguous() for f in (a_Mrm, b_Mrn)]
    plan = _plan(rows, m, n)
    tiles = triton.cdiv(rows, plan["BLOCK_R"]) * triton.cdiv(m, plan["BLOCK_M"])
    with torch.cuda.device_of(out):
        product_kernel[(tiles,)](
            x_Mn.contiguous(), weight_mn.contiguous(), out, *factors, rows, m, n, divisor,
            RANK=0 if a_Mrm is None else a_Mrm.shape[1], NOISE_SHIFT=noise_shift, SHIFT=shift, **plan,
        )  # fmt: skip
    return out


def _plan(rows: int, m: int, n: int) -> dict[str, Any]:
    """The kernel's tiles, by shape alone: what int8 tensor cores take at least is 16 x 16 x 32."""
    block_r = min(128, max(16, triton.next_power_of_2(rows)))
    block_m = min(128, max(16, triton.next_power_of_2(m)))
    return {
        "BLOCK_R": block_r,
        "BLOCK_M": block_m,
        "BLOCK_N": min(128, max(32, triton.next_power_of_2(n))),
        "num_warps": 8 if block_r * block_m >= 128 * 128 else 4,
        "num_stages": 3,
    }
