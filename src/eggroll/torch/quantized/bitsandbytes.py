"""bitsandbytes: 8-bit weights by row (LLM.int8(), arXiv 2208.07339), 4-bit ones by block (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll._optional import require
from eggroll.torch.quantized.grid import Bits, ModuleGrid


def _is(module: Any, *names: str) -> bool:
    return any(base.__name__ in names and base.__module__.startswith("bitsandbytes") for base in type(module).__mro__)


class Bnb8Grid(ModuleGrid):
    """The weight of a ``Linear8bitLt``: ``W = code * scale / 127`` with a scale for each row.

    The product is bitsandbytes' own: each row of activations is rounded to 8 bits. Activations of at least the layer's
    ``threshold`` are left out of that and multiplied in floating point. bitsandbytes does so for the whole column of
    every row of a batch if one of them is that large; here each row goes by its own, so that a member's result does not
    depend on the others'.

    Args:
        module: quantized, so after ``.to(device)``.
        dtype: of the products' results.
    """

    format = "bitsandbytes int8"
    low, high = -127, 127
    rounds_inputs = True

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        self.shape = module.weight.shape
        self.threshold = float(module.state.threshold)
        held = module.weight.SCB  # it moves with the module's first call
        self._codes, self.row_scales = module.weight.data, module.state.SCB if held is None else held

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module is a ``Linear8bitLt`` whose weight is in 8 bits."""
        return _is(module, "Linear8bitLt") and module.weight.dtype == torch.int8

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return self._codes  # type: ignore[no-any-return]

    def restore(self, module: Any) -> Any:  # noqa: D102
        weight, state = module.weight, module.state
        weight.data = self._codes
        for place in (weight, state):  # copies of a module hold them twice
            if place.CB is not None:
                place.CB = self._codes
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Bnb8Grid:
        return Bnb8Grid(copy.deepcopy(self.original(), memo), self.dtype)

    def codes(self) -> Tensor:  # noqa: D102
        return self.stored.clone()

    def quanta(self) -> Tensor:  # noqa: D102
        return self.row_scales.float().view(-1, 1) / 127

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        self.stored.copy_(codes)

    def move(self, delta: Tensor) -> None:  # noqa: D102
        self.stored.add_(delta.to(torch.int8))

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        chosen = slice(None) if rows is None else rows
        return (self.stored[chosen].float() * self.quanta()[chosen]).to(dtype)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        functional: Any = require("bitsandbytes.functional", extra="quantized")
        x_Rn = x.reshape(-1, x.shape[-1])
        out = x.new_empty((x_Rn.shape[0], self.shape[0]))
        if out.numel() == 0:
            return out.view(*x.shape[:-1], self.shape[0])
        large = x_Rn.abs() >= self.threshold if self.threshold > 0 else None
        inside = x_Rn if large is None else x_Rn.masked_fill(large, 0.0)
        codes, scales, _ = functional.int8_vectorwise_quant(inside.to(torch.float16))
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, self.stored, scales, self.row_scales, None, x.dtype)
        if large is not None and bool(large.any()):
            columns = large.any(0).nonzero().view(-1)
            weight = (self.stored[:, columns].float() * self.quanta()).to(x.dtype)
            out = out + F.linear((x_Rn - inside)[:, columns], weight)
        return out.view(*x.shape[:-1], self.shape[0])

    @property
    def bits(self) -> Bits:  # noqa: D102
        return self._bits(self.row_scales.nbytes)


