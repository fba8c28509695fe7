"""Elementwise use of vectors: norm scales, biases, gates, position embeddings that meet activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eggroll.torch.layout.rules import ambiguous, layout_in_broadcast, learn
from eggroll.torch.ops.registry import RULES, Rule, flatten_rows, rule
from eggroll.torch.perturbed import MemberTensor, Value


def spread(value: MemberTensor, x: Tensor) -> Tensor:
    """The value's data shaped to broadcast against rows ``x`` viewed as ``(P, batch, ...)``."""
    data = value.data_P
    missing = x.ndim - data.ndim + 1
    assert missing >= 0, (value, x.shape)
    return data.reshape(data.shape[0], *([1] * missing), *data.shape[1:]) if missing else data


def with_rows(
    func: Callable[..., Tensor], x: Tensor, value: MemberTensor, *, reverse: bool = False, time_major: bool = False
) -> Tensor:
    """``func(x, value)`` (or reversed) for rows ``x``, or time-major ``x``, without copies."""
    members = value.data_P.shape[0]
    data = spread(value, x)
    is_contiguous = x.is_contiguous()
    if time_major:
        x, data = x.transpose(0, 1), data.transpose(1, 2)
    x_PB = x.view(members, -1, *x.shape[1:]) if x.is_contiguous() else x.reshape(members, -1, *x.shape[1:])
    out = flatten_rows(func(data, x_PB) if reverse else func(x_PB, data))
    if value.data_P.ndim == 1 and out.is_floating_point() and x.is_floating_point():
        out = out.to(x.dtype)  # a scalar parameter does not promote what it meets
    if not time_major:
        return out
    return out.transpose(0, 1).contiguous() if is_contiguous else out.transpose(0, 1)  # strides as torch has them


def combine(func: Callable[..., Tensor], x: Tensor, value: MemberTensor, *, reverse: bool = False) -> Any:
    """``func(x, value)`` (or reversed) for a plain tensor in whichever layout it has."""
    layout = layout_in_broadcast(value.context, value.parameter, x, value.member_shape)
    if layout == "shared":
        return NotImplemented
    return with_rows(func, x, value, reverse=reverse, time_major=layout == "time_major")


def per_channel(vector: Any, dims: int) -> Any:
    """A vector over channels ``(C,)`` shaped to meet ``(R, C, ...)`` with ``dims`` dimensions after the channels."""
    spatial = [1] * dims
    if isinstance(vector, MemberTensor):
        return vector.like(vector.data_P.reshape(*vector.data_P.shape, *spatial))
    return None if vector is None else vector.reshape(-1, *spatial)


def _binary(func: Callable[..., Any]) -> Rule:
    def apply(left: Any, right: Any, **kwargs: Any) -> Any:
        if kwargs or isinstance(left, Value) == isinstance(right, Value):
            return NotImplemented
        value, other = (left, right) if isinstance(left, Value) else (right, left)
        if not isinstance(value, MemberTensor):
            return NotImplemented
        if not isinstance(other, Tensor) or other.ndim == 0:
            result = func(value.data_P, other) if value is left else func(other, value.data_P)
            return value.like(result)
        return combine(func, other, value, reverse=value is left)

    return apply


for _name in ("mul", "add", "sub", "div", "true_divide", "maximum", "minimum", "pow"):
    RULES[getattr(torch, _name)] = _binary(getattr(torch, _name))
    RULES[getattr(Tensor, _name)] = _binary(getattr(Tensor, _name))
for _name in ("__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__"):
    RULES[getattr(Tensor, _name)] = _binary(getattr(Tensor, _name))


def _unary(func: Callable[..., Any]) -> Rule:
    def apply(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, MemberTensor) or any(isinstance(arg, Tensor) for arg in args):
            return NotImplemented
        return value.like(func(value.data_P, *args, **kwargs))

    return apply


for _name in ("neg", "exp", "log", "sigmoid", "tanh", "relu", "sqrt", "rsqrt", "square", "abs", "softplus", "silu"):
    for _owner in (torch, Tensor, torch.nn.functional):
        if hasattr(_owner, _name):
            RULES[getattr(_owner, _name)] = _unary(getattr(_owner, _name))
