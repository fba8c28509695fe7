"""Small quantized weights: a plain grid whose quanta can be chosen, and one of each format that can be moved."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from eggroll.torch.quantized.gguf import GgufGrid
from eggroll.torch.quantized.grid import Grid, by_group
from eggroll.torch.quantized.tensor import as_parameter
from eggroll.torch.quantized.torchao import TorchaoGrid


class PlainGrid(Grid):
    """Codes and quanta as they are given."""

    format: ClassVar[str] = "plain"

    def __init__(self, codes: Tensor, quanta: Tensor, low: int = -128, high: int = 127) -> None:
        self.held, self.steps, self.low, self.high = codes.to(torch.int8), quanta.float(), low, high
        self.shape, self.dtype = codes.shape, torch.float32

    @property
    def stored(self) -> Tensor:
        return self.held

    def codes(self) -> Tensor:
        return self.held.clone()

    def quanta(self) -> Tensor:
        return self.steps.clone()

    def set_codes(self, codes: Tensor) -> None:
        self.held.copy_(codes)

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: Any = None) -> Tensor:
        chosen = slice(None) if rows is None else rows
        return (self.held[chosen].float() * by_group(self.steps[chosen], self.shape[1])).to(dtype)

    def original(self) -> Any:
        return self.held


def _weights(shape: tuple[int, int], seed: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _torchao(bits: int, weights: Tensor) -> Grid:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    module = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    module.weight.data.copy_(weights)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(module, Int8WeightOnlyConfig() if bits == 8 else config)
    return TorchaoGrid(module.weight.data)


def _gguf(kind: str, weights: Tensor) -> Grid:
    import gguf

    blocks = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[kind])
    return GgufGrid(torch.from_numpy(np.ascontiguousarray(blocks)), kind, torch.float32)


MAKERS = {
    "torchao int8": lambda weights: _torchao(8, weights),
    "torchao int4": lambda weights: _torchao(4, weights),
    "GGUF Q8_0": lambda weights: _gguf("Q8_0", weights),
    "GGUF Q4_0": lambda weights: _gguf("Q4_0", weights),
    "GGUF Q4_1": lambda weights: _gguf("Q4_1", weights),
}
"""A format to what quantizes ``(m, n)`` float32 weights, ``n`` a multiple of 32, with it."""
FORMATS = tuple(MAKERS)


def quantized_model(kind: str, widths: tuple[int, ...] = (32, 64, 32), seed: int = 0) -> nn.Sequential:
    """An MLP with tanh in between whose matrices are in a format; its biases are plain."""
    layers: list[nn.Module] = []
    for index, (n, m) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(n, m)
        layer.bias.data.zero_()
        layer._parameters["weight"] = as_parameter(MAKERS[kind](_weights((m, n), 10 * seed + index)))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
