"""torchao's weight-only formats: int8 by row, int4 (and other widths) by group, a byte for each code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.quantized.grid import Bits, Grid, by_group


def _rounding_of_inputs(weight: Any) -> Any:
    """How activations are rounded before the product; ``None`` if they are not."""
    return getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None)


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
        width = int(str(kind).removeprefix("torch.int"))
        self.low, self.high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        self.format = f"torchao int{width}"  # type: ignore[misc]
        self.rounds_inputs = _rounding_of_inputs(weight) is not None

    @staticmethod
    def takes(weight: Any) -> bool:
        """Whether a tensor is one of torchao's that can be moved."""
        if type(weight).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor") or weight.ndim != 2:
            return False
        inputs = getattr(_rounding_of_inputs(weight), "granularity", None)
        return type(inputs).__name__ != "PerTensor"  # one scale for all rows would mix members

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
    def bits(self) -> Bits:  # noqa: D102
        zero = self.weight.zero_point
        shared = self.weight.scale.nbytes + (0 if zero is None else zero.nbytes)
        return 8.0, 8 * shared / self.shape.numel()
