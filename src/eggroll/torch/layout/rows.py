"""Where a module's inputs hold the members: read off a call, and cut into members."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.perturbed import MemberContext, MemberTensor, Value
from eggroll.torch.quantized.tensor import stored

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

LEARNING_ROWS = (5, 7, 11, 13, 17, 19, 23)


def count_rows(inputs: Any, members: int, batch_dim: int) -> int:
    """R of a call: the batch dimension of the first input that ``members`` divides; 0 if there is no batch.

    Raises:
        ConfigError: inputs have a batch that the members do not divide.
    """
    if members == 1:
        return 1  # whatever there is belongs to the one member
    tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.ndim > batch_dim]
    # Vectors come last: they are mostly positions. A dimension of 1 is an input shared by the whole batch.
    sizes = [x.shape[batch_dim] for x in sorted(tensors, key=lambda x: x.ndim < 2) if x.shape[batch_dim] > 1]
    divisible = [size for size in sizes if size % members == 0]
    if sizes and not divisible:
        raise ConfigError(
            f"the inputs have {sizes[0]} rows in dimension {batch_dim}, which must be a multiple of the number of "
            f"members (={members}): every member takes its own rows. Repeat a batch for every member with "
            "active.expand(x); for inputs whose batch is in their second dimension, use Population(..., batch_dim=1)"
        )
    return divisible[0] if divisible else 0


@contextmanager
def rows_from_input(
    model: nn.Module,
    context: MemberContext,
    learn: Callable[[nn.Module, Inputs], None],
    note: Callable[[nn.Module, Any], Any],
    around: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Read the rows and the memory of inputs off every call of the model, or of a direct part of it.

    ``learn`` is told of such a call before it runs, ``note`` of its outputs, which it may replace, and it runs in a
    context of ``around``.
    """
    fixed = context.rows is not None
    depth = 0
    running = ExitStack()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1 and context.members is not None:
            if not fixed and next(module.parameters(), None) is not None:
                context.rows = count_rows((args, kwargs), context.members, context.batch_dim)
            context.seen_rows.add(context.rows)
            learn(module, (args, kwargs))
            context.inputs = addresses(tree_flatten((args, kwargs))[0])
        if depth == 1:
            running.enter_context(around())

    def after(module: nn.Module, args: Any, outputs: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth == 0:
            context.inputs = None
            running.close()
            if outputs is not None and context.members is not None:
                return note(module, outputs)
        return None

    handles = []
    outer = [model, *model.children(), *(part for child in model.children() for part in child.children())]
    try:
        for module in dict.fromkeys(outer):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no such hooks, and holds no values
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        running.close()
        for handle in handles:
            handle.remove()


def fewer_rows(
    inputs: Inputs, rows: int, batch_dim: int, sizes: Collection[int], own: int, avoid: Collection[int] = ()
) -> tuple[int, Inputs] | None:
    """The inputs of another number of members, one that divides few of ``sizes``; ``None`` if they hold state.

    ``avoid`` are numbers that were tried before.

    Returns:
        The number of members, and inputs with ``own`` rows for each of them.
    """
    leaves = tree_flatten(inputs)[0]
    if rows == 0 or not all(_is_stateless(leaf) for leaf in leaves):
        return None
    held = member_dims(inputs, rows, batch_dim)
    dims = {
        size
        for x, batch in zip(leaves, held, strict=True)
        if isinstance(x, Tensor)
        for dim, size in enumerate(x.shape)
        if dim != batch
    }
    counts = [count for count in LEARNING_ROWS if count not in avoid]
    count = min(counts, key=lambda count: sum(size % count == 0 for size in {*sizes, *dims}))

    def take(x: Any, dim: int | None) -> Any:
        if dim is None:
            return copy.deepcopy(x) if hasattr(x, "get_seq_length") else x
        index = torch.arange(count * own * (x.shape[dim] // rows), device=x.device) % x.shape[dim]
        return x.index_select(dim, index)

    taken = [take(x, dim) for x, dim in zip(leaves, held, strict=True)]
    return count, tree_unflatten(taken, tree_flatten(inputs)[1])


def _is_stateless(leaf: Any) -> bool:
    """Whether an input can be used again: a tensor, a constant, or a cache that has not been written to."""
    if leaf is None or isinstance(leaf, Tensor | bool | int | float | str | torch.dtype | torch.device):
        return True
    length = getattr(leaf, "get_seq_length", None)
    try:
        return length is not None and int(length()) == 0
    except (ValueError, TypeError):
        return False


def addresses(tensors: Collection[Any]) -> frozenset[int]:
    """Addresses of the memory of tensors, for telling views of them from other tensors."""
    found = set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not isinstance(tensor, Value) and tensor.layout == torch.strided:
            found.add(stored(tensor).untyped_storage().data_ptr())
    return frozenset(found - {0})


def constants_of(model: nn.Module) -> frozenset[int]:
    """Addresses of the memory of a model's parameters and buffers."""
    return addresses([*model.parameters(), *model.buffers()])


def member_dim(x: Any, rows: int, batch_dim: int) -> int | None:
    """The dimension in which an input or output holds the members, if it does."""
    if not isinstance(x, Tensor) or rows == 0:
        return None
    for dim in (batch_dim, 0):
        if x.ndim > dim and x.shape[dim] == rows:
            return dim
    return 0 if x.ndim > 0 and x.shape[0] > 0 and x.shape[0] % rows == 0 else None


def member_dims(tree: Any, rows: int, batch_dim: int) -> list[int | None]:
    """The dimension that holds the members, for every leaf of a call's inputs.

    A recurrent state ``(layers, R, h)`` holds them in its second one. A mask ``(1, T, T)`` or a table ``(1, T, d)`` is
    none, also where ``T`` is R: the batch has that dimension too then.
    """
    leaves = tree_flatten(tree)[0]
    dims = [member_dim(x, rows, batch_dim) for x in leaves]
    others = {
        size
        for x, dim in zip(leaves, dims, strict=True)
        if dim is not None
        for size in (*x.shape[:dim], *x.shape[dim + 1 :])
    }
    if rows < 2 or rows in others:
        return dims
    return [
        1 if dim is None and isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == rows else dim
        for x, dim in zip(leaves, dims, strict=True)
    ]


def cut(tree: Any, p: int, members: int, rows: int, batch_dim: int) -> Any:
    """Member ``p``'s part of every tensor of a call's inputs; tensors without members as they are."""
    leaves, structure = tree_flatten(tree)
    dims = member_dims(tree, rows, batch_dim)
    parts = [x if dim is None else x.chunk(members, dim)[p] for x, dim in zip(leaves, dims, strict=True)]
    return tree_unflatten(parts, structure)


def member_data(value: MemberTensor, members: int, rows: int) -> Tensor:
    """A value's tensors ``(P, ...)``, if they are each member's own.

    Raises:
        UnsupportedOperationError: a dimension still has the size of all rows.
    """
    shape, own = value.shape, rows // members
    if rows == 0 or value.ndim == 0:
        return value.data_P
    whole = [size > 1 and size % rows == 0 for size in shape[:2]]
    if whole[0] or (whole[-1] and (shape[0] != own or own == 1)):
        raise UnsupportedOperationError(
            f"an operation on parameter {value.parameter!r} did not recognize the rows: an output of the model holds "
            "all of them for every member. This model's activations do not keep the members in their leading "
            "dimension. "
            'Use population.forward with mode="vmap" or mode="loop"'
        )
    return value.data_P
