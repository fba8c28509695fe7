"""Products with a low-rank term: ``x W^T + (x B) A^T``, the arithmetic at the centre of everything (EGGROLL section 4).

Plain tensors in, plain tensors out. The low-rank term costs ``r (m + n)`` multiply-adds per row beside ``m n``, so what
counts on small shapes is the number of launches and the passes over memory. On a CPU with a C compiler the term is one
call (:mod:`eggroll.torch.kernels.low_rank_c`); elsewhere there are as few as eager PyTorch allows: one product for
``x B`` and one in-place update of the base product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.kernels import low_rank_c


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
    """Rows ``(P * batch, ..., n)`` through ``weight + a_p b_p^T``: ``(P * batch, ..., m)``."""
    members = a_Pmr.shape[0]
    x_Rn = x_Rn.contiguous()  # strided rows would be multiplied one by one, each with a copy of the weight in bfloat16
    out = F.linear(x_Rn, weight_mn, bias_m)
    if low_rank_c.add_(out, x_Rn, a_Pmr, b_Pnr) or out.numel() == 0:
        return out
    x_PRn = x_Rn.reshape(members, -1, x_Rn.shape[-1])
    out_PRm = out.view(members, -1, out.shape[-1])
    add_low_rank_(out_PRm, x_PRn, a_Pmr, b_Pnr)
    return out


def linear_shared(x_n: Tensor, weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """One input ``(..., n)`` for all members: ``(P, ..., m)``."""
    members = a_Pmr.shape[0]
    base = F.linear(x_n, weight_mn, bias_m)
    x_Rn = x_n.reshape(-1, x_n.shape[-1])
    low = (x_Rn @ b_Pnr) @ a_Pmr.transpose(1, 2)
    return base.unsqueeze(0) + low.reshape(members, *base.shape)


def matmul_single(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x @ (weight + a b^T)`` of one member: ``weight (*, n, m)``, ``a (*, n, r)``, ``b (*, m, r)``."""
    return x @ weight + (x @ a) @ b.transpose(-1, -2)


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
