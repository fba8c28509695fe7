"""Rules for convolutions: a kernel is the matrix ``(C_out, C_in/groups * k)``, and ``B`` is ``r`` small kernels.

``conv(x, W + A B^T) = conv(x, W) + A conv(x, B)``: the low-rank term is one convolution to ``r`` channels (all members
at once, as groups) and a product with ``A`` over channels. With groups in the layer itself, kernels are small and are
materialised, and the members become further groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.ops.elementwise import per_channel
from eggroll.torch.ops.layout import layout_of
from eggroll.torch.ops.per_member import per_member
from eggroll.torch.ops.registry import RULES, Rule
from eggroll.torch.values import MemberTensor, PerturbedWeight, Value


def _by_batch(x_R: Tensor, members: int) -> Tensor:
    """Rows ``(P * B, C, ...)`` to ``(B, P * C, ...)``."""
    x_PB = x_R.reshape(members, -1, *x_R.shape[1:])
    return x_PB.transpose(0, 1).reshape(x_PB.shape[1], members * x_R.shape[1], *x_R.shape[2:])


def _by_member(y_B: Tensor, members: int) -> Tensor:
    """``(B, P * C, ...)`` to ``(P, B, C, ...)``."""
    return y_B.reshape(y_B.shape[0], members, -1, *y_B.shape[2:]).transpose(0, 1)


def _convolution(func: Callable[..., Tensor], dims: int) -> Rule:
    def apply(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        if isinstance(x, Value):
            return NotImplemented
        if not isinstance(weight, Value) and isinstance(bias, MemberTensor) and x.ndim == dims + 2:
            return func(x, weight, None, stride, padding, dilation, groups) + per_channel(bias, dims)
        if not isinstance(weight, PerturbedWeight) or weight.context.single:
            return NotImplemented
        args = (x, weight, bias, stride, padding, dilation, groups)
        if x.ndim != dims + 2:
            return per_member(func, args, {}, layout="shared")
        if layout_of(weight.context, weight.parameter, "conv", x, dims + 1) != "rows":
            return per_member(func, args, {}, layout="shared")
        members = weight.a.shape[0]
        plain_bias = None if isinstance(bias, Value) else bias
        x_B = _by_batch(x, members)
        if groups == 1:
            out_R = func(x, weight.base, plain_bias, stride, padding, dilation)
            out = out_R.view(members, -1, *out_R.shape[1:])
            kernels = weight.b.transpose(1, 2).reshape(-1, *weight.base.shape[1:])
            low = _by_member(func(x_B, kernels, None, stride, padding, dilation, members), members)
            term = torch.matmul(weight.a.unsqueeze(1), low.flatten(3))
            out = out + term.view(out.shape)
        else:
            kernels = weight.dense().flatten(0, 1)
            out = _by_member(func(x_B, kernels, None, stride, padding, dilation, groups * members), members)
            if plain_bias is not None:
                out = out + plain_bias.view(-1, *([1] * dims))
        if isinstance(bias, MemberTensor):
            out = out + bias.data_P.view(members, 1, -1, *([1] * dims))
        return out.reshape(-1, *out.shape[2:])

    return apply


for _func, _dims in ((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3)):
    RULES[_func] = _convolution(_func, _dims)
