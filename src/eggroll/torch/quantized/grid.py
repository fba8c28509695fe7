"""What every quantized format has in common: integer codes on a grid, and a product with them.

A weight ``(m, n)`` is ``W[i, j] = offset + quantum * code`` with a quantum (and an offset) for each group of columns of
each row. Training moves codes; quanta and offsets stay. So a format is four things: its product, its codes, its quanta,
and how a code is moved. Where the levels are not equally far apart (nf4), codes number them from the smallest to the
largest, and each weight has a quantum of its own: the distance to its next level.

Shapes: m outputs, n inputs, G groups of ``n / G`` columns.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError

Bits = tuple[float, float]
"""Of a code, and of what a weight's group shares."""
TILE_BYTES = 2**23
"""Of the rows that a format without a kernel of its own unpacks at a time, so that they are in cache when used."""


class Grid(abc.ABC):
    """One quantized weight, in the memory of the library that made it.

    Attributes:
        format: its name, as messages and tables say it.
        low: the smallest code.
        high: the largest.
        shape: ``(m, n)``.
        dtype: of the products' results, and of the floating-point tensors around it.
        uniform: whether all codes are equally far apart.
        rounds_inputs: whether the product rounds activations to 8 bits, each row by itself.
    """

    format: ClassVar[str]
    low: int
    high: int
    shape: torch.Size
    dtype: torch.dtype
    uniform: ClassVar[bool] = True
    rounds_inputs: bool = False

    @property
    @abc.abstractmethod
    def stored(self) -> Tensor:
        """The tensor that holds the codes as the library packs them; :meth:`move` changes it in place."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.stored.device

    @abc.abstractmethod
    def codes(self) -> Tensor:
        """``(m, n)`` int8 or uint8, a copy."""

    @abc.abstractmethod
    def quanta(self) -> Tensor:
        """``(m, G)`` float32: how much a weight changes if its code goes up by one; 0 where nothing can change it.

        Not uniform: ``(m, n)``, and for the largest code how much it changes if it goes down by one.
        """

    @abc.abstractmethod
    def set_codes(self, codes: Tensor) -> None:
        """Write ``(m, n)`` codes, all within the range."""

    @abc.abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:
        """The weight's numbers ``(m, n)``, or some of its rows, in floating point."""

    @abc.abstractmethod
    def original(self) -> Any:
        """What the library's own module holds, as it is now: for saving."""

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each group, ``(m, G)`` float32 copies; ``None`` for the offset if there is none.

        Raises:
            UnsupportedOperationError: this format does not give them.
        """
        raise UnsupportedOperationError(
            f'quantized_update="scales" moves the scales of quantized weights, and those of {self.format} cannot be '
            'written; use quantized_update="error_feedback"'
        )

    def set_scales(self, scales: Tensor, offsets: Tensor | None) -> None:
        """Write what :meth:`scales` gave, rounded to the format's own dtype."""
        raise AssertionError(f"{self.format} gives no scales")

    def product(self, x: Tensor) -> Tensor:
        """``x W^T`` for ``x (..., n)``, of the dtype of ``x``; unpacked, where it must be, some rows at a time."""
        m, n = self.shape
        step = max(1, TILE_BYTES // (n * x.element_size()))
        if step >= m:
            return F.linear(x, self.dequantized(x.dtype))
        x_Rn = x.reshape(-1, n)
        out = x.new_empty((x_Rn.shape[0], m))
        for start in range(0, m, step):
            part = slice(start, min(start + step, m))
            torch.mm(x_Rn, self.dequantized(x.dtype, part).t(), out=out[:, part])
        return out.view(*x.shape[:-1], m)

    def gathered(self, ids: Tensor) -> Tensor:
        """Rows by number, as an embedding takes them: ``(..., n)``, of the weight's dtype."""
        return self.dequantized(self.dtype, ids.reshape(-1)).view(*ids.shape, self.shape[1])

    def move(self, delta: Tensor) -> None:
        """Add ``delta (m, n)``, whole numbers, to the codes; the caller sees to it that they stay in range."""
        codes = self.codes()
        self.set_codes((codes.to(torch.int16) + delta.to(torch.int16)).to(codes.dtype))

    @property
    def bits(self) -> Bits:
        """Memory for each weight: of its code, and its share of scales and offsets."""
        return self._bits(0)

    def _bits(self, shared: int) -> Bits:
        """:attr:`bits`, where scales and offsets take ``shared`` bytes."""
        return 8 * self.stored.nbytes / self.shape.numel(), 8 * shared / self.shape.numel()


class ModuleGrid(Grid):
    """A weight whose library keeps it in a module of its own.

    Args:
        module: the library's; its codes are changed in place.
        dtype: of the products' results.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    def original(self) -> nn.Module:
        """The library's module."""
        return self.restore(self.module)

    def restore(self, module: Any) -> nn.Module:
        """See to it that a module (the grid's, or one whose weight is tied to it) holds this weight as it is now."""
        return module  # type: ignore[no-any-return]


def by_group(values: Tensor, n: int) -> Tensor:
    """``(m, G)`` numbers of groups, one for each of ``n`` columns: ``(m, n)``."""
    return values if values.shape[1] == n else values.repeat_interleave(n // values.shape[1], dim=1)
