"""Products with a low-rank term: ``x W^T + (x B) A^T``, the arithmetic at the center of everything (EGGROLL section 4).

Plain tensors in, plain tensors out. The low-rank term costs ``r (m + n)`` multiply-adds per row beside ``m n``, so what
counts on small shapes is the number of launches and the passes over memory. On a CPU with a C compiler the term is one
call (:mod:`eggroll.torch.kernels.low_rank_c`); elsewhere there are as few as eager PyTorch allows: one product for
``x B`` and one in-place update of the base product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll._environment import FUSED_LINEAR, is_on
from eggroll.torch.kernels import low_rank_c
from eggroll.torch.kernels.cache import block_bytes
from eggroll.torch.quantized.tensor import QuantizedTensor

BLOCK_BYTES = block_bytes()
"""Inputs and outputs of a block of members, which are still in cache when the term is added to the base product."""


def add_low_rank_(out_PRm: Tensor, x_PRn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor) -> Tensor:
    """``out += (x b) a^T`` in place, member by member.

    Shapes: ``out (P, R, m)``, ``x (P, R, n)``, ``a (P, m, r)``, ``b (P, n, r)``.
    """
    if a_Pmr.shape[-1] == 1:
        a_P1m, b_P1n = a_Pmr.transpose(1, 2), b_Pnr.transpose(1, 2)
        if x_PRn.shape[1] <= 4:
            scale_PR1 = (x_PRn * b_P1n).sum(-1, keepdim=True)
        else:
            scale_PR1 = torch.bmm(x_PRn, b_Pnr)
        return out_PRm.addcmul_(scale_PR1, a_P1m)
    return out_PRm.baddbmm_(torch.bmm(x_PRn, b_Pnr), a_Pmr.transpose(1, 2))


def linear(x_Rn: Tensor, weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """Rows ``(P * batch, ..., n)`` through ``weight + a_p b_p^T``: ``(P * batch, ..., m)``.

    ``bias`` is ``(m,)``, or ``(P, m)``: one for each member.
    """
    x_Rn = x_Rn.contiguous()  # strided rows would be multiplied one by one, each with a copy of the weight in bfloat16
    quantized = isinstance(weight_mn, QuantizedTensor)  # its product is its library's, whole, whatever its size
    if low_rank_c.can_add(x_Rn, a_Pmr, b_Pnr, bias_m, *(() if quantized else (weight_mn,))):
        if x_Rn.nbytes > BLOCK_BYTES // 2 and not quantized:
            return _linear_in_blocks(x_Rn, weight_mn, a_Pmr, b_Pnr, bias_m)
        out = F.linear(x_Rn, weight_mn)
        low_rank_c.add_unchecked_(out, x_Rn, a_Pmr, b_Pnr, bias_m)
        return out
    members = a_Pmr.shape[0]
    own_bias = bias_m is not None and bias_m.ndim > 1
    plain_bias = None if own_bias else bias_m
    fused = _fused_kernel(x_Rn, weight_mn, a_Pmr, b_Pnr, plain_bias)
    if fused is not None:
        out_PRm = fused(x_Rn.view(members, -1, x_Rn.shape[-1]), weight_mn, a_Pmr.mT, b_Pnr.mT, plain_bias)
        if own_bias:
            assert bias_m is not None
            out_PRm.add_(bias_m.unsqueeze(1))
        return out_PRm.view(*x_Rn.shape[:-1], -1)
    out = F.linear(x_Rn, weight_mn, plain_bias)
    if out.numel() == 0:
        return out
    out_PRm = out.view(members, -1, out.shape[-1])
    add_low_rank_(out_PRm, x_Rn.reshape(members, -1, x_Rn.shape[-1]), a_Pmr, b_Pnr)
    if own_bias:
        assert bias_m is not None
        out_PRm.add_(bias_m.unsqueeze(1))
    return out


class Product:
    """:func:`linear` of one weight that is used again and again, and looked at once.

    Shapes: ``weight (m, n)``, ``a (P, m, r)``, ``b (P, n, r)``. They are not to be replaced (``set_``) meanwhile.
    """

    __slots__ = ("a_Pmr", "b_Pnr", "term", "weight_mn")

    def __init__(self, weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor) -> None:
        self.weight_mn, self.a_Pmr, self.b_Pnr = weight_mn, a_Pmr, b_Pnr
        self.term = low_rank_c.prepare(weight_mn, a_Pmr, b_Pnr)

    def __call__(self, x_Rn: Tensor, bias_m: Tensor | None = None) -> Tensor:
        """Rows ``(P * batch, ..., n)``: ``(P * batch, ..., m)``. ``bias`` is ``(m,)`` or ``(P, m)``."""
        term = self.term
        if term is not None:
            x_Rn = x_Rn.contiguous()
            if x_Rn.nbytes <= BLOCK_BYTES // 2 and term.takes(x_Rn, bias_m):
                out = F.linear(x_Rn, self.weight_mn)
                term.add_(out, x_Rn, bias_m)
                return out
        return linear(x_Rn, self.weight_mn, self.a_Pmr, self.b_Pnr, bias_m)


def _fused_kernel(*parts: Tensor | None) -> Callable[..., Tensor] | None:
    """The Triton kernel that adds the term in the epilogue of the base product, where it is wanted and can be used.

    It is wanted with ``EGGROLL_FUSED_LINEAR=1``: its speed has not been measured on a GPU yet
    (``benchmarks/bench_kernels_cuda.py`` does), so plain operations are the default.
    """
    if not is_on(FUSED_LINEAR):
        return None
    tensors = [part for part in parts if part is not None]
    if not all(part.is_cuda and type(part) in (Tensor, torch.nn.Parameter) for part in tensors):
        return None
    needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in tensors)
    if needs_grad or torch.compiler.is_compiling() or tensors[0].numel() == 0:
        return None
    if torch._C._functorch.maybe_current_level() is not None or len({part.dtype for part in tensors}) > 1:
        return None
    return _triton_linear()


@functools.cache
def _triton_linear() -> Callable[..., Tensor] | None:
    try:
        from eggroll.torch.kernels import linear_triton
    except ImportError:
        return None
    return linear_triton.linear


def _linear_in_blocks(x_Rn: Tensor, weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias_m: Tensor | None) -> Tensor:
    """Block after block of members, so that the term is added while the base product is still in cache."""
    members, m, n = a_Pmr.shape[0], a_Pmr.shape[1], b_Pnr.shape[1]
    out = x_Rn.new_empty((*x_Rn.shape[:-1], m))
    if out.numel() == 0:
        return out
    x_PRn, out_PRm, weight_nm = x_Rn.view(members, -1, n), out.view(members, -1, m), weight_mn.detach().t()
    per_member = (n + m) * out_PRm.shape[1] * x_Rn.element_size()
    step = max(1, BLOCK_BYTES // per_member)
    if members <= step + step // 2:
        step = members
    for first in range(0, members, step):
        part = slice(first, first + step)
        x, y = x_PRn[part], out_PRm[part]
        bias = bias_m[part] if bias_m is not None and bias_m.ndim > 1 else bias_m
        torch.mm(x.view(-1, n), weight_nm, out=y.view(-1, m))
        low_rank_c.add_unchecked_(y, x, a_Pmr[part], b_Pnr[part], bias)
    return out


def linear_shared(x_n: Tensor, weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """One input ``(..., n)`` for all members: ``(P, ..., m)``. ``bias`` is ``(m,)`` or ``(P, m)``.

    The base product is made once, whatever the number of members.
    """
    members, m = a_Pmr.shape[0], a_Pmr.shape[1]
    x_Rn = x_n.reshape(-1, x_n.shape[-1])
    base_Rm = F.linear(x_Rn, weight_mn)
    out = torch.empty((members, *base_Rm.shape), dtype=base_Rm.dtype, device=base_Rm.device)
    if not low_rank_c.add_shared(out, base_Rm, x_Rn, a_Pmr, b_Pnr, bias_m):
        out = torch.baddbmm(base_Rm.unsqueeze(0), x_Rn @ b_Pnr, a_Pmr.transpose(1, 2))
        if bias_m is not None:
            out = out + (bias_m.unsqueeze(1) if bias_m.ndim > 1 else bias_m)
    return out.view(members, *x_n.shape[:-1], m)


def matmul_single(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x @ (weight + a b^T)`` of one member: ``weight (*, n, m)``, ``a (*, n, r)``, ``b (*, m, r)``."""
    return x @ weight + (x @ a) @ b.transpose(-1, -2)


