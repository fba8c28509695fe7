"""Rules for picked rows: products, writing them back, and what leaves their dimension alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.ops.per_member import broadcasting
from eggroll.torch.ops.routed import (
    ROW_BY_ROW,
    RULES,
    RoutedRows,
    members_of,
    product,
    refused,
    same_rows,
)
from eggroll.torch.perturbed import MemberTensor, PerturbedWeight, Value

_UNARY = [
    "relu", "relu6", "relu_", "gelu", "silu", "silu_", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "sigmoid", "sigmoid_", "tanh",
    "tanh_", "exp", "exp_", "expm1", "log", "log1p", "log2", "neg", "abs", "sqrt", "rsqrt", "square", "sign",
    "reciprocal", "clamp", "clamp_", "clamp_min", "clamp_max", "clip", "erf", "sin", "cos", "round", "floor", "ceil",
    "trunc", "nan_to_num", "isnan", "isfinite", "isinf", "logical_not", "bitwise_not", "clone", "detach",
    "contiguous", "to", "float", "half", "double", "bfloat16", "type_as", "type", "dropout", "zeros_like",
    "ones_like", "full_like", "__neg__", "__abs__", "__invert__", "__rsub__", "__rtruediv__", "__rpow__",
]  # fmt: skip


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what a torch function of these names does with picked rows."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for owner in (Tensor, torch, F):
            for name in names:
                if (function := getattr(owner, name, None)) is not None:
                    RULES[function] = implementation(function) if implementation in _MAKERS else implementation
        return implementation

    return register


_MAKERS: set[Any] = set()


def _maker(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that is made for each of the functions it is registered for."""
    _MAKERS.add(implementation)
    return implementation


for _owner in (Tensor, torch, F):
    ROW_BY_ROW |= {getattr(_owner, _name) for _name in _UNARY if hasattr(_owner, _name)}
ROW_BY_ROW |= broadcasting()


