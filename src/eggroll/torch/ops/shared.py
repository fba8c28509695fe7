"""An input that is the same for all members, as a value: the base product of the first layer is made once.

``active.expand(x)`` gives every member the same rows. Written out they would be ``P`` copies, and the first layer,
often the largest of a small network, would multiply each of them. :class:`SharedRows` stands for the copies: the layers
that have a rule here use the one batch that there is, and any other operation gets the copies.

Shapes: P members, B rows of a member, R = P * B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import low_rank
from eggroll.torch.low_rank_conv import CONVOLUTIONS, convolution
from eggroll.torch.ops.per_member import is_write
from eggroll.torch.ops.registry import METADATA, Rule, name_of
from eggroll.torch.perturbed import SHARED_INPUT, MemberContext, MemberTensor, PerturbedWeight, Value
from eggroll.torch.scaled import ScaledWeight


class SharedRows(Value):
    """The rows of every member, ``(P * B, ...)``, of which ``data`` ``(B, ...)`` is one member's."""

    data_B: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, context: MemberContext, *, owned: bool = False) -> SharedRows:  # noqa: D102
        assert context.members is not None
        shape = (context.members * data.shape[0], *data.shape[1:])
        return Value.__new__(cls, shape, data.dtype, data.device)  # type: ignore[return-value]

    def __init__(self, data: Tensor, context: MemberContext, *, owned: bool = False) -> None:
        self.data_B, self.context, self.parameter = data, context, SHARED_INPUT
        self.owned = owned  # made by a layer that is not perturbed, so nobody else has the memory

    @property
    def members(self) -> int:
        """P."""
        assert self.context.members is not None
        return self.context.members

    def written_out(self) -> Tensor:
        """The copies."""
        return self.data_B.repeat(self.members, *([1] * (self.data_B.ndim - 1)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_written_out(args), **_written_out(kwargs or {}))


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch function some of whose arguments are shared rows: once if it has a rule, else on the copies."""
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    in_place = bool(is_write(func) or kwargs.get("inplace"))
    rule = None if any(type(arg) is ScaledWeight for arg in args) else _RULES.get(func)
    if in_place and args and isinstance(args[0], SharedRows) and not (args[0].owned and rule is not None):
        raise UnsupportedOperationError(
            f"the input that active.expand made is the same for all members and would be changed in place by "
            f"{name_of(func)}; change it before, or give the model a copy: active.expand(x).clone()"
        )
    if rule is not None:
        result = rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*_written_out(args), **_written_out(kwargs))


def _written_out(tree: Any) -> Any:
    return tree_map_only(SharedRows, SharedRows.written_out, tree)


_RULES: dict[Any, Rule] = {}


def _is_population(x: Any, weight: Any) -> bool:
    """Whether a product of shared rows with a weight of all members has the members' rows in front."""
    if not isinstance(x, SharedRows) or not isinstance(weight, PerturbedWeight) or weight.context.single:
        return False
    return not torch.is_autocast_enabled(x.device.type) and weight.context.is_rows(x.shape[0])


def _of_members(bias: Any, weight: PerturbedWeight) -> bool:
    if isinstance(bias, MemberTensor):
        return bias.data_P.ndim == 2 and bias.dtype == weight.dtype
    return bias is None or not isinstance(bias, Value)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Value) and not isinstance(bias, Value) and isinstance(x, SharedRows):
        out = F.linear(x.data_B, weight, bias) if x.ndim > 1 else None
        return NotImplemented if out is None else SharedRows(out, x.context, owned=True)
    if not _is_population(x, weight) or not _of_members(bias, weight) or x.ndim < 2 or weight.ndim != 2:
        return NotImplemented
    b_Pm = bias.data_P if isinstance(bias, MemberTensor) else bias
    return low_rank.linear_shared(x.data_B, weight.base, weight.a, weight.b, b_Pm).flatten(0, 1)


def _matmul(x: Any, weight: Any, *out_dtype: Any) -> Any:
    is_matrix = (
        not out_dtype and isinstance(weight, PerturbedWeight) and weight.base.ndim == 2 and weight.kind != "conv"
    )
    return _linear(x, weight.transposed()) if is_matrix else NotImplemented


def _addmm(bias: Any, x: Any, weight: Any, *out_dtype: Any, beta: float = 1, alpha: float = 1) -> Any:
    is_matrix = (
        not out_dtype and isinstance(weight, PerturbedWeight) and weight.base.ndim == 2 and weight.kind != "conv"
    )
    return _linear(x, weight.transposed(), bias) if is_matrix and beta == alpha == 1 else NotImplemented


def _convolution(dims: int) -> Rule:
    def rule(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        if not _is_population(x, weight) or not _of_members(bias, weight) or x.ndim != dims + 2:
            return NotImplemented
        b_Pm = bias.data_P if isinstance(bias, MemberTensor) else bias
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x_1BC = x.data_B.unsqueeze(0)
        return convolution(x_1BC, weight.base, weight.a, weight.b, b_Pm, **settings).flatten(0, 1)

    return rule


def _rows_kept(func: Callable[..., Tensor]) -> Rule:
    """Operations that do the same to every row: on the one batch."""

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        others = any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values()))
        if others or not isinstance(x, SharedRows) or x.ndim == 0:
            return NotImplemented
        out = func(x.data_B, *args, **kwargs)
        return SharedRows(out, x.context, owned=x.owned or out.data_ptr() != x.data_B.data_ptr())

    return rule


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(x, SharedRows) or start_dim % max(x.ndim, 1) == 0:
        return NotImplemented
    return SharedRows(x.data_B.flatten(start_dim, end_dim), x.context)


def _view(x: Any, *sizes: Any) -> Any:
    """``x.view(len(x), -1)`` and ``x.view(-1, n)``: other dimensions of a row, the rows as they are."""
    shape = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    if not isinstance(x, SharedRows) or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    own, rest = math.prod(x.data_B.shape[1:]), shape[1:]
    if shape[0] == -1 and math.prod(rest) != own:
        return NotImplemented
    if shape[0] not in (-1, x.shape[0]) or (shape[0] == -1 and -1 in rest):
        return NotImplemented
    return SharedRows(x.data_B.reshape(x.data_B.shape[0], *rest), x.context)


def _index_select(x: Any, dim: int, index: Any) -> Any:
    if not isinstance(x, SharedRows) or isinstance(index, Value) or dim % x.ndim != 0:
        return NotImplemented
    return x.data_B.index_select(0, index % x.data_B.shape[0])


_RULES[F.linear] = _linear
_RULES.update(dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul))
_RULES.update(dict.fromkeys((torch.addmm, Tensor.addmm), _addmm))
_RULES.update({func: _convolution(dims) for dims, func in CONVOLUTIONS.items()})
for _name in ("relu", "tanh", "sigmoid", "gelu", "silu", "to", "float", "double", "half", "bfloat16", "contiguous"):
    for _owner in (torch, Tensor, F):
        if hasattr(_owner, _name):
            _RULES[getattr(_owner, _name)] = _rows_kept(getattr(_owner, _name))
_RULES[torch.flatten] = _RULES[Tensor.flatten] = _flatten
_RULES.update(dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view))
_RULES[Tensor.index_select] = _RULES[torch.index_select] = _index_select