class Bnb4Grid(ModuleGrid):
    """The weight of a ``Linear4bit``: one of 16 levels (nf4, fp4), times the largest size in its block.

    Codes number the levels from the smallest to the largest; fp4 writes its zero in two ways, so it has 15 of them.
    Blocks run over the flattened weight. The product is bitsandbytes' own.

    Args:
        module: quantized, so after ``.to(device)``.
        dtype: of the products' results.
    """

    uniform = False

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        _in_saved_layout(module)
        # The module's own call may reorder what it holds, so these are kept beside it.
        self._bytes, self.state = module.weight.data, copy.copy(module.weight.quant_state)
        state = self.state
        self.format = f"bitsandbytes {state.quant_type}"  # type: ignore[misc]
        self.shape = torch.Size(state.shape)
        self.levels, self._code_of = torch.unique(state.code.float(), return_inverse=True)
        self._written = torch.stack([(self._code_of == code).nonzero()[0, 0] for code in range(len(self.levels))])
        self._written, self._code_of = self._written.to(torch.uint8), self._code_of.to(torch.uint8)
        self.low, self.high = 0, len(self.levels) - 1

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module is a ``Linear4bit`` whose weight is in 4 bits."""
        return _is(module, "Linear4bit") and getattr(module.weight, "quant_state", None) is not None

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return self._bytes.view(torch.uint8)  # type: ignore[no-any-return]

    def restore(self, module: Any) -> Any:  # noqa: D102
        weight = module.weight
        weight.data, weight.quant_state = self._bytes, copy.copy(self.state)
        module.quant_state = weight.quant_state
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Bnb4Grid:
        return Bnb4Grid(copy.deepcopy(self.original(), memo), self.dtype)

    def _sizes(self) -> Tensor:
        """The largest size in each block, float32."""
        state = self.state
        if not state.nested:
            return state.absmax.float()  # type: ignore[no-any-return]
        functional: Any = require("bitsandbytes.functional", extra="quantized")
        return functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset  # type: ignore[no-any-return]

    def _raw(self) -> Tensor:
        """``(m, n)`` uint8, the levels as they are written."""
        packed = self.stored.reshape(-1)
        raw = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)
        return raw[: self.shape.numel()].view(self.shape)

    def codes(self) -> Tensor:  # noqa: D102
        return self._code_of[self._raw().int()]

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        raw = self._raw()
        # of two ways to write a level, the one that is there stays
        raw = torch.where(self._code_of[raw.int()] == codes, raw, self._written[codes.int()]).view(-1)
        raw = F.pad(raw, (0, raw.numel() % 2)).view(-1, 2)
        self.stored.view(-1).copy_((raw[:, 0] << 4) | raw[:, 1])

    def quanta(self) -> Tensor:  # noqa: D102
        gaps = self.levels.diff()
        gaps = torch.cat((gaps, gaps[-1:]))[self.codes().int()].view(-1)
        return _times_blocks(gaps, self._sizes(), self.state.blocksize).view(self.shape)

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        (m, n), block = self.shape, self.state.blocksize
        chosen = slice(None) if rows is None else rows
        if n % block:  # a block goes on in the next row
            values = _times_blocks(self.levels[self.codes().int()].view(-1), self._sizes(), block)
            return values.view(self.shape)[chosen].to(dtype)
        packed = self.stored.view(m, n // 2)[chosen]
        sizes = self._sizes().view(m, n // block)[chosen]
        return torch.ops.bitsandbytes.dequantize_4bit.default(  # type: ignore[no-any-return]
            packed.reshape(-1, 1), sizes.reshape(-1), block, self.state.quant_type, (packed.shape[0], n), dtype
        )

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        bitsandbytes: Any = require("bitsandbytes", extra="quantized")
        wide = x.to(self.module.compute_dtype or x.dtype)
        return bitsandbytes.matmul_4bit(wide, self._bytes, quant_state=self.state).to(x.dtype)  # type: ignore[no-any-return]

    @property
    def bits(self) -> Bits:  # noqa: D102
        nested = self.state.state2.absmax.nbytes if self.state.nested else 0
        return self._bits(self.state.absmax.nbytes + nested)


def _times_blocks(values: Tensor, sizes: Tensor, block: int) -> Tensor:
    """Flat values, each times the size of its block; the last block may be shorter."""
    return values * sizes.view(-1).repeat_interleave(block)[: values.numel()]


def _in_saved_layout(module: Any) -> None:
    """Undo what a ``Linear4bit`` does at its first call on some CPUs: reorder its bytes for a kernel in bfloat16.

    That call has rounded the blocks' sizes to bfloat16, which cannot be undone.
    """
    weight = module.weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return
    functional: Any = require("bitsandbytes.functional", extra="quantized")
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not weight.quant_state.nested:  # bitsandbytes 0.50 leaves the sizes as the kernel takes them
        weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
    module.quant_state = weight.quant_state
