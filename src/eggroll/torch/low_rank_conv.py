"""Convolutions whose kernels have a low-rank term: a kernel is the matrix ``(C_out, C_in/groups * k)``.

``conv(x, W + A B^T) = conv(x, W) + A conv(x, B)``, where ``B`` is ``r`` small kernels. But kernels are small beside the
activations that they meet, and a convolution to ``r`` channels costs almost as much time as one to all of them. So in
float32 and float64 on a CPU the members' kernels are made, and members are convolved one by one where each has enough
rows to fill the cores (which keeps their activations in cache: faster than one convolution over all rows), or as groups
of one convolution where they have few. In 16 bit a kernel would lose its perturbation to rounding, and on a GPU
groups are slow: there the term is added to the base product. So it is everywhere for an input that all members share:
its base product is made once, and the members' ``B`` are the output channels of one convolution.

Shapes: P members, R rows of a member, C channels, ``...`` one to three dimensions of space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MIN_WORK_ALONE = 2**21
"""Multiply-adds of a member from which on members are convolved one by one: a call's 20 µs are little beside them."""
KERNEL_BYTES = 2**26
"""Members' kernels that exist at once."""


def convolution(
    x_PRC: Tensor,
    weight: Tensor,
    a_Pmr: Tensor,
    b_Pnr: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``conv(x[p], W + a_p b_p^T) + bias``: ``(P, R, C_out, ...)``.

    Args:
        x_PRC: ``(P, R, C_in, ...)``, or ``(1, R, C_in, ...)``: the same for all members.
        weight: the center ``(C_out, C_in/groups, ...)``.
        a_Pmr: ``(P, C_out, r)``, scaled and signed.
        b_Pnr: ``(P, C_in/groups * k, r)``.
        bias: ``(C_out,)``, ``(P, C_out)`` or ``None``.
        stride: and the rest as for ``torch.nn.functional.conv2d``.
        padding: likewise.
        dilation: likewise.
        groups: of channels.
    """
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    wide = x_PRC.dtype in (torch.float32, torch.float64)
    if groups == 1 and x_PRC.shape[0] == 1:
        out = _shared(x_PRC[0], weight, a_Pmr, b_Pnr, settings)
    elif groups == 1 and not (wide and x_PRC.device.type == "cpu"):
        out = _base_and_term(x_PRC, weight, a_Pmr, b_Pnr, settings)
    else:
        out = _by_kernels(x_PRC, weight, a_Pmr, b_Pnr, groups, settings)
    if bias is None:
        return out
    spatial = (1,) * (x_PRC.ndim - 3)
    return out + bias.view(*((bias.shape[0], 1) if bias.ndim > 1 else ()), -1, *spatial)


def _shared(x_RC: Tensor, weight: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, settings: dict[str, Any]) -> Tensor:
    """``conv(x, W) + A conv(x, B)`` for one input: one pass over the result for each rank."""
    conv = CONVOLUTIONS[weight.ndim - 2]
    members, channels, rank = a_Pmr.shape
    kernels = b_Pnr.transpose(1, 2).reshape(-1, *weight.shape[1:])
    base_RC = conv(x_RC, weight, **settings)
    low_PrR = conv(x_RC, kernels, **settings).unflatten(1, (members, rank)).movedim(0, 2).unsqueeze(3)
    a_rP = a_Pmr.view(members, 1, channels, rank, *[1] * (weight.ndim - 2)).movedim(3, 0)
    out = torch.addcmul(base_RC.unsqueeze(0), a_rP[0], low_PrR[:, 0])
    for k in range(1, rank):
        out.addcmul_(a_rP[k], low_PrR[:, k])
    return out


def _by_kernels(
    x_PRC: Tensor, weight: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, groups: int, settings: dict[str, Any]
) -> Tensor:
    """The members' kernels, made and applied: one member after the other, or as groups of one convolution."""
    conv = CONVOLUTIONS[weight.ndim - 2]
    members = a_Pmr.shape[0]
    x_PRC = x_PRC.expand(members, *x_PRC.shape[1:])
    work = x_PRC[0].numel() * weight.shape[0] * weight[0, 0].numel() // groups
    step = max(1, KERNEL_BYTES // (weight.numel() * weight.element_size()))
    found: Tensor | None = None
    for first in range(0, members, step):
        a, b, x = (part[first : first + step] for part in (a_Pmr, b_Pnr, x_PRC))
        count = len(a)
        wide = torch.promote_types(weight.dtype, torch.float32)
        noise = torch.bmm(a.to(wide), b.to(wide).transpose(1, 2)).view(count, *weight.shape)
        kernels = (weight.to(wide) + noise).to(weight.dtype)
        if work >= MIN_WORK_ALONE and x.device.type == "cpu":
            each = (conv(x[p], kernels[p], groups=groups, **settings) for p in range(count))
        else:
            together = conv(x.transpose(0, 1).flatten(1, 2), kernels.flatten(0, 1), groups=groups * count, **settings)
            each = iter(together.unflatten(1, (count, -1)).unbind(1))
        for p, out in enumerate(each, start=first):
            found = out.new_empty((members, *out.shape)) if found is None else found
            found[p] = out
    assert found is not None
    return found


def _base_and_term(x_PRC: Tensor, weight: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, settings: dict[str, Any]) -> Tensor:
    """``conv(x, W) + A conv(x, B)``: the base over all rows at once, the members' ``B`` as groups."""
    conv = CONVOLUTIONS[weight.ndim - 2]
    members = a_Pmr.shape[0]
    base = conv(x_PRC.flatten(0, 1), weight, **settings).unflatten(0, x_PRC.shape[:2])
    kernels = b_Pnr.transpose(1, 2).reshape(-1, *weight.shape[1:])
    low = conv(x_PRC.transpose(0, 1).flatten(1, 2), kernels, groups=members, **settings)
    low_PRr = low.unflatten(1, (members, -1)).transpose(0, 1)
    term = torch.matmul(a_Pmr.unsqueeze(1), low_PRr.flatten(3))
    return base + term.view(*term.shape[:3], *base.shape[3:])