def linear_single(x: Tensor, weight_mn: Tensor, a_mr: Tensor, b_nr: Tensor) -> Tensor:
    """``x (weight + a b^T)^T`` of one member, its weight quantized or not."""
    if isinstance(weight_mn, QuantizedTensor):
        return F.linear(x, weight_mn) + (x @ b_nr) @ a_mr.transpose(-1, -2)
    return matmul_single(x, weight_mn.transpose(-1, -2), b_nr, a_mr)


def embedding(ids_R: Tensor, weight_Vd: Tensor, a_PVr: Tensor, b_Pdr: Tensor) -> Tensor:
    """Rows of ids ``(P * batch, ...)`` gathered from ``weight + a_p b_p^T``: ``(P * batch, ..., d)``."""
    members, vocabulary, rank = a_PVr.shape
    out = F.embedding(ids_R, weight_Vd)
    if low_rank_c.add_gathered_(out, ids_R, a_PVr, b_Pdr) or out.numel() == 0:
        return out
    ids_PR = ids_R.reshape(members, -1)
    offsets = torch.arange(members, device=ids_R.device).unsqueeze(1) * vocabulary
    gathered = a_PVr.reshape(-1, rank)[ids_PR + offsets]
    out_PRd = out.view(members, -1, out.shape[-1])
    out_PRd.baddbmm_(gathered, b_Pdr.transpose(1, 2))
    return out


def embedding_shared(ids: Tensor, weight_Vd: Tensor, a_PVr: Tensor, b_Pdr: Tensor) -> Tensor:
    """One set of ids for all members: ``(P, *ids.shape, d)``."""
    members = a_PVr.shape[0]
    base = F.embedding(ids, weight_Vd)
    low = a_PVr[:, ids.reshape(-1)] @ b_Pdr.transpose(1, 2)
    return base.unsqueeze(0) + low.reshape(members, *base.shape)
