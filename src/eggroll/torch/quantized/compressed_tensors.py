"""compressed-tensors: integer weights of 1 to 8 bits, packed or a byte each, by tensor, row or group of columns.

Transformers loads them as they are stored, and the library expands the whole model at its first call, as it has no
kernels of its own. Taken over before that call they stay packed, and are expanded some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eggroll._optional import require
from eggroll.torch.quantized.grid import Bits, ModuleGrid


class CompressedGrid(ModuleGrid):
    """``W = scale * (code - zero_point)`` of a linear layer of compressed-tensors.

    Where the checkpoint rounds activations too, the library's own rounding is applied before the product.

    Args:
        module: compressed, with its ``quantization_scheme``.
        dtype: of the products' results.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        weights = module.quantization_scheme.weights
        self.rounds_inputs = module.quantization_scheme.input_activations is not None
        self.width = int(weights.num_bits)
        self.packed = hasattr(module, "weight_packed")
        self.format = f"compressed-tensors int{self.width}"  # type: ignore[misc]
        self.low, self.high = -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1
        if self.packed:
            self.shape = torch.Size(int(size) for size in module.weight_shape)
        else:
            self.shape = module.weight.shape
        self._zeros = self._read_zeros()

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module is a compressed linear layer with integer weights."""
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or getattr(scheme, "weights", None) is None or scheme.output_activations is not None:
            return False
        if hasattr(module, "weight_g_idx"):
            return False  # an order of columns that the library does not read anymore
        inputs = scheme.input_activations
        if inputs is not None and inputs.dynamic and inputs.strategy != "token":
            return False  # one scale for all rows would mix members
        stored = getattr(module, "weight_packed", getattr(module, "weight", None))
        return (
            isinstance(module, torch.nn.Linear)
            and stored is not None
            and stored.dtype in (torch.int32, torch.int8)
            and scheme.weights.type == "int"
            and scheme.weights.strategy in ("tensor", "channel", "group")
        )

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return (self.module.weight_packed if self.packed else self.module.weight).data  # type: ignore[no-any-return]

    def _read_zeros(self) -> Tensor | None:
        """``(m, G)`` zero points; ``None`` where they are all 0."""
        zeros = getattr(self.module, "weight_zero_point", None)
        if zeros is None or self.module.quantization_scheme.weights.symmetric:
            return None
        if zeros.dtype == torch.int32:
            shape = (self.shape[0], self.module.weight_scale.shape[-1])
            zeros = _helpers().unpack_from_int32(zeros.data, self.width, shape, packed_dim=0)
        return self._by_row(zeros.data)

    def _by_row(self, values: Tensor) -> Tensor:
        """Numbers of the tensor, of rows or of groups, as ``(m, G)``."""
        return values.view(-1, values.shape[-1] if values.ndim > 1 else 1).expand(self.shape[0], -1)

    def _unpacked(self, packed: Tensor) -> Tensor:
        if not self.packed:
            return packed
        return _helpers().unpack_from_int32(packed, self.width, torch.Size((packed.shape[0], self.shape[1])))  # type: ignore[no-any-return]

    def codes(self) -> Tensor:  # noqa: D102
        return self._unpacked(self.stored).clone()

    def quanta(self) -> Tensor:  # noqa: D102
        return self._by_row(self.module.weight_scale.data).float()

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        self.stored.copy_(_helpers().pack_to_int32(codes.to(torch.int8), self.width) if self.packed else codes)

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        chosen = slice(None) if rows is None else rows
        quanta = self.quanta()[chosen].unsqueeze(-1)
        values = self._unpacked(self.stored[chosen]).float().view(*quanta.shape[:2], -1)
        if self._zeros is not None:
            values -= self._zeros[chosen].float().unsqueeze(-1)
        return (values * quanta).to(dtype).flatten(1)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        inputs = self.module.quantization_scheme.input_activations
        if inputs is not None:
            forward: Any = require("compressed_tensors.quantization.lifecycle.forward", extra="quantized")
            rows = x.reshape(1, -1, x.shape[-1])  # its scale is one for each row of a 3-D tensor
            x = forward.forward_quantize(self.module, rows, "input", inputs).view(x.shape)
        return super().product(x)

    @property
    def bits(self) -> Bits:  # noqa: D102
        zeros = 0 if self._zeros is None else self.module.weight_zero_point.nbytes
        return self._bits(self.module.weight_scale.nbytes + zeros)


def _helpers() -> Any:
    return require("compressed_tensors.compressors.pack_quantized.helpers", extra="quantized")
