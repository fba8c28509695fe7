"""A cache of keys and values with room for tokens to come.

transformers' own one makes a new tensor for each token and copies all earlier ones into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Columns that are kept free when a layer has to grow."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A ``DynamicLayer`` whose keys and values are views ``(rows, heads, columns, size)`` of tensors with free columns.

    Whatever exchanges its ``keys`` or ``values`` (a choice of rows) may do so: room is then made anew.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones behind them."""
        if type(key_states) is not Tensor or torch._C._functorch.maybe_current_level() is not None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._extended("keys", self.keys, key_states)
        self.values = self._extended("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows. The memory of the others is given back at once, not when the next token comes."""
        self._rooms.clear()
        super().batch_select_indices(indices)

    def _extended(self, name: str, kept: Tensor, new: Tensor) -> Tensor:
        known = kept.shape[-2] if kept.numel() else 0
        width = known + new.shape[-2]
        room, view = self._rooms.get(name, (None, None))
        if room is None or view is not kept or width > room.shape[-2]:
            room = new.new_empty((*new.shape[:-2], width + ROOM, new.shape[-1]))
            if known:
                room[..., :known, :] = kept
        room[..., known:width, :] = new
        view = room[..., :width, :]
        self._rooms[name] = (room, view)
        return view


__all__ = ["ROOM", "GrowingLayer"]
