"""The table of torch functions with a population rule, and what happens to the others.

A rule gets a function's own arguments, some of them values, and returns what the function would return for every
member: plain row-major activations where it met any, a :class:`MemberTensor` otherwise. ``NotImplemented`` passes the
call on to :func:`per_member`, which runs any function on each member's tensors (``torch.vmap`` over the member axis,
or one after the other where a function cannot be vmapped): exact, at the price of materialised members.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.values import WAYS_OUT, MemberContext, MemberTensor, PerturbedWeight, Value, set_handler

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a population rule for torch functions."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return register


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch function some of whose arguments are values."""
    implementation = RULES.get(func)
    if implementation is not None:
        result = implementation(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    return per_member(func, args, kwargs)


def context_of(*candidates: Any) -> MemberContext:
    """The context of the first value among the arguments."""
    for candidate in candidates:
        if isinstance(candidate, Value):
            return candidate.context
    raise AssertionError("no value among the arguments")


def as_member_tensor(value: Value) -> MemberTensor:
    """Any population value with its member axis spelled out."""
    if isinstance(value, MemberTensor):
        return value
    assert isinstance(value, PerturbedWeight)
    return MemberTensor(value.dense(), name=value.parameter, context=value.context)


def has_rows(x: Tensor, context: MemberContext, value_shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether a plain tensor that meets values carries the population in its leading dimension.

    A tensor of exactly a value's shape is taken for a constant of that shape (a buffer beside a parameter), and so is
    one with fewer dimensions than every value.
    """
    shapes = list(value_shapes)
    if x.ndim == 0 or tuple(x.shape) in shapes or x.ndim < min(len(shape) for shape in shapes):
        return False
    return context.is_rows(x.shape[0])


def flatten_rows(data_PB: Tensor) -> Tensor:
    """``(P, B, ...)`` to rows ``(P * B, ...)``."""
    return data_PB.reshape(data_PB.shape[0] * data_PB.shape[1], *data_PB.shape[2:])


def per_member(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run any function once per member, on that member's tensors; results keep the members together."""
    leaves, structure = tree_flatten((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    context = values[0].context
    if context.single:
        plain = [leaf.dense() if isinstance(leaf, PerturbedWeight) else leaf for leaf in leaves]
        plain_args, plain_kwargs = tree_unflatten(plain, structure)
        return func(*plain_args, **plain_kwargs)
    members = context.members
    assert members is not None
    in_place = _writes_first_argument(func)
    if in_place and isinstance(args[0], Value):
        raise UnsupportedOperationError(
            f"parameter {args[0].parameter!r} is perturbed and would be changed in place by {_name(func)}; a centre "
            "is never changed during an evaluation. " + WAYS_OUT.format(name=args[0].parameter)
        )
    shapes = [tuple(value.shape) for value in values]
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    slots: list[int] = []
    met_rows = False
    for slot, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        dim: int | None = 0
        if isinstance(leaf, Value):
            tensor = as_member_tensor(leaf).data_P
        elif has_rows(leaf, context, shapes):
            split = (members, leaf.shape[0] // members, *leaf.shape[1:])
            tensor, met_rows = (leaf.view(split) if in_place else leaf.reshape(split)), True
        else:
            tensor, dim = leaf, None
        tensors.append(tensor)
        dims.append(dim)
        slots.append(slot)

    def call(*member_tensors: Tensor) -> Any:
        filled = list(leaves)
        for slot, tensor in zip(slots, member_tensors, strict=True):
            filled[slot] = tensor
        call_args, call_kwargs = tree_unflatten(filled, structure)
        return func(*call_args, **call_kwargs)

    out = _vmap_or_loop(call, tensors, dims, members, func, values[0].parameter)
    if in_place:
        return args[0]

    def wrap(data: Tensor) -> Tensor:
        if met_rows and data.ndim >= 2:
            return flatten_rows(data)
        return MemberTensor(data, name=values[0].parameter, context=context)

    return tree_map(wrap, out)


def _vmap_or_loop(
    call: Callable[..., Any], tensors: list[Tensor], dims: list[int | None], members: int, func: Any, name: str
) -> Any:
    try:
        return torch.vmap(call, in_dims=tuple(dims), randomness="different")(*tensors)
    except (RuntimeError, ValueError, NotImplementedError):
        pass  # data-dependent or without a batching rule: the loop below is exact, or raises the function's own error
    results = []
    for member in range(members):
        member_tensors = [t if d is None else t[member] for t, d in zip(tensors, dims, strict=True)]
        results.append(call(*member_tensors))
    flat = [tree_flatten(result)[0] for result in results]
    if not all(isinstance(leaf, Tensor) for leaf in flat[0]):
        raise UnsupportedOperationError(
            f"parameter {name!r} is perturbed and {_name(func)} turns it into {type(flat[0][0]).__name__}, which would "
            "have to differ between members. " + WAYS_OUT.format(name=name)
        )
    if len({tuple(tuple(leaf.shape) for leaf in leaves) for leaves in flat}) != 1:
        raise UnsupportedOperationError(
            f"parameter {name!r} is perturbed and {_name(func)} gives results of different shapes for different "
            "members. " + WAYS_OUT.format(name=name)
        )
    stacked = [torch.stack(leaves) for leaves in zip(*flat, strict=True)]
    return tree_unflatten(stacked, tree_flatten(results[0])[1])


def _name(func: Any) -> str:
    return getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or repr(func)


@functools.cache
def _in_place_functions() -> frozenset[Any]:
    return frozenset(
        member
        for name, member in inspect.getmembers(Tensor)
        if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    )


_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
}
_IN_PLACE_OPERATORS |= {"__setitem__"}


def _writes_first_argument(func: Any) -> bool:
    return func in _in_place_functions()


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


@rule(Tensor.detach, Tensor.contiguous, Tensor.clone, Tensor.data.__get__, Tensor.requires_grad_, torch.clone)  # type: ignore[attr-defined]
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

set_handler(dispatch)
