"""GGUF's block formats Q8_0, Q4_0 and Q4_1, kept as the bytes that the file has.

A block is 32 weights of a row. Q8_0: a half-precision scale ``d``, then 32 int8 codes, ``w = d c``. Q4_0: ``d``, then
32 codes of 4 bits in 16 bytes (the lower halves are the first 16 weights), ``w = d (c - 8)``. Q4_1: ``d`` and an offset
``o``, then 4-bit codes, ``w = d c + o`` (ggml's ``ggml-common.h``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eggroll.torch.kernels import gguf_c
from eggroll.torch.quantized.grid import Bits, Grid, by_group

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """How a block's bytes are laid out.

    Attributes:
        name: as GGUF writes it.
        header: bytes before the codes: the scale, and an offset if there are four.
        four_bits: whether two codes share a byte.
        zero: the code that means 0.
    """

    name: str
    header: int
    four_bits: bool
    zero: int

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.header + (BLOCK // 2 if self.four_bits else BLOCK)

    @property
    def bits(self) -> Bits:
        """Of a code, and a weight's share of the header."""
        return 4.0 if self.four_bits else 8.0, 8 * self.header / BLOCK


TYPES = {
    "Q8_0": BlockType("Q8_0", 2, False, 0),
    "Q4_0": BlockType("Q4_0", 2, True, 8),
    "Q4_1": BlockType("Q4_1", 4, True, 0),
}
"""The formats that can be kept and moved."""


class GgufGrid(Grid):
    """A weight in GGUF blocks.

    Args:
        blocks: ``(m, n / 32 * bytes of a block)`` uint8, changed in place.
        kind: the name of its block type.
        dtype: of the products' results.

    Raises:
        KeyError: the block type is none of :data:`TYPES`.
    """

    format = "GGUF"

    def __init__(self, blocks: Tensor, kind: str, dtype: torch.dtype) -> None:
        self.kind = TYPES[kind]
        self.blocks, self.dtype = blocks, dtype
        self.format = f"GGUF {kind}"  # type: ignore[misc]
        self.shape = torch.Size((blocks.shape[0], blocks.shape[1] // self.kind.bytes * BLOCK))
        self.low, self.high = (0, 15) if self.kind.four_bits else (-128, 127)

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return self.blocks

    def _parts(self, rows: slice | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``(k, n)``, scales ``(k, G)`` and offsets ``(k, G)`` of rows."""
        chosen = self.blocks if rows is None else self.blocks[rows]
        blocks = chosen.view(chosen.shape[0], -1, self.kind.bytes)
        header = blocks[..., : self.kind.header].contiguous().view(torch.float16).float()
        packed = blocks[..., self.kind.header :]
        if self.kind.four_bits:
            codes = torch.cat((packed & 15, packed >> 4), dim=-1)
        else:
            codes = packed.contiguous().view(torch.int8)
        offsets = header[..., 1] if self.kind.header == 4 else None
        return codes.reshape(chosen.shape[0], self.shape[1]), header[..., 0], offsets

    def codes(self) -> Tensor:  # noqa: D102
        return self._parts()[0].clone()

    def quanta(self) -> Tensor:  # noqa: D102
        return self._parts()[1]

    def scales(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        return self._parts()[1:]

    def set_scales(self, scales: Tensor, offsets: Tensor | None) -> None:  # noqa: D102
        header = self.blocks.view(self.shape[0], -1, self.kind.bytes)[..., : self.kind.header]
        parts = (scales,) if offsets is None else (scales, offsets)
        header.copy_(torch.stack(parts, dim=-1).to(torch.float16).view(torch.uint8))

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        packed = self.blocks.view(self.shape[0], -1, self.kind.bytes)[..., self.kind.header :]
        grouped = codes.view(self.shape[0], -1, BLOCK)
        if self.kind.four_bits:
            grouped = grouped.to(torch.uint8)
            packed.copy_(grouped[..., : BLOCK // 2] | (grouped[..., BLOCK // 2 :] << 4))
        else:
            packed.copy_(grouped.to(torch.int8).view(torch.uint8))

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        unpacked = gguf_c.unpack(self.blocks, self.kind.name, dtype, rows)
        if unpacked is not None:
            return unpacked
        codes, scales, offsets = self._parts(rows)
        values = (codes.float() - self.kind.zero) * by_group(scales, self.shape[1])
        return (values if offsets is None else values + by_group(offsets, self.shape[1])).to(dtype)

    @property
    def bits(self) -> Bits:  # noqa: D102
        return self.kind.bits

    def original(self) -> Tensor:
        """The blocks."""
        return self.blocks
