"""A population's linear layer as one Triton kernel: the base product, with the low-rank part added in its epilogue.

    out[p] = x[p] W^T + bias + (x[p] v[p]^T) u[p]            v[p] = B_p^T,  u[p] = sign_p sigma / sqrt(r) A_p^T

It is made to cost what a plain product over the same rows costs. A tile of x is loaded once for W and v together, and
the result is rounded and stored once, so that the bytes are those of the plain product and ``P r (m + n)`` factors; the
multiply-adds are its ``P B m n`` and another ``P B r (m + n)``.

Sums are made in float32, those of x v^T too. Imports triton, so it is itself imported only for a CUDA device.

Suffixes: P members, B rows of a member, n inputs, m outputs, r rank. In the kernel R, M and N are the rows,
outputs and inputs of a tile; a column of a tile is one rank of one of the members that its rows belong to.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 2**31 - 128
MIN_BATCH = 16
"""Rows a member from which on a tile is multiplied with the factors of all its members side by side."""
MIN_COLUMNS = 16
"""What every version of Triton multiplies; fewer are padded."""
MULTIPROCESSORS = 128
"""Tiles are made smaller rather than leave one of a large GPU's (132 on H100 and H200) without any."""


@triton.jit
def linear_kernel(
    x, weight, bias, out, u, v, members, batch, m, n,
    x_p, x_b, x_n, weight_m, weight_n, u_p, u_r, u_m, v_p, v_r, v_n,
    RANK: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of outputs; ``x_p`` and the like are strides.

    The rows of all members are numbered through, and a tile may hold those of several. Either each row gathers the
    factors of its member (``GATHER``: few rows a member), or the tile is multiplied with the factors of all its members
    side by side, and a row keeps the columns of its own. Ranks are taken in ``PARTS`` of ``PADDED``, mostly one.
    """
    dtype = x.dtype.element_ty
    rows = members * batch
    m_tiles = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    # Tiles that run at the same time share rows and weights: eight tiles of rows go through all outputs together.
    row_tile, m_tile = tl.swizzle2d(program // m_tiles, program % m_tiles, tl.cdiv(rows, BLOCK_R), m_tiles, 8)
    row_R = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    member_R = row_R // batch
    m_M = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_R = x + (member_R.to(tl.int64) * x_p + (row_R % batch).to(tl.int64) * x_b)[:, None]
    weight_M = weight + (m_M.to(tl.int64) * weight_m)[None, :]

    if GATHER:
        member = member_R[:, None, None]
        k_of_part = tl.arange(0, PADDED)[None, :, None]
    else:
        column = tl.arange(0, COLUMNS)[:, None]
        member = row_tile * BLOCK_R // batch + column // PADDED
        k_of_part = column % PADDED
    exists = member < members
    member = member.to(tl.int64)

    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for part in tl.static_range(PARTS):
        k = part * PADDED + k_of_part
        needed = exists & (k < RANK)
        low = tl.zeros((BLOCK_R, PADDED if GATHER else COLUMNS), tl.float32)
        for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
            n_N = start + tl.arange(0, BLOCK_N)
            x_mask = (row_R < rows)[:, None] & (n_N < n)[None, :]
            x_RN = tl.load(x_R + n_N.to(tl.int64)[None, :] * x_n, mask=x_mask, other=0.0)
            if part == 0:
                weight_mask = (n_N < n)[:, None] & (m_M < m)[None, :]
                weight_NM = tl.load(weight_M + n_N.to(tl.int64)[:, None] * weight_n, mask=weight_mask, other=0.0)
                acc = tl.dot(x_RN, weight_NM, acc, input_precision=PRECISION)
            v_j = n_N[None, None, :] if GATHER else n_N[None, :]
            v_tile = tl.load(v + member * v_p + k * v_r + v_j * v_n, mask=needed & (v_j < n), other=0.0)
            if GATHER:
                low += tl.sum(x_RN.to(tl.float32)[:, None, :] * v_tile.to(tl.float32), 2)
            else:
                low = tl.dot(x_RN, tl.trans(v_tile), low, input_precision=PRECISION)

        u_j = m_M[None, None, :] if GATHER else m_M[None, :]
        u_tile = tl.load(u + member * u_p + k * u_r + u_j * u_m, mask=needed & (u_j < m), other=0.0).to(tl.float32)
        if GATHER:
            own = part * PADDED + tl.arange(0, PADDED)[None, :] < RANK
            acc += tl.sum(tl.where(own, low, 0.0)[:, :, None] * u_tile, 1)
        else:
            column = tl.arange(0, COLUMNS)[None, :]
            own = member_R[:, None] == row_tile * BLOCK_R // batch + column // PADDED
            own &= part * PADDED + column % PADDED < RANK
            # Of 16-bit dtypes TF32 keeps u whole and x v^T to 11 bits and without overflow; "ieee" keeps float32.
            acc = tl.dot(tl.where(own, low, 0.0), u_tile, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + m_M, mask=m_M < m, other=0.0).to(tl.float32)[None, :]
    out_RM = out + row_R.to(tl.int64)[:, None] * m + m_M[None, :]
    tl.store(out_RM, acc.to(dtype), mask=(row_R < rows)[:, None] & (m_M < m)[None, :])


def linear(
    x_PBn: Tensor, weight_mn: Tensor, u_Prm: Tensor, v_Prn: Tensor, bias_m: Tensor | None = None, *, tf32: bool = False
) -> Tensor:
    """Rows through ``weight + u_p^T v_p``: ``x W^T + bias + (x v_p^T) u_p``, contiguous ``(P, B, m)`` of x's dtype.

    Args:
        x_PBn: float32, bfloat16 or float16, any strides: one input for all members is ``x.expand(P, B, n)``.
        weight_mn: the center, any strides.
        u_Prm: ``A^T`` times ``sigma / sqrt(r)`` and the sign, any strides. Must be finite, or members beside it suffer.
        v_Prn: ``B^T``, any strides. In 16 bits its loads run ahead only where the last stride is 1, for speed.
        bias_m: the same for all members.
        tf32: multiply float32 on tensor cores, in TF32 (11 significant bits). No matter for other dtypes.

    Raises:
        ValueError: the shapes do not fit, or dtypes or devices are not those of x.
    """
    rank = u_Prm.shape[1] if u_Prm.ndim == 3 else 0
    _check(x_PBn, weight_mn, bias_m, rank)
    members, _, n = x_PBn.shape
    _require("u_Prm", u_Prm, (members, rank, weight_mn.shape[0]), x_PBn.dtype, x_PBn.device)
    _require("v_Prn", v_Prn, (members, rank, n), x_PBn.dtype, x_PBn.device)
    return _launch(x_PBn, weight_mn, bias_m, u_Prm, v_Prn, tf32)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES or x.shape[0] * x.shape[1] > MAX_ROWS:
        raise ValueError(
            "x_PBn must be (members, rows, n) of float32, bfloat16 or float16, with at most 2**31 - 128 rows in all; "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if rank < 1:
        raise ValueError(f"rank (={rank}) must be at least 1, and factors (members, rank, size)")
    outputs = weight.shape[:1]
    _require("weight_mn", weight, (*outputs, x.shape[2]), x.dtype, x.device)
    if bias is not None:
        _require("bias_m", bias, tuple(outputs), x.dtype, x.device)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {shape} on {device}; got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _plan(x: Tensor, m: int, rank: int, *, tensor_cores: bool) -> dict[str, Any]:
    """The kernel's constants and options, by shape and dtype alone."""
    members, batch, n = x.shape
    gather = batch < MIN_BATCH
    # A thread holds all its entries of a tile of factors at once.
    padded = min(triton.next_power_of_2(rank), 32)
    if gather:
        side = 64
        while side > 16 and side * side * padded > 8192:
            side //= 2
        columns, block_r, block_m, block_n = padded, side, side, side
    else:
        # Where the loop is short, two small blocks on a multiprocessor hide one another's beginnings and ends.
        sizes = [size for size in (128, 64, 32) if size <= (128 if tensor_cores else 64) and size < 2 * members * batch]
        block_r = next((size for size in sizes if padded * _members_in(size, batch) <= 32), 16)
        columns = padded * _members_in(block_r, batch)
        block_m, block_n = (128 if n <= 512 else 256, 128 // x.element_size()) if tensor_cores else (128, 16)
    block_m = min(block_m, max(16, triton.next_power_of_2(m)))
    block_n = min(block_n, max(16, triton.next_power_of_2(n)))
    while block_m > 32 and triton.cdiv(members * batch, block_r) * triton.cdiv(m, block_m) < MULTIPROCESSORS:
        block_m //= 2
    return {
        "PARTS": triton.cdiv(rank, padded),
        "PADDED": padded,
        "COLUMNS": max(MIN_COLUMNS, columns),
        "BLOCK_R": block_r,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "GATHER": gather,
        "STAGES": 3,
        "num_warps": 8 if block_r * block_m > 16384 else 4,
    }


def _members_in(block_r: int, batch: int) -> int:
    """The most members that a tile of rows can meet, as a power of two."""
    if batch % block_r == 0 or block_r % batch == 0:
        return max(1, block_r // batch)
    return triton.next_power_of_2((block_r - 2) // batch + 2)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, tf32: bool) -> Tensor:
    m, rank = weight.shape[0], u.shape[1]
    out = torch.empty((*x.shape[:2], m), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tensor_cores = tf32 or x.dtype != torch.float32
    plan = _plan(x, m, rank, tensor_cores=tensor_cores)
    tiles = triton.cdiv(out.numel() // m, plan["BLOCK_R"]) * triton.cdiv(m, plan["BLOCK_M"])
    tensors = (x, weight, None if bias is None else bias.contiguous(), out, u, v)
    sizes = (*x.shape[:2], m, x.shape[2], *x.stride(), *weight.stride(), *u.stride(), *v.stride())
    with torch.cuda.device_of(out):
        linear_kernel[(tiles,)](*tensors, *sizes, RANK=rank, PRECISION="tf32" if tensor_cores else "ieee", **plan)
    return out
