"""Where a module's inputs and outputs hold the members: read off a call, cut into members, joined again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight, Value

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
    around: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Read the rows and the memory of inputs off every call of the model, or of a direct part of it.

    ``learn`` is told of such a call before it runs, and it runs in a context of ``around``.
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

    def after(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            context.inputs = None
            running.close()

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
    inputs: Inputs, rows: int, batch_dim: int, sizes: Collection[int], own: int
) -> tuple[int, Inputs] | None:
    """The inputs of another number of members, one that divides few of ``sizes``; ``None`` if they hold state.

    Returns:
        The number of members, and inputs with ``own`` rows for each of them.
    """
    leaves = tree_flatten(inputs)[0]
    if rows == 0 or not all(_is_stateless(leaf) for leaf in leaves):
        return None
    tensors = [(x, member_dim(x, rows, batch_dim)) for x in leaves if isinstance(x, Tensor)]
    dims = {size for x, batch in tensors for dim, size in enumerate(x.shape) if dim != batch}
    count = min(LEARNING_ROWS, key=lambda count: sum(size % count == 0 for size in {*sizes, *dims}))

    def take(x: Any) -> Any:
        dim = member_dim(x, rows, batch_dim)
        if dim is None:
            return copy.deepcopy(x) if hasattr(x, "get_seq_length") else x
        index = torch.arange(count * own * (x.shape[dim] // rows), device=x.device) % x.shape[dim]
        return x.index_select(dim, index)

    return count, tree_map(take, inputs)


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
            found.add(tensor.untyped_storage().data_ptr())
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


def cut(tree: Any, p: int, members: int, rows: int, batch_dim: int) -> Any:
    """Member ``p``'s part of every tensor of a structure; tensors without members as they are."""

    def part(x: Any) -> Any:
        dim = member_dim(x, rows, batch_dim)
        return x if dim is None else x.chunk(members, dim)[p]

    return tree_map(part, tree)


def join(outputs: list[Any], batch_dim: int) -> Any:
    """Outputs of members one after the other as one structure with the members in the batch dimension."""

    def together(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if parts[0].ndim == 0:
            return torch.stack(parts)
        return torch.cat(parts, dim=batch_dim if parts[0].ndim > batch_dim else 0)

    return tree_map(together, *outputs)


def plain_outputs(tree: Any, members: int, rows: int, batch_dim: int) -> Any:
    """A forward's outputs without values among them: those become what the members one by one would give.

    Raises:
        UnsupportedOperationError: a value still holds all rows for every member: they were not recognised.
    """

    def plain(x: Any) -> Any:
        if not isinstance(x, MemberTensor | PerturbedWeight):
            return x
        return join(list(member_data(x.by_member(), members, rows).unbind(0)), batch_dim)

    return tree_map(plain, tree)


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
            f"the output is a tensor of shape {tuple(value.shape)} for every one of {members} members, so an operation "
            f"on parameter {value.parameter!r} did not recognise its {rows} rows: this model's activations do not keep "
            'the members in their leading dimension. Use mode="vmap" or mode="loop"'
        )
    return value.data_P