@rule("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(x, RoutedRows) or isinstance(weight, RoutedRows | MemberTensor) or x.lead or x.ndim < 2:
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return _linear(*(part if part is None else part.to(dtype) for part in (x, weight, bias)))
    if isinstance(weight, PerturbedWeight):
        if weight.context.single or weight.base.ndim != 2:
            return NotImplemented
        out = product(x.data_N, weight, x.member_N)
    else:
        out = F.linear(x.data_N, weight)
    routed = x.like(out)
    return routed if bias is None else routed + bias


@rule("matmul", "__matmul__", "mm")
def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(weight, PerturbedWeight):
        return _linear(x, weight.transposed())
    if isinstance(weight, Value) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return NotImplemented
    return _linear(x, weight.t())


@rule("layer_norm", "rms_norm")
@_maker
def _norm(func: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, shape: Any, weight: Any = None, *rest: Any, **options: Any) -> Any:
        bias, rest = (rest[0], rest[1:]) if func is F.layer_norm and rest else (options.pop("bias", None), rest)
        if not isinstance(x, RoutedRows) or len(shape) >= x.ndim - x.lead:
            return NotImplemented
        data = F.layer_norm(x.data_N, shape, None, None, *rest, **options) if func is F.layer_norm else None
        out = x.like(func(x.data_N, shape, None, *rest, **options) if data is None else data)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return apply


def _positive(dim: int, x: RoutedRows) -> int:
    return dim % x.ndim


@rule("softmax", "log_softmax", "chunk", "unbind", "sum", "mean", "amax", "amin", "cumsum", "narrow", "norm")
@_maker
def _along(func: Callable[..., Any]) -> Callable[..., Any]:
    """Along another dimension than that of the rows."""
    first = {"chunk": 1}.get(func.__name__, 0)

    def apply(x: Any, *args: Any, **options: Any) -> Any:
        dim = options["dim"] if "dim" in options else args[first] if len(args) > first else None
        if not isinstance(x, RoutedRows) or not isinstance(dim, int) or _positive(dim, x) <= x.lead:
            return NotImplemented
        out = func(x.data_N, *args, **options)
        return tuple(map(x.like, out)) if isinstance(out, tuple | list) else x.like(out)

    return apply


@rule("split")
def _split(x: Any, sizes: Any, dim: int = 0) -> Any:
    if not isinstance(x, RoutedRows):
        return NotImplemented
    parts = torch.split(x.data_N, sizes, dim)
    if _positive(dim, x) != x.lead:
        return tuple(map(x.like, parts))
    return tuple(x.like(part, own) for part, own in zip(parts, torch.split(x.member_N, sizes), strict=True))


@rule("cat", "concat", "concatenate")
def _cat(parts: Any, dim: int = 0) -> Any:
    if not all(isinstance(part, RoutedRows) for part in parts):
        return NotImplemented
    first, data = parts[0], [part.data_N for part in parts]
    if _positive(dim, first) != first.lead:
        return same_rows(torch.cat, parts).like(torch.cat(data, dim))
    if any(part.lead != first.lead for part in parts):
        return NotImplemented
    return first.like(torch.cat(data, dim), torch.cat([part.member_N for part in parts]))


@rule("unsqueeze")
def _unsqueeze(x: Any, dim: int) -> Any:
    at = dim % (x.ndim + 1)
    return x.like(x.data_N.unsqueeze(at)) if at > x.lead else NotImplemented


@rule("squeeze")
def _squeeze(x: Any, dim: Any = None) -> Any:
    if not isinstance(dim, int):
        return NotImplemented
    at = _positive(dim, x)
    if at < x.lead and x.lead == 1:
        return x.like(x.data_N.squeeze(at), lead=0)
    return x.like(x.data_N.squeeze(at)) if at > x.lead else NotImplemented


@rule("reshape", "view", "flatten")
@_maker
def _reshape(func: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, *sizes: Any, **options: Any) -> Any:
        """Other dimensions beside that of the rows."""
        if not isinstance(x, RoutedRows) or (sizes and isinstance(sizes[0], torch.dtype)):
            return NotImplemented
        out, count = func(x.data_N, *sizes, **options), len(x.member_N)
        if out.ndim and out.shape[0] == count and (out.ndim > 1 or x.data_N.numel() == count):
            return x.like(out, lead=0)
        return NotImplemented

    return apply


@rule("__getitem__")
def _getitem(x: Any, index: Any) -> Any:
    """Some of the rows, or of each row."""
    if not isinstance(x, RoutedRows) or x.lead:
        return NotImplemented
    first = index[0] if isinstance(index, tuple) and index else index
    out = x.data_N[index]
    if first is Ellipsis or first == slice(None) if not isinstance(first, Tensor) else False:
        return x.like(out) if out.ndim and out.shape[0] == len(x.member_N) else NotImplemented
    is_rows = isinstance(first, slice) or (isinstance(first, Tensor) and first.ndim == 1)
    if not is_rows or isinstance(first, Value):
        return NotImplemented
    own = x.member_N[first]
    return x.like(out, own) if out.ndim and out.shape[0] == len(own) else NotImplemented


@rule("__setitem__", "index_put_", "index_put")
@_maker
def _setitem(func: Callable[..., Any]) -> Callable[..., Any]:
    def apply(target: Any, index: Any, rows: Any, *rest: Any) -> Any:
        """Picked rows put where rows of their own members are."""
        first = index[0] if isinstance(index, tuple | list) and len(index) else index
        if not isinstance(rows, RoutedRows) or not isinstance(first, Tensor) or isinstance(first, Value):
            return NotImplemented
        if first.dtype == torch.bool:
            first = first.nonzero()[:, 0]
        _check_targets(func, target, 0, first, rows)
        return func(target, index, rows.data_N, *rest)

    return apply


@rule("index_add", "index_add_", "index_copy", "index_copy_", "scatter_add", "scatter_add_", "scatter", "scatter_")
@_maker
def _write(func: Callable[..., Any]) -> Callable[..., Any]:
    def apply(target: Any, dim: int, index: Any, rows: Any, **options: Any) -> Any:
        """Picked rows added to, or put in the place of, rows of their own members."""
        if not isinstance(rows, RoutedRows) or isinstance(index, Value) or dim % max(target.ndim, 1) != 0:
            return NotImplemented
        _check_targets(func, target, dim, index, rows)
        return func(target, dim, index, rows.data_N, **options)

    return apply


def _check_targets(func: Any, target: Any, dim: int, index: Tensor, rows: RoutedRows) -> None:
    """Refuse to write a row to where another member's is.

    Raises:
        UnsupportedOperationError: it would be.
    """
    context = rows.context
    if isinstance(target, Value) or not context.is_rows(target.shape[dim]) or rows.lead or index.ndim < 1:
        raise refused(func, "which writes them where no members' rows are")
    own = members_of(index, target.shape[dim], context)
    expected = rows.member_N.reshape(-1, *([1] * (own.ndim - 1)))
    if own.shape[0] != len(rows.member_N) or not bool((own == expected).all()):
        raise refused(func, "which writes them to rows of other members")
