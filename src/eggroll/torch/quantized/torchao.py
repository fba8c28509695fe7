"""torchao's weight-only formats: int8 by row, int4 (and other widths) by group, a byte for each code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.quantized.grid import Grid, by_group


class TorchaoGrid(Grid):
    """A weight of torchao's ``Int8Tensor`` or ``IntxUnpackedToInt8Tensor``.

    ``W = quantum * (code - zero_point)``; the product is torchao's own.

    Args:
        weight: torchao's tensor; its codes are changed in place.
    """

    format = "torchao"

    def __init__(self, weight: Any) -> None:
        self.weight = weight
        self.shape, self.dtype = weight.shape, weight.dtype
        kind = getattr(weight, "target_dtype", torch.int8)
        self.bits = int(str(kind).removeprefix("torch.int"))
        # torchao's symmetric int8 leaves -128 out, as its scale is max|w| / 127.5; a move may not reach it either
        self.low, self.high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        self.format = f"torchao int{self.bits}"  # type: ignore[misc]

    @staticmethod
    def takes(weight: Any) -> bool:
        """Whether a tensor is one of torchao's that can be moved."""
        return type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor") and weight.ndim == 2

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return self.weight.qdata  # type: ignore[no-any-return]

    def codes(self) -> Tensor:  # noqa: D102
        return self.stored.clone()

    def quanta(self) -> Tensor:  # noqa: D102
        return self.weight.scale.view(self.shape[0], -1).float()  # type: ignore[no-any-return]

    def scales(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        return self.weight.scale.view(self.shape[0], -1).to(torch.float32, copy=True), None

    def set_scales(self, scales: Tensor, offsets: Tensor | None) -> None:  # noqa: D102
        self.weight.scale.copy_(scales.view_as(self.weight.scale))

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        self.stored.copy_(codes)

    def move(self, delta: Tensor) -> None:  # noqa: D102
        self.stored.add_(delta.to(torch.int8))

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        chosen = slice(None) if rows is None else rows
        n, zero = self.shape[1], self.weight.zero_point
        codes = self.stored[chosen].float()
        if zero is not None:
            codes -= by_group(zero.view(self.shape[0], -1)[chosen].float(), n)
        return (codes * by_group(self.quanta()[chosen], n)).to(dtype)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight)

    def original(self) -> Any:  # noqa: D102
        return self.weight

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.stored.nbytes + self.weight.scale.nbytes
