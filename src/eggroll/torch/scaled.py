"""Weights whose scales are perturbed, for quantized formats whose codes stay as they are (QZO, arXiv 2505.13430).

A quantized weight has a scale (and perhaps an offset) for each of ``G`` groups of columns of each row. Member ``p``
multiplies those of row ``i`` and group ``g`` by ``1 + sigma * E_p[i, g]``, and with them every weight of the group:

    W_p[i, j] = W[i, j] * (1 + sigma * E_p[i, g(j)]),      E_p = A_p B_p^T / sqrt(r),  A_p (m, r),  B_p (G, r)

so a member's product is ``1 + r`` products of the format's own kernel with the same codes, and with one group for each
row a single one:

    x W_p^T = x W^T + sum_k ((x * b_k[g(.)]) W^T) * a_k          a_k, b_k: columns of the factors, sigma/sqrt(r) in a_k

Shapes: P members, R rows (= P * batch), n in, m out, r rank, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.perturbed import PerturbedWeight
from eggroll.torch.quantized.grid import by_group
from eggroll.torch.quantized.tensor import plain


class ScaledWeight(PerturbedWeight):
    """``base * (1 + a b^T)`` for every member, a factor for each group of columns: ``base`` quantized, ``(m, n)``.

    Args:
        base: the center, a :class:`~eggroll.torch.quantized.tensor.QuantizedTensor`.
        a: ``(P, m, r)``, or without ``P`` for a single member; sigma, 1/sqrt(r) and the sign are in it.
        b: ``(P, G, r)``, likewise.
    """

    @property
    def product(self) -> Any:
        """What multiplies rows, or the input of a single member, with all members' matrices."""
        return self.times

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W_p^T`` for rows ``x (P * batch, ..., n)``, or of a single member for ``(..., n)``; ``bias`` of all."""
        a_Pmr, b_PGr = self._with_members(self.a), self._with_members(self.b)
        members, groups = b_PGr.shape[:2]
        x = x.contiguous()
        base = F.linear(x, self.base)
        base_PRm = base.view(members, -1, base.shape[-1])
        if groups == 1:
            out_PRm = base_PRm * (1 + a_Pmr @ b_PGr.transpose(1, 2)).transpose(1, 2)
        else:
            out_PRm = base_PRm
            x_PRGn = x.view(members, -1, groups, x.shape[-1] // groups)
            for k in range(a_Pmr.shape[-1]):
                term = F.linear((x_PRGn * b_PGr[:, None, :, None, k]).view(x.shape), self.base)
                out_PRm = torch.addcmul(out_PRm, term.view(base_PRm.shape), a_Pmr[:, None, :, k])
        out = out_PRm.view(base.shape)
        return out if bias is None else out + bias

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of an embedding by number: ``(P * batch, ...)`` ids, or any of a single member, to ``(*ids, n)``."""
        a_Pmr, b_PGr = self._with_members(self.a), self._with_members(self.b)
        members, m, rank = a_Pmr.shape
        offsets = torch.arange(members, device=ids.device).unsqueeze(1) * m
        a_PRr = a_Pmr.reshape(-1, rank)[ids.reshape(members, -1) + offsets]
        factors_PRG = 1 + a_PRr @ b_PGr.transpose(1, 2)
        base = F.embedding(ids, self.base)
        return (base.view(*factors_PRG.shape, -1) * factors_PRG.unsqueeze(-1)).view(base.shape)

    def dense(self) -> Tensor:
        """All members materialized, ``(P, m, n)``, or ``(m, n)`` for a single member; see the base class."""
        self.check_size()
        wide = torch.promote_types(self.base.dtype, torch.float32)
        factors = 1 + self.a.to(wide) @ self.b.to(wide).transpose(-1, -2)
        n = self.base.shape[-1]
        spread = by_group(factors.reshape(-1, factors.shape[-1]), n).view(*factors.shape[:-1], n)
        return (plain(self.base).to(wide) * spread).to(self.base.dtype)

    def _with_members(self, factor: Tensor) -> Tensor:
        return factor.unsqueeze(0) if self.context.single else factor
