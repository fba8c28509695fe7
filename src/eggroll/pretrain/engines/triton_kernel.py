"""The integer model's forward pass as one Triton kernel, which stays on the GPU over all layers and tokens.

Members do not depend on each other, so a block of threads takes BLOCK_R of them through their windows by itself: the
weights come from the L2 cache again and again, what it has computed stays in a few bytes of scratch memory per row
(in L1, mostly), and nothing is launched in between. Each product's low-rank term, division and clipping follow on its
int32 sums while they are in registers:

    out = I8((x W^T + (((x . B) A) >> shift)) // divisor)           row by row, each with its member's A and B

A and B are read where they lie: in the table of noise, or in a buffer of draws. Sums are exact, so results are those
of every other engine, bit for bit. Imports triton, so it is itself imported only for a CUDA device.

Suffixes: M members, T tokens, V vocabulary, L layers, D width. In the kernel R is the rows of a block of threads, and
N and M are the inputs and outputs of a tile; ``x_R`` and the like are pointers to the beginning of each row's own.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.shape import MLP_FACTOR, ModelShape

VECTORS = ("ln1", "gru.bf", "gru.bh", "ln2")
"""Of a layer, in the order in which the kernel reads them."""
MATRICES = ("gru.Wf", "gru.Uf", "gru.Wh", "gru.Uh", "mlp.up", "mlp.down")
SCRATCH = 4 + MLP_FACTOR
"""Widths of scratch memory per row: x, its norm, what the gate keeps, the gate, and the MLP's inside."""

_divisor = triton.constexpr_function(fixed_point.divisor)


@triton.constexpr_function
def _logarithm(n: int) -> int:
    """To base two, or -1 where there is none."""
    return n.bit_length() - 1 if n & (n - 1) == 0 else -1


@triton.constexpr_function
def _whole(end: int, tile: int) -> bool:
    """Whether no tile reaches over the end."""
    return end % tile == 0


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, -127), 127)


@triton.jit
def _load(x_R, i_I, END: tl.constexpr):
    """Columns of rows, as they are in memory; 0 from END on. Without a mask where there is no end within the tile."""
    if _whole(END, i_I.shape[0]):
        return tl.load(x_R[:, None] + i_I[None, :])
    else:
        return tl.load(x_R[:, None] + i_I[None, :], mask=(i_I < END)[None, :], other=0)


@triton.jit
def _store(x_R, i_I, value_RI, END: tl.constexpr):
    tl.store(x_R[:, None] + i_I[None, :], value_RI.to(tl.int8), mask=(i_I < END)[None, :])


@triton.jit
def _draw(noise, offset_R, RANK: tl.constexpr):
    """Where the draws of a parameter begin: for each rank B, then A."""
    if RANK > 0:
        return noise + tl.load(offset_R)
    else:
        return offset_R  # is not read


