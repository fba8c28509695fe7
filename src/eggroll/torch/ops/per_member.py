"""Any function without a rule of its own: run once per member on materialized members, exactly.

``torch.vmap`` over the member axis where the function can be vmapped, one member after the other where it cannot. Plain
tensors that hold the members are cut into them, others are the same for all. What cannot be cut exactly is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.layout.rules import is_constant, layout_in_broadcast, layout_of, layout_of_ids
from eggroll.torch.ops.registry import flatten_rows, name_of
from eggroll.torch.perturbed import (
    SHARED_INPUT,
    WAYS_OUT,
    Layout,
    MemberTensor,
    PerturbedWeight,
    Value,
    call_materialized,
)


def per_member(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, layout: Layout | None = None
) -> Any:
    """Run any function once per member, on that member's tensors; results keep the members together.

    Args:
        func: a torch function.
        args: its arguments, some of them values.
        kwargs: likewise.
        layout: the layout of plain tensors where the caller knows it.

    Raises:
        UnsupportedOperationError: the function would write to a parameter or mix members.
    """
    leaves, structure = tree_flatten((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    context, name = values[0].context, values[0].parameter
    in_place = _refuse_writes(func, args, kwargs, name)
    if context.single:
        return call_materialized(func, args, kwargs)
    members = context.members
    assert members is not None
    find = functools.partial(_layout, func, values) if layout is None else lambda _: layout
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    slots: list[int] = []
    own_rows = set()
    from_right = 0  # where the rows are in what broadcasts with a time-major tensor
    for slot, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        dim: int | None = 0
        if isinstance(leaf, Value):
            tensor = leaf.by_member().data_P
        else:
            where = find(leaf)
            if where == "time_major" and func not in broadcasting():
                raise _no_rule(name, func, f"with the members in the second dimension of {tuple(leaf.shape)}")
            if where == "rows":
                split = (members, leaf.shape[0] // members, *leaf.shape[1:])
                tensor = leaf.view(split) if in_place and leaf is args[0] else leaf.reshape(split)
                own_rows.add(split[1])
            elif where == "time_major":
                tensor, dim, from_right = leaf.unflatten(1, (members, -1)), 1, leaf.ndim - 1
            else:
                tensor, dim = leaf, None
                if in_place and leaf is args[0]:
                    raise _no_rule(name, func, "to write different results of each member into one tensor")
        tensors.append(tensor)
        dims.append(dim)
        slots.append(slot)

    def call(*member_tensors: Tensor) -> Any:
        filled = list(leaves)
        for slot, tensor in zip(slots, member_tensors, strict=True):
            filled[slot] = tensor
        call_args, call_kwargs = tree_unflatten(filled, structure)
        result = func(*call_args, **call_kwargs)
        return call_args[0] if in_place else result

    out = _vmap_or_loop(call, tensors, dims, members, func, name)
    if in_place:
        return args[0]

    def wrap(data: Tensor) -> Tensor:
        if from_right:
            return data.movedim(0, -from_right - 1).flatten(-from_right - 1, -from_right)
        if data.ndim >= 2 and data.shape[1] in own_rows:
            return flatten_rows(data)
        return MemberTensor(data, name=name, context=context)

    return tree_map(wrap, out)


def _layout(func: Any, values: list[Value], leaf: Tensor) -> Layout:
    """Where a plain tensor that meets values in ``func`` holds the members."""
    context, name = values[0].context, values[0].parameter
    if is_constant(context, leaf) and not (leaf.ndim > 1 and leaf.stride(0) == 0):
        return "shared"
    if func is Tensor.__setitem__ and leaf.dtype == torch.bool:
        return "rows"  # a mask over rows; see _keeps_rows
    if func in _INDEXING and not leaf.is_floating_point():
        return layout_of_ids(context, name, leaf)
    if func in broadcasting():
        shape = torch.broadcast_shapes(*(value.shape for value in values))
        return layout_in_broadcast(context, name, leaf, tuple(shape))
    return layout_of(context, name, name_of(func), leaf)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> bool:
    """Whether ``func`` changes its first argument, after refusing the changes that would be wrong."""
    if func in _WRITES_ROWS and not isinstance(args[0], Value):
        raise _no_rule(name, func, "where rows are addressed by an index, so that a row's member is not known")
    if not is_write(func):
        return False
    target = args[0]
    if isinstance(target, PerturbedWeight) or getattr(target, "_is_param", False):
        raise _changed(target.parameter, func)
    if func is Tensor.__setitem__ and not isinstance(target, Value) and not _keeps_rows(target, args[1]):
        raise _no_rule(name, func, "where rows are addressed by an index, so that a row's member is not known")
    return True


def into_given(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``out=``: possible for a member alone.

    Raises:
        UnsupportedOperationError: several members, whose results one given tensor cannot be relied on to hold.
    """
    leaves = tree_leaves((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    written = [x for x in tree_leaves(kwargs["out"]) if isinstance(x, Value)]
    if written:
        raise _changed(written[0].parameter, func)
    perturbed = [value for value in values if value.parameter != SHARED_INPUT]
    if all(value.context.single for value in perturbed):
        plain_args, plain_kwargs = tree_map_only(Value, _plain, (args, kwargs))
        return func(*plain_args, **plain_kwargs)
    raise _no_rule(
        perturbed[0].parameter,
        func,
        "with out=: the tensor given is for the result of one member. Without out=, the function makes a tensor that "
        "holds the results of all members",
    )


def _plain(value: Any) -> Tensor:
    return value.dense() if isinstance(value, PerturbedWeight) else value.written_out()


def is_write(func: Any) -> bool:
    """Whether a function changes its first argument."""
    return func in _in_place_functions() or getattr(func, "__name__", "") == "__set__"


def _keeps_rows(target: Tensor, index: Any) -> bool:
    """Whether an index leaves the leading dimension whole (``x[:, 0]``), or is a mask over it."""
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, Tensor):
        return first.dtype == torch.bool and first.shape == target.shape[: first.ndim]
    return first is Ellipsis or (isinstance(first, slice) and first == slice(None))


def _changed(name: str, func: Any) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"parameter {name!r} is perturbed and would be changed in place by {name_of(func)}; a parameter is never "
        f"changed during an evaluation. Leave it alone (exclude=[{name!r}])"
    )


