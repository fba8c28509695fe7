"""A quantized weight as a tensor: what an unmodified module multiplies with, and what a population perturbs.

It has the shape and dtype of the plain weight, and no memory of its own. ``F.linear`` and ``F.embedding`` go to the
format's kernel; everything else that would need the numbers is refused by name, so nothing is unpacked by accident.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.quantized.grid import Grid


class QuantizedTensor(Tensor):
    """The weight of a :class:`~eggroll.torch.quantized.grid.Grid`, to stand in a module's ``weight``.

    Args:
        grid: the codes and what belongs to them; shared, not copied.
    """

    grid: Grid

    @staticmethod
    def __new__(cls, grid: Grid) -> QuantizedTensor:  # noqa: D102
        return Tensor._make_wrapper_subclass(cls, grid.shape, dtype=grid.dtype, device=grid.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return QuantizedTensor(args[0].grid)
        held = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, QuantizedTensor))
        raise UnsupportedOperationError(
            f"a weight in {held.grid.format} reached the operation {func}, which has no rule for quantized weights; "
            "products (F.linear) and embeddings have. Leave its module out of the quantization, or load the model "
            "with quantize='none'"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        return QuantizedTensor(copy.deepcopy(self.grid, memo))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.grid.format}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _product(grid: Grid, x: Tensor) -> Tensor:
    """``x W^T``; under ``vmap`` the libraries' kernels, which have no rule for it, get the batch as rows."""
    if not torch._C._functorch.is_batchedtensor(x):
        return grid.product(x)
    level, dim = torch._C._functorch.maybe_get_level(x), torch._C._functorch.maybe_get_bdim(x)
    out = _product(grid, torch._C._functorch.get_unwrapped(x).movedim(dim, 0).contiguous())
    return torch._C._functorch._add_batch_dim(out, 0, level)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    out = _product(weight.grid, input)
    return out if bias is None else out + bias


def _embedding(input: Tensor, weight: Any, *_: Any, **__: Any) -> Tensor:
    return weight.grid.gathered(input)  # type: ignore[no-any-return]


_RULES: dict[Any, Callable[..., Any]] = {F.linear: _linear, F.embedding: _embedding}


def grid_of(tensor: Any) -> Grid | None:
    """The grid of a quantized weight; ``None`` for a plain tensor."""
    return tensor.grid if isinstance(tensor, QuantizedTensor) else None


def as_parameter(grid: Grid) -> nn.Parameter:
    """A weight in quantized form for a module's slot."""
    return nn.Parameter(QuantizedTensor(grid), requires_grad=False)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a weight, quantized or not."""
    grid = grid_of(tensor)
    return tensor if grid is None else grid.dequantized(grid.dtype)


def precision(tensor: Tensor) -> torch.dtype:
    """The dtype that rounds as coarsely as products with a weight do: 8 bits are about as many as bfloat16 has."""
    grid = grid_of(tensor)
    return torch.bfloat16 if grid is not None and grid.rounds_inputs else tensor.dtype


def stored(tensor: Tensor) -> Tensor:
    """The memory that an update changes: the codes of a quantized weight, the tensor itself otherwise."""
    grid = grid_of(tensor)
    return tensor.detach() if grid is None else grid.stored
