"""Decisions in Python under ``torch.vmap`` that all members take alike (``if attention_mask.all():``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TO_PYTHON = {
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.is_nonzero,
    torch.is_nonzero,
}  # fmt: skip


class Unanimous(TorchFunctionMode):
    """Inside the block, a tensor of a vmap becomes a number if all members have the same; otherwise vmap refuses."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        functorch = torch._C._functorch
        if func in _TO_PYTHON and functorch.is_batchedtensor(args[0]) and functorch.maybe_get_level(args[0]) == 1:
            value, dim = functorch.get_unwrapped(args[0]), functorch.maybe_get_bdim(args[0])
            first = value.select(dim, 0)
            if bool((value == first.unsqueeze(dim)).all()):
                return func(first)
        return func(*args, **(kwargs or {}))
