"""What picks rows by their numbers while a mixture of experts runs: found by where it stands in the model's code.

Only models that were refused without it are run so: every torch function passes through Python here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.layout.rules import is_constant, learn
from eggroll.torch.ops.routed import RoutedRows, members_of, refused
from eggroll.torch.perturbed import MemberContext, Value

_PICKS = {Tensor.__getitem__, Tensor.index_select, torch.index_select}
_OURS = (str(Path(__file__).parents[1]), torch.overrides.__file__)


def picks_rows(context: MemberContext, func: Any, args: tuple[Any, ...], found: Container[Any]) -> bool:
    """Whether a function takes rows of all members in another order than member by member, or by ``found`` numbers."""
    if context.single or func not in _PICKS or not args or isinstance(args[0], Value):
        return False
    numbers, _ = _numbers(func, args)
    x = args[0]
    if numbers is None or not _has_rows(context, x) or is_constant(context, x):
        return False
    if numbers in found or (func is Tensor.__getitem__ and _is_mask(args[1])) or len(numbers) % len(x):
        return True
    member = members_of(numbers, len(x), context)
    if not len(member):
        return False
    in_order = members_of(torch.arange(len(member), device=member.device), len(member), context)
    return not bool((member == in_order.view(-1, *([1] * (member.ndim - 1)))).all())


def _has_rows(context: MemberContext, x: Tensor) -> bool:
    return x.ndim > 0 and len(x) > 0 and context.is_rows(len(x))


def _is_mask(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(entry, Tensor) and entry.dtype == torch.bool for entry in entries)


class Routing(TorchFunctionMode):
    """Inside the block, rows that a model picks know their members.

    Args:
        context: of the values in the model; nothing is done while no call of the model runs.
    """

    def __init__(self, context: MemberContext) -> None:
        super().__init__()
        self._context = context

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PICKS and not kwargs and self._context.inputs is not None and not isinstance(args[0], Value):
            numbers, lead = _numbers(func, args)
            if numbers is not None and self._holds_rows(args[0]):
                return self._picked(func, args, numbers, lead)
        return func(*args, **(kwargs or {}))

    def _holds_rows(self, x: Tensor) -> bool:
        context = self._context
        if x.ndim == 0 or is_constant(context, x):
            return False
        holds, use = _has_rows(context, x), (_place(), "picked", x.ndim)
        if context.trusting:
            learn(context, use, "rows" if holds else "shared")
            return holds
        known = context.layouts.get(use)
        if holds and known not in ("rows", "shared"):
            raise UnsupportedOperationError(
                f"the model picks entries of a tensor of shape {tuple(x.shape)} by their numbers ({use[0]}), and with "
                f"{context.rows} rows its sizes do not tell whether it holds the members. Another batch size or "
                'sequence length may; or evaluate with population.forward and mode="vmap" or mode="loop"'
            )
        return holds and known == "rows"

    def _picked(self, func: Any, args: tuple[Any, ...], numbers: Tensor, lead: int) -> Any:
        x, context = args[0], self._context
        out = func(*args)
        member = members_of(numbers, x.shape[0], context)
        if member.ndim > 1:  # several entries for each row, of the same member
            first = member.flatten(1)[:, :1]
            if not bool((member.flatten(1) == first).all()):
                raise refused(func, "of several members in one row")
            member = first[:, 0]
        if out.ndim <= lead or out.shape[lead] != len(member):
            raise refused(func, f"to a result of shape {tuple(out.shape)}")
        return RoutedRows(out, member, context, lead)


def _numbers(func: Any, args: tuple[Any, ...]) -> tuple[Tensor | None, int]:
    """The numbers of rows that are picked, and how many new dimensions come before them."""
    if func is not Tensor.__getitem__:
        return (args[2], 0) if len(args) == 3 and args[1] == 0 and _is_index(args[2]) else (None, 0)
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    lead = 0
    while lead < len(index) and index[lead] is None:
        lead += 1
    if lead > 1 or lead >= len(index) or not _is_index(index[lead]):
        return None, 0
    first = index[lead]
    if first.dtype == torch.bool:
        return first.nonzero()[:, 0], lead
    others = [entry for entry in index[lead + 1 :] if isinstance(entry, Tensor) and entry.ndim > 0]
    same = all(entry.shape == first.shape for entry in others)
    return first if same else torch.broadcast_tensors(first, *others)[0], lead


def _is_index(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Value) and x.ndim > 0 and not x.is_floating_point()


def _place() -> str:
    """The line of the model's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