def _no_rule(name: str, func: Any, what: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"parameter {name!r} is perturbed and used by {name_of(func)}, {what}. " + WAYS_OUT.format(name=name)
    )


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
        try:
            results.append(call(*member_tensors))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise _no_rule(name, func, f"which failed for member {member} alone: {error}") from error
    flat = [tree_flatten(result)[0] for result in results]
    if not all(isinstance(leaf, Tensor) for leaf in flat[0]):
        raise UnsupportedOperationError(
            f"parameter {name!r} is perturbed and {name_of(func)} turns it into {type(flat[0][0]).__name__}, which "
            "would have to differ between members. " + WAYS_OUT.format(name=name)
        )
    if len({tuple(tuple(leaf.shape) for leaf in leaves) for leaves in flat}) != 1:
        raise UnsupportedOperationError(
            f"parameter {name!r} is perturbed and {name_of(func)} gives results of different shapes for different "
            "members. " + WAYS_OUT.format(name=name)
        )
    stacked = [torch.stack(leaves) for leaves in zip(*flat, strict=True)]
    return tree_unflatten(stacked, tree_flatten(results[0])[1])


@functools.cache
def _in_place_functions() -> frozenset[Any]:
    operators = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")}
    return frozenset(
        member
        for owner in (Tensor, torch, F)
        for name, member in inspect.getmembers(owner)
        if (name.endswith("_") and not name.endswith("__")) or name in operators or name == "__setitem__"
    )


def _functions(*names: str) -> frozenset[Any]:
    found = {getattr(owner, name, None) for owner in (Tensor, torch, F) for name in names}
    return frozenset(found - {None})


_INDEXING = _functions(
    "__getitem__", "index_select", "gather", "take", "take_along_dim", "embedding", "embedding_bag"
)  # fmt: skip

_WRITES_ROWS = _functions(*(
    name + suffix
    for name in ("index_add", "index_copy", "index_fill", "index_put", "scatter", "scatter_add", "scatter_reduce")
    for suffix in ("", "_")
)) | _functions("put_", "masked_scatter", "masked_scatter_")  # fmt: skip


@functools.cache
def broadcasting() -> frozenset[Any]:
    """Functions whose tensor arguments broadcast with each other."""
    names = [
        "add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum",
        "fmax", "fmin", "atan2", "hypot", "lerp", "where", "addcmul", "addcdiv", "masked_fill", "copysign", "xlogy",
        "logaddexp", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "clamp", "prelu",
        "bitwise_and", "bitwise_or", "multiply", "divide", "subtract", "rsub",
    ]  # fmt: skip
    operators = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or"]
    dunders = [f"__{prefix}{name}__" for name in operators for prefix in ("", "r", "i")]
    comparisons = [f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge")]
    return _functions(*names, *(f"{name}_" for name in names), *dunders, *comparisons)
