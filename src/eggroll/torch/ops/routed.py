"""Rows that a model picked by their numbers, as a mixture of experts does: which member each of them belongs to.

``x[chosen]`` takes the rows that a router sends to one expert: any number of any member's, in any order. What they are
is still known from where they came from, so that an expert's matrix meets every row as the row's own member has it::

    (x W_e^T)_i + (x_i B_e[member_i]) A_e[member_i]^T

The rows stay a value of their own until they are written back to where they came from (``index_add_``), where each must
meet its own member. Only what does the same to every row by itself is done to them; the rest is refused.

Shapes: N picked rows, P members, n in, m out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.ops.per_member import is_write
from eggroll.torch.ops.registry import METADATA, name_of
from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight, Value

ROUTED = "rows that the model picked by their numbers"
GATHERED_BYTES = 2**26
"""The most memory that factors gathered at once may take."""


class RoutedRows(Value):
    """Rows ``data (N, ...)``, of which row ``i`` is of member ``member_N[i]``; of ``(1, N, ...)`` if ``lead`` is 1."""

    data_N: Tensor
    member_N: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, *_: Any, **__: Any) -> RoutedRows:  # noqa: D102
        return Value.__new__(cls, data.shape, data.dtype, data.device)  # type: ignore[return-value]

    def __init__(self, data: Tensor, member: Tensor, context: MemberContext, lead: int = 0) -> None:
        self.data_N, self.member_N, self.context, self.lead = data, member, context, lead
        self.parameter = ROUTED

    def like(self, data: Tensor, member: Tensor | None = None, lead: int | None = None) -> RoutedRows:
        """The same rows, or some of them, with other contents."""
        return RoutedRows(
            data, self.member_N if member is None else member, self.context, self.lead if lead is None else lead
        )

    def in_order(self) -> bool:
        """Whether these are rows for every member, member by member, as all other operations know them."""
        context, count = self.context, len(self.member_N)
        return (
            self.lead == 0
            and context.is_rows(count)
            and count > 0
            and torch.equal(self.member_N, members_of(torch.arange(count, device=self.device), count, context))
        )


def members_of(index: Tensor, size: int, context: MemberContext) -> Tensor:
    """Which member the entries ``index`` of a dimension with ``size`` rows belong to."""
    assert context.members is not None
    return (index % size).div(size // context.members, rounding_mode="floor")


def refused(func: Any, why: str) -> UnsupportedOperationError:
    """The error for what cannot be done with picked rows."""
    return UnsupportedOperationError(
        f"rows that the model picked by their numbers (tokens of an expert) are used by {name_of(func)}, {why}. "
        'Evaluate with population.forward and mode="vmap" or mode="loop"'
    )


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch function some of whose arguments are picked rows."""
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    rule = RULES.get(func)
    result = rule(*args, **kwargs) if rule is not None else NotImplemented
    if result is not NotImplemented:
        return result
    if func in ROW_BY_ROW:
        return _row_by_row(func, args, kwargs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, RoutedRows)]
    if all(leaf.in_order() for leaf in leaves) and not is_write(func):
        return func(*_plain(args), **_plain(kwargs))
    raise refused(func, "which may do something else than the same to every row by itself")


def written_out(tree: Any) -> Any:
    """Outputs with picked rows as plain tensors, where these are all members' rows again.

    Raises:
        UnsupportedOperationError: they are not.
    """

    def plain(x: Any) -> Any:
        if not isinstance(x, RoutedRows):
            return x
        if not x.in_order():
            raise refused(Tensor.__getitem__, "and are an output of the model, which is to have a row for every input")
        return x.data_N

    return tree_map(plain, tree)


def _plain(tree: Any) -> Any:
    return tree_map_only(RoutedRows, lambda x: x.data_N, tree)


def same_rows(func: Any, leaves: Sequence[Any]) -> RoutedRows:
    """The first picked rows among arguments, all of which are of the same members.

    Raises:
        UnsupportedOperationError: others are rows of other members.
    """
    routed = [leaf for leaf in leaves if isinstance(leaf, RoutedRows)]
    first = routed[0]
    for other in routed[1:]:
        if other.lead != first.lead or not _equal(other.member_N, first.member_N):
            raise refused(func, "together with rows of other members")
    return first


def _equal(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.shape == y.shape and torch.equal(x, y))


def _row_by_row(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What does the same to every entry: with each row's own part of perturbed vectors."""
    leaves = tree_leaves((args, kwargs))
    rows = same_rows(func, leaves)
    ndim = max(leaf.ndim for leaf in leaves if isinstance(leaf, Tensor))

    def own(leaf: Any) -> Any:
        if isinstance(leaf, RoutedRows):
            return leaf.data_N
        if isinstance(leaf, PerturbedWeight | MemberTensor):
            return gathered(func, leaf, rows, ndim)
        if isinstance(leaf, Tensor) and _meets(leaf, rows) and not rows.in_order():
            raise refused(func, f"together with a tensor of shape {tuple(leaf.shape)}, whose members are not known")
        return leaf

    if is_write(func) and not isinstance(args[0], RoutedRows):
        raise refused(func, "which writes them into another tensor")
    out = func(*tree_map(own, args), **tree_map(own, kwargs))
    if is_write(func):
        return args[0]
    if out.ndim != rows.ndim or len(out.shape) <= rows.lead or out.shape[rows.lead] != len(rows.member_N):
        raise refused(func, f"to a result of shape {tuple(out.shape)}")
    return rows.like(out)


def _meets(x: Tensor, rows: RoutedRows) -> bool:
    """Whether a tensor has a dimension of its own where the rows are when both are broadcast."""
    return x.ndim >= rows.ndim - rows.lead and x.shape[x.ndim - rows.ndim + rows.lead] != 1


def gathered(func: Any, value: Any, rows: RoutedRows, ndim: int) -> Tensor:
    """Each row's member of a perturbed vector ``(*shape)``: ``(N, 1, ..., *shape)``, to broadcast with rows."""
    if value.context.single or rows.lead or value.ndim >= ndim:
        raise refused(func, f"together with {value.parameter!r} of shape {tuple(value.shape)}")
    data = value.by_member().data_P[rows.member_N]
    return data.reshape(len(data), *([1] * (ndim - 1 - value.ndim)), *value.shape)


def product(x_N: Tensor, weight: PerturbedWeight, member_N: Tensor) -> Tensor:
    """Rows ``(N, ..., n)`` through their own members' matrices ``(m, n)``: ``(N, ..., m)``."""
    out = F.linear(x_N, weight.base)
    size = (weight.a.shape[-2] + weight.b.shape[-2]) * weight.a.shape[-1] * weight.a.element_size()
    step = max(1, GATHERED_BYTES // max(size, 1))
    for first in range(0, len(x_N), step):
        part = slice(first, first + step)
        index = member_N[part]
        x_NTn = x_N[part].reshape(len(index), -1, x_N.shape[-1])
        low = torch.bmm(x_NTn, weight.b[index])
        out[part] += torch.bmm(low, weight.a[index].transpose(1, 2)).reshape(out[part].shape)
    return out


ROW_BY_ROW: set[Any] = set()
"""Functions that do the same to every entry; :mod:`eggroll.torch.ops.routed_rules` fills both."""

RULES: dict[Any, Callable[..., Any]] = {}