RULES[Tensor.__neg__] = _unary(Tensor.__neg__)


def _sizes(args: tuple[Any, ...]) -> list[int]:
    return list(args[0]) if len(args) == 1 and not isinstance(args[0], int) else list(args)


@rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def expand(value: Any, *args: Any, **kwargs: Any) -> Any:
    """A parameter spread over the batch (a class token ``(1, 1, d)`` to ``(R, 1, d)``): every row gets its member's."""
    if not isinstance(value, MemberTensor) or kwargs:
        return NotImplemented
    sizes = _sizes(args)
    missing = len(sizes) - value.ndim
    members = value.data_P.shape[0]
    data = value.data_P.reshape(members, *([1] * max(missing, 0)), *value.shape)
    if missing <= 0 and value.ndim > 1 and value.shape[1] == 1 and _is_second(value, sizes, "expand"):
        data = data.transpose(1, 2).expand(members, sizes[1] // members, sizes[0], *sizes[2:])
        return flatten_rows(data).transpose(0, 1)
    if missing == 0 and value.ndim > 0 and value.shape[0] != 1:
        return NotImplemented
    if not _is_batch(value, sizes, "expand"):
        return NotImplemented
    return flatten_rows(data.expand(members, sizes[0] // members, *sizes[1:]))


@rule(Tensor.repeat)
def repeat(value: Any, *args: Any, **kwargs: Any) -> Any:
    """A parameter repeated over the batch, likewise; what has a leading dimension is repeated for each row."""
    if not isinstance(value, MemberTensor) or kwargs:
        return NotImplemented
    sizes = _sizes(args)
    missing = len(sizes) - value.ndim
    members = value.data_P.shape[0]
    data = value.data_P.reshape(members, *([1] * max(missing, 0)), *value.shape)
    if missing == 0 and value.ndim > 1 and value.shape[1] == 1 and _is_second(value, sizes, "repeat"):
        data = data.transpose(1, 2).repeat(1, sizes[1] // members, sizes[0], *sizes[2:])
        return flatten_rows(data).transpose(0, 1)
    if missing < 0 or not _is_batch(value, sizes, "repeat"):
        return NotImplemented
    return flatten_rows(data.repeat(1, sizes[0] // members, *sizes[1:]))


def _is_second(value: MemberTensor, sizes: list[int], use: str) -> bool:
    """Whether the second one of the sizes that a value is spread over is the rows: a first state ``(layers, R, h)``."""
    context, key = value.context, (value.parameter, f"{use} second", len(sizes))
    if len(sizes) < 3 or context.rows is None or sizes[1] <= 1:
        return False
    if sizes[1] != context.rows or sizes[0] == context.rows:
        learn(context, key, "shared")
        return False
    known = context.layouts.get(key)
    if known == "shared":
        return False
    if known is None and not context.trusting:
        raise ambiguous(context, value.parameter, use, torch.empty(sizes[1:], device="meta"))
    if known == "mixed":
        raise ambiguous(context, value.parameter, use, torch.empty(sizes[1:], device="meta"))
    learn(context, key, "time_major")
    return True


def _is_batch(value: MemberTensor, sizes: list[int], use: str) -> bool:
    """Whether the leading one of the sizes that a value is spread over is the rows."""
    context, key = value.context, (value.parameter, use, len(sizes))
    if not sizes or not isinstance(sizes[0], int) or sizes[0] <= 1:
        return False
    known = context.layouts.get(key)
    if not context.is_rows(sizes[0]):
        learn(context, key, "shared")
        return False
    if known == "shared":
        return False
    if known == "mixed" or (known is None and sizes[0] != context.rows and not context.trusting):
        raise ambiguous(context, value.parameter, use, torch.empty(sizes, device="meta"))
    learn(context, key, "rows")
    return True


@rule(Tensor.expand_as)
def expand_as(value: Any, other: Any) -> Any:
    """As :func:`expand`, with the sizes of another tensor."""
    return expand(value, tuple(other.shape)) if isinstance(value, MemberTensor) else NotImplemented