@triton.jit
def _scales(
    x_R, draw_R, sign_R, scale_R, N: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``sign (x . B)`` of all ranks, into ``scale_R``."""
    for k in tl.static_range(RANK):
        total_R = tl.zeros_like(sign_R)
        for first in range(0, N, BLOCK_N):
            n_N = first + tl.arange(0, BLOCK_N)
            b_RN = _load(draw_R + k * (N + M), n_N, N).to(tl.int32)
            total_R += tl.sum(_load(x_R, n_N, N).to(tl.int32) * b_RN, 1)
        tl.store(scale_R + k, total_R * sign_R)


@triton.jit
def _product(
    x_R, weight, m_M, draw_R, scale_R, N: tl.constexpr, M: tl.constexpr,
    RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of a product, int32 from -127 to 127."""
    total_RM = tl.zeros((x_R.shape[0], m_M.shape[0]), dtype=tl.int32)
    for first in range(0, N, BLOCK_N):
        n_N = first + tl.arange(0, BLOCK_N)
        weights = weight + m_M[None, :] * N + n_N[:, None]
        if _whole(N, BLOCK_N) and _whole(M, m_M.shape[0]):
            weight_NM = tl.load(weights)
        else:
            weight_NM = tl.load(weights, mask=(m_M < M)[None, :] & (n_N < N)[:, None], other=0)
        total_RM = tl.dot(_load(x_R, n_N, N), weight_NM, total_RM, out_dtype=tl.int32)
    if RANK > 0:
        term_RM = tl.zeros_like(total_RM)
        for k in tl.static_range(RANK):
            a_RM = _load(draw_R + (k * (N + M) + N), m_M, M).to(tl.int32)
            term_RM += tl.load(scale_R + k)[:, None] * a_RM
        total_RM += term_RM >> NOISE_SHIFT
    DIVISOR: tl.constexpr = _divisor(N)
    SHIFT: tl.constexpr = _logarithm(DIVISOR)
    if SHIFT >= 0:
        return _clip(total_RM >> SHIFT)
    else:
        quotient = total_RM // DIVISOR  # towards zero, on a GPU
        return _clip(tl.where(total_RM - quotient * DIVISOR < 0, quotient - 1, quotient))


@triton.jit
def _layer_norm(x_R, weight_R, to_R, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """``I8((x w) // max(1, sum|x| // D))``.

    With 0.5 added, a quotient of ``|x w| <= 127^2`` and a size of at most 127 is 0.5 / size or more away from the next
    integer, a hundred times what float32 rounds off, so its floor is exact; integers divide in some 20 operations.
    """
    total_R = tl.zeros((x_R.shape[0],), dtype=tl.int32)
    for first in range(0, D, BLOCK_M):
        total_R += tl.sum(tl.abs(_load(x_R, first + tl.arange(0, BLOCK_M), D).to(tl.int32)), 1)
    inverse_R = 1.0 / tl.maximum(total_R // D, 1).to(tl.float32)
    for first in range(0, D, BLOCK_M):
        d_M = first + tl.arange(0, BLOCK_M)
        product_RM = _load(x_R, d_M, D).to(tl.int32) * _load(weight_R, d_M, D).to(tl.int32)
        quotient_RM = tl.floor((product_RM.to(tl.float32) + 0.5) * inverse_R[:, None]).to(tl.int32)
        _store(to_R, d_M, _clip(quotient_RM), D)


@triton.jit
def _embed(
    token_R, emb, draw_R, sign_R, x_R, V: tl.constexpr, D: tl.constexpr,
    RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of the table, each with its member's ``(B[token] A) >> shift``."""
    for first in range(0, D, BLOCK_M):
        d_M = first + tl.arange(0, BLOCK_M)
        x_RM = _load(emb + token_R * D, d_M, D).to(tl.int32)
        if RANK > 0:
            term_RM = tl.zeros_like(x_RM)
            for k in tl.static_range(RANK):
                b_R = tl.load(draw_R + k * (V + D) + token_R).to(tl.int32) * sign_R
                term_RM += b_R[:, None] * _load(draw_R + (k * (V + D) + V), d_M, D).to(tl.int32)
            x_RM = _clip(x_RM + (term_RM >> NOISE_SHIFT))
        _store(x_R, d_M, x_RM, D)


@triton.jit
def _recurrence(
    x_R, u_R, kept_R, gate_R, s_R, vector_R, weight, noise, offset_R, rows, sign_R, scale_R,
    D: tl.constexpr, RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a layer: moves the state, and adds it to x. ``offset_R`` is that of ln1, the first of a layer's ten."""
    _layer_norm(x_R, vector_R, u_R, D, BLOCK_M)
    wf_R, uf_R = _draw(noise, offset_R + rows, RANK), _draw(noise, offset_R + 2 * rows, RANK)
    wh_R, uh_R = _draw(noise, offset_R + 3 * rows, RANK), _draw(noise, offset_R + 4 * rows, RANK)
    tl.debug_barrier()
    _scales(u_R, wf_R, sign_R, scale_R, D, D, RANK, BLOCK_N)
    _scales(s_R, uf_R, sign_R, scale_R + RANK, D, D, RANK, BLOCK_N)
    _scales(u_R, wh_R, sign_R, scale_R + 2 * RANK, D, D, RANK, BLOCK_N)
    tl.debug_barrier()
    for first in range(0, D, BLOCK_M):
        d_M = first + tl.arange(0, BLOCK_M)
        f_RM = _product(u_R, weight, d_M, wf_R, scale_R, D, D, RANK, NOISE_SHIFT, BLOCK_N)
        f_RM += _product(s_R, weight + D * D, d_M, uf_R, scale_R + RANK, D, D, RANK, NOISE_SHIFT, BLOCK_N)
        f_RM = _clip(f_RM + _load(vector_R + D, d_M, D).to(tl.int32))
        _store(gate_R, d_M, f_RM, D)
        _store(kept_R, d_M, ((f_RM + 127) * _load(s_R, d_M, D).to(tl.int32)) >> 8, D)
    tl.debug_barrier()
    _scales(kept_R, uh_R, sign_R, scale_R, D, D, RANK, BLOCK_N)
    tl.debug_barrier()
    for first in range(0, D, BLOCK_M):
        d_M = first + tl.arange(0, BLOCK_M)
        h_RM = _product(u_R, weight + 2 * D * D, d_M, wh_R, scale_R + 2 * RANK, D, D, RANK, NOISE_SHIFT, BLOCK_N)
        h_RM += _product(kept_R, weight + 3 * D * D, d_M, uh_R, scale_R, D, D, RANK, NOISE_SHIFT, BLOCK_N)
        h_RM = _clip(h_RM + _load(vector_R + 2 * D, d_M, D).to(tl.int32))
        s_RM = _load(s_R, d_M, D).to(tl.int32)
        s_RM += ((_load(gate_R, d_M, D).to(tl.int32) + 127) * (h_RM - s_RM)) >> 8
        _store(x_R, d_M, _clip(_load(x_R, d_M, D).to(tl.int32) + s_RM), D)
        _store(s_R, d_M, s_RM, D)


@triton.jit
def _mlp(
    x_R, u_R, wide_R, vector_R, weight, noise, offset_R, rows, sign_R, scale_R,
    D: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a layer: adds to x. ``offset_R`` is that of ln1, the first of a layer's ten."""
    _layer_norm(x_R, vector_R, u_R, D, BLOCK_M)
    up_R, down_R = _draw(noise, offset_R + 8 * rows, RANK), _draw(noise, offset_R + 9 * rows, RANK)
    tl.debug_barrier()
    _scales(u_R, up_R, sign_R, scale_R, D, WIDE, RANK, BLOCK_N)
    tl.debug_barrier()
    for first in range(0, WIDE, BLOCK_M):
        m_M = first + tl.arange(0, BLOCK_M)
        _store(wide_R, m_M, _product(u_R, weight, m_M, up_R, scale_R, D, WIDE, RANK, NOISE_SHIFT, BLOCK_N), WIDE)
    tl.debug_barrier()
    _scales(wide_R, down_R, sign_R, scale_R + RANK, WIDE, D, RANK, BLOCK_N)
    tl.debug_barrier()
    for first in range(0, D, BLOCK_M):
        d_M = first + tl.arange(0, BLOCK_M)
        x_RM = _product(
            wide_R, weight + WIDE * D, d_M, down_R, scale_R + RANK, WIDE, D, RANK, NOISE_SHIFT, BLOCK_N
        )  # fmt: skip
        _store(x_R, d_M, _clip(x_RM + _load(x_R, d_M, D).to(tl.int32)), D)


@triton.jit(do_not_specialize=["steps", "layers"])  # or one token and one layer were kernels of their own
def forward_kernel(
    tokens, emb, blocks, head, vectors, vector_stride, noise, offsets, signs, state, scratch, scales, exp2, log2,
    likelihood, logits, rows, steps, layers, V: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    RANK: tl.constexpr, NOISE_SHIFT: tl.constexpr, LOGITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The windows of BLOCK_R members. ``rows`` is a multiple of that; ``log2`` is padded to 511 thresholds.

    Scratch memory is written by some threads of a block and read by others: hence the barriers.
    """
    row_R = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    x_R = scratch + row_R * (4 * D + WIDE)
    u_R, kept_R, gate_R, wide_R = x_R + D, x_R + 2 * D, x_R + 3 * D, x_R + 4 * D
    vector_R, offset_R, scale_R = vectors + row_R * vector_stride, offsets + row_R, scales + row_R * (3 * RANK)
    sign_R = tl.load(signs + row_R)
    for t in range(steps):
        token_R = tl.load(tokens + row_R * (steps + 1) + t)
        for layer in range(layers):
            for first in range(0, D, BLOCK_M):
                d_M = first + tl.arange(0, BLOCK_M)
                s_R = state + (row_R * layers + layer) * D
                begins = (token_R == 0)[:, None] & (d_M < D)[None, :]
                tl.store(s_R[:, None] + d_M[None, :], tl.zeros((BLOCK_R, BLOCK_M), tl.int8), mask=begins)
        _embed(token_R, emb, _draw(noise, offset_R, RANK), sign_R, x_R, V, D, RANK, NOISE_SHIFT, BLOCK_M)
        tl.debug_barrier()
        # Offsets are in the order of the parameters: the embedding, the layers, ln_out, the head.
        weight, s_R, v_R, layer_R = blocks, state + row_R * layers * D, vector_R, offset_R + rows
        for _ in range(layers):
            _recurrence(
                x_R, u_R, kept_R, gate_R, s_R, v_R, weight, noise, layer_R, rows, sign_R, scale_R,
                D, RANK, NOISE_SHIFT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            tl.debug_barrier()
            _mlp(
                x_R, u_R, wide_R, v_R + 3 * D, weight + 4 * D * D, noise, layer_R, rows, sign_R, scale_R,
                D, WIDE, RANK, NOISE_SHIFT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            tl.debug_barrier()
            weight, s_R, v_R, layer_R = weight + (4 * D * D + 2 * WIDE * D), s_R + D, v_R + 4 * D, layer_R + 10 * rows
        _layer_norm(x_R, v_R, u_R, D, BLOCK_M)
        head_R = _draw(noise, layer_R + rows, RANK)
        tl.debug_barrier()
        _scales(u_R, head_R, sign_R, scale_R, D, V, RANK, BLOCK_N)
        tl.debug_barrier()
        target_R = tl.load(tokens + row_R * (steps + 1) + t + 1)
        total_R, chosen_R = tl.zeros_like(sign_R), tl.zeros_like(sign_R)
        for first in range(0, V, BLOCK_M):
            v_M = first + tl.arange(0, BLOCK_M)
            y_RM = _product(u_R, head, v_M, head_R, scale_R, D, V, RANK, NOISE_SHIFT, BLOCK_N)
            if LOGITS:
                _store(logits + (row_R * steps + t) * V, v_M, y_RM, V)
            total_R += tl.sum(tl.where((v_M < V)[None, :], tl.load(exp2 + y_RM + 128), 0), 1)
            chosen_R += tl.sum(tl.where(v_M[None, :] == target_R[:, None], y_RM + 128, 0), 1)
        bits_R = tl.zeros_like(sign_R)  # how many of the thresholds the sum reaches, by halving
        for power in tl.static_range(9):
            reached_R = tl.load(log2 + bits_R + ((256 >> power) - 1)) <= total_R
            bits_R += reached_R.to(tl.int32) * (256 >> power)
        tl.store(likelihood + row_R * steps + t, chosen_R - bits_R)
        tl.debug_barrier()


@dataclass(frozen=True)
class Weights:
    """A model's weights as the kernel reads them, on the device."""

    emb: Tensor
    blocks: Tensor
    head: Tensor
    exp2: Tensor
    log2: Tensor

    @classmethod
    def pack(cls, weights: dict[str, Tensor], shape: ModelShape) -> Weights:
        """From the model's int8 tensors by name."""
        device = weights["emb"].device
        parts = [weights[f"blocks.{i}.{name}"].flatten() for i in range(shape.n_layers) for name in MATRICES]
        thresholds = fixed_point.log2_thresholds()
        padded = np.full(511, np.iinfo(np.int32).max, np.int32)
        padded[: len(thresholds)] = thresholds
        exp2, log2 = (torch.from_numpy(table).to(device) for table in (fixed_point.exp2_table(), padded))
        return cls(weights["emb"], torch.cat(parts), weights["head"], exp2, log2)


@dataclass(frozen=True)
class Draws:
    """The perturbations of some members.

    Attributes:
        noise: int8, a table or a buffer.
        offsets: ``(P, M)`` int64, where in it the draw of a parameter (in the model's order) begins.
        signs: ``(M,)`` int32.
        rank: of all.
        shift: of all.
    """

    noise: Tensor
    offsets: Tensor
    signs: Tensor
    rank: int
    shift: int


def forward(
    weights: Weights, shape: ModelShape, tokens: Tensor, state: Tensor, vectors: Tensor, draws: Draws | None, *,
    logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Run windows through the model, or through members.

    Args:
        weights: of the model.
        shape: of the model.
        tokens: ``(M, T + 1)`` integers; the last is only a target.
        state: ``(M, L, D)`` int8 before the first token.
        vectors: ``(M, 4 L + 1, D)`` int8, or with one row for all: ``VECTORS`` of each layer and ln_out, perturbed.
        draws: of everything else, or ``None``.
        logits: whether to keep them.

    Returns:
        The log likelihood ``(M, T)`` int32, the state after the last input ``(M, L, D)`` int8, and the logits
        ``(M, T, V)`` int8.
    """
    (members, length), device = tokens.shape, tokens.device
    plan = make_plan(members, shape)
    rows = triton.cdiv(members, plan["BLOCK_R"]) * plan["BLOCK_R"]

    def padded(x: Tensor, dim: int = 0) -> Tensor:
        space = [0] * (2 * (x.dim() - 1 - dim)) + [0, rows - members]
        return torch.nn.functional.pad(x, space).contiguous()

    shared = len(vectors) == 1
    rank = draws.rank if draws else 0
    made = torch.empty((rows, length - 1), dtype=torch.int32, device=device)
    kept = torch.empty((rows if logits else 0, length - 1, shape.vocab), dtype=torch.int8, device=device)
    after = padded(state)
    after = after.clone() if after.data_ptr() == state.data_ptr() else after  # it is changed in place
    scratch = torch.empty((rows, SCRATCH * shape.hidden), dtype=torch.int8, device=device)
    scales = torch.empty((rows, 3 * max(rank, 1)), dtype=torch.int32, device=device)
    offsets = padded(draws.offsets, 1) if draws else torch.zeros(rows, dtype=torch.int64, device=device)
    signs = padded(draws.signs) if draws else torch.zeros(rows, dtype=torch.int32, device=device)
    with torch.cuda.device_of(made):
        forward_kernel[(rows // plan["BLOCK_R"],)](
            padded(tokens.int()), weights.emb, weights.blocks, weights.head,
            vectors.contiguous() if shared else padded(vectors), 0 if shared else vectors[0].numel(),
            draws.noise if draws else weights.emb, offsets, signs, after, scratch, scales, weights.exp2, weights.log2,
            made, kept, rows, length - 1, shape.n_layers, V=shape.vocab, D=shape.hidden,
            WIDE=MLP_FACTOR * shape.hidden, RANK=rank, NOISE_SHIFT=draws.shift if draws else 0, LOGITS=logits, **plan,
        )  # fmt: skip
    return made[:members], after[:members], kept[:members] if logits else None


def make_plan(members: int, shape: ModelShape) -> dict[str, Any]:
    """The kernel's tiles, by sizes alone: what int8 tensor cores take at least is 16 x 16 x 32.

    Many rows, because each block reads all weights for its own; few outputs at once, because registers end there.
    """
    power = triton.next_power_of_2
    return {
        "BLOCK_R": min(128, max(16, power(members))),
        "BLOCK_M": min(64, max(16, power(shape.hidden))),
        "BLOCK_N": min(128, max(32, power(shape.hidden))),
        "num_warps": 8,
        "num_stages": 2,
    }
