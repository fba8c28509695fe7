"""Rules for convolutions; their arithmetic is in `eggroll.torch.low_rank_conv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from eggroll.torch.layout.rules import layout_of
from eggroll.torch.low_rank_conv import CONVOLUTIONS, convolution
from eggroll.torch.ops.elementwise import per_channel
from eggroll.torch.ops.per_member import per_member
from eggroll.torch.ops.registry import RULES, Rule
from eggroll.torch.perturbed import MemberTensor, PerturbedWeight, Value


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
        x_PRC = x.reshape(weight.a.shape[0], -1, *x.shape[1:])
        b_Pm = bias.data_P if isinstance(bias, MemberTensor) else bias
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return convolution(x_PRC, weight.base, weight.a, weight.b, b_Pm, **settings).flatten(0, 1)

    return apply


for _dims, _func in CONVOLUTIONS.items():
    RULES[_func] = _convolution(_func, _dims)
