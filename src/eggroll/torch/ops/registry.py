"""The table of torch functions with a population rule.

A rule gets a function's own arguments, some of them values, and returns what the function would return for every
member: plain row-major activations where it met any, a :class:`MemberTensor` otherwise. ``NotImplemented`` passes the
call on to :mod:`eggroll.torch.ops.per_member`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight, Value

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a population rule for torch functions."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return register


def context_of(*candidates: Any) -> MemberContext:
    """The context of the first value among the arguments."""
    for candidate in candidates:
        if isinstance(candidate, Value):
            return candidate.context
    raise AssertionError("no value among the arguments")


def flatten_rows(data_PB: Tensor) -> Tensor:
    """``(P, B, ...)`` to rows ``(P * B, ...)``."""
    return data_PB.reshape(data_PB.shape[0] * data_PB.shape[1], *data_PB.shape[2:])


def name_of(func: Any) -> str:
    """A torch function's name, for messages."""
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or repr(func)
    owner = getattr(getattr(func, "__self__", None), "__name__", None)
    return f"{owner}.{name}" if owner and name == "__get__" else name


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


METADATA: set[Any] = _getters(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_mps", "is_meta",
    "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "is_leaf", "grad", "grad_fn", "itemsize", "nbytes",
) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.get_device, Tensor.__len__, Tensor.is_contiguous, Tensor.stride, Tensor.is_inference,
    Tensor.ndimension, Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel, Tensor.is_signed,
}  # fmt: skip


@rule(Tensor.clone, torch.clone)
def _clone(value: Any, **_: Any) -> Any:
    """A tensor of its own, that may be written to."""
    if not isinstance(value, Value):
        return NotImplemented
    if value.context.single:
        assert isinstance(value, PerturbedWeight)
        return value.dense()
    held = value.by_member()
    return held.like(held.data_P.clone())


@rule(Tensor.detach, Tensor.contiguous, Tensor.data.__get__, Tensor.requires_grad_)  # type: ignore[attr-defined]
def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value if isinstance(value, Value) else NotImplemented


def _cast(method: str) -> Rule:
    def apply(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, Value):
            return getattr(value, method)(*_plain_like(args), **kwargs)
        convert = operator.methodcaller(method, *_plain_like(args), **kwargs)
        if isinstance(value, PerturbedWeight):
            return value.like(convert(value.base), convert(value.a), convert(value.b))
        assert isinstance(value, MemberTensor)
        return value.like(convert(value.data_P))

    return apply


def _plain_like(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values among the arguments of a cast only lend their dtype and device."""
    return tuple(torch.empty(0, dtype=a.dtype, device=a.device) if isinstance(a, Value) else a for a in args)


for _method in ("to", "float", "half", "bfloat16", "double", "type_as", "cuda", "cpu"):
    RULES[getattr(Tensor, _method)] = _cast(_method)


def _like_a_constant(method: str) -> Rule:
    """New tensors that take nothing but dtype, device and shape from a value are the same for all members."""

    def apply(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, Value):
            return NotImplemented
        shape = value.shape if method.endswith("_like") else ()
        plain = torch.empty(shape, dtype=value.dtype, device=value.device)
        return getattr(torch if method.endswith("_like") else plain, method)(
            *((plain,) if method.endswith("_like") else ()), *args, **kwargs
        )

    return apply


for _method in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"):
    RULES[getattr(Tensor, _method)] = _like_a_constant(_method)
for _method in ("zeros_like", "ones_like", "full_like", "empty_like"):
    RULES[getattr(torch, _method)] = _like_a_constant(_method)


@rule(Tensor.__deepcopy__)
def _deepcopy(value: Any, memo: Any) -> Any:
    return value


@rule(Tensor.__iter__)
def _iterate(value: Any) -> Any:
    return iter(torch.unbind(value))


@rule(torch._has_compatible_shallow_copy_type)
def _is_replaced(*_: Any) -> bool:
    """``module.to(dtype)`` in a forward puts another value in a value's place, instead of changing its contents."""
    return False


@rule(Tensor.requires_grad.__set__, Tensor.grad.__set__)  # type: ignore[attr-defined,union-attr]
def _no_gradient(value: Any, *_: Any) -> None:
    """Values take no part in autograd; there is nothing to set."""
