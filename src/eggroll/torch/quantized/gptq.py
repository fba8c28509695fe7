"""GPTQ (arXiv 2210.17323) as it is published: codes packed into 32-bit words, zero points, scales, groups of inputs.

A layer is four tensors: ``qweight (n / p, m)`` int32 with ``p = 32 / bits`` codes of one output in a word, the lowest
bits first; ``qzeros (G, m / p)`` int32, likewise along the outputs, one less than the zero point in the usual layout
(``gptq``), the zero point itself in ``gptq_v2``; ``scales (G, m)`` float16; ``g_idx (n,)``, the group of each input.

    W[i, j] = scales[g_idx[j], i] * (code[j, i] - zero[g_idx[j], i])

The library that transformers loads them with needs another PyTorch, so the layout is read here; layers of such a
library that keep it are taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.errors import ModelError
from eggroll.torch.quantized.grid import Bits, ModuleGrid

BITS = (2, 4, 8)
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of ``bits`` bits, uint8, ``32 / bits`` times as many along ``dim`` as there are words."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(-1, *([1] * (words.ndim - dim - 1)))
    return (words.unsqueeze(dim + 1) >> shifts).bitwise_and_(2**bits - 1).to(torch.uint8).flatten(dim, dim + 1)


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The other way round: int32 words."""
    parts = codes.to(torch.int32).unflatten(dim, (-1, 32 // bits)).unbind(dim + 1)
    words = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        words |= part << (bits * place)
    return words


class GptqGrid(ModuleGrid):
    """The weight of a layer that holds the published tensors.

    Args:
        module: with ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
        dtype: of the products' results.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        n, m = module.g_idx.numel(), module.scales.shape[1]
        self.shape, self.width = torch.Size((m, n)), _bits(module)
        self.format = f"GPTQ int{self.width}"  # type: ignore[misc]
        self.low, self.high = 0, 2**self.width - 1
        groups = module.g_idx.data.long()
        size = n // module.scales.shape[0]
        in_order = torch.equal(groups, torch.arange(n, device=groups.device) // max(1, size))
        self._groups = None if in_order else groups

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module holds the published tensors, with 2, 4 or 8 bits."""
        held = [getattr(module, name, None) for name in TENSORS]
        if not all(isinstance(tensor, Tensor) for tensor in held):
            return False
        qweight, _, scales, _ = held
        return qweight.dtype == torch.int32 and qweight.shape[1:] == scales.shape[1:] and _bits(module) in BITS  # type: ignore[union-attr]

    @property
    def stored(self) -> Tensor:  # noqa: D102
        return self.module.qweight.data  # type: ignore[no-any-return]

    def _zeros(self) -> Tensor:
        """``(G, m)`` float32 zero points."""
        format_of = getattr(self.module, "qzero_format", None)
        version = format_of() if callable(format_of) else 1
        zeros = unpacked(self.module.qzeros.data, self.width, 1)[:, : self.shape[0]]
        return zeros.float() + (1.0 if version == 1 else 0.0)

    def codes(self) -> Tensor:  # noqa: D102
        return unpacked(self.stored, self.width, 0).t().contiguous()

    def quanta(self) -> Tensor:  # noqa: D102
        scales = self.module.scales.data.float().t()
        return scales.contiguous() if self._groups is None else scales[:, self._groups]

    def set_codes(self, codes: Tensor) -> None:  # noqa: D102
        self.stored.copy_(packed(codes.t(), self.width, 0))

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:  # noqa: D102
        chosen = slice(None) if rows is None else rows
        codes = unpacked(self.stored[:, chosen], self.width, 0).float()
        scales, zeros = self.module.scales.data.float()[:, chosen], self._zeros()[:, chosen]
        if self._groups is None:
            grouped = codes.unflatten(0, (scales.shape[0], -1))
            values = ((grouped - zeros.unsqueeze(1)) * scales.unsqueeze(1)).flatten(0, 1)
        else:
            values = (codes - zeros[self._groups]) * scales[self._groups]
        return values.t().to(dtype)

    @property
    def bits(self) -> Bits:  # noqa: D102
        return self._bits(sum(getattr(self.module, name).nbytes for name in TENSORS[1:]))


def _bits(module: Any) -> int:
    """Bits of a code, by the shapes; 0 if they fit none."""
    inputs = module.g_idx.numel()
    return 32 * module.qweight.shape[0] // inputs if inputs and 32 * module.qweight.shape[0] % inputs == 0 else 0


class GptqLinear(nn.Module):
    """A linear layer of a GPTQ checkpoint, with the checkpoint's own names.

    Args:
        in_features: n.
        out_features: m.
        bits: of a code: 2, 4 or 8.
        group_size: inputs that share a scale; -1 for all.
        bias: whether there is one.
        version: 1 if ``qzeros`` holds one less than the zero points, 2 if it holds them.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool, version: int = 1
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.version = in_features, out_features, version
        size = in_features if group_size < 1 else group_size
        groups, per_word = -(-in_features // size), 32 // bits
        self.register_buffer("qweight", torch.zeros(in_features // per_word, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // per_word, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // size)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def qzero_format(self) -> int:
        """What ``qzeros`` holds: the version of the layout."""
        return self.version

    def forward(self, x: Tensor) -> Tensor:
        """``(..., n)`` to ``(..., m)``."""
        out = GptqGrid(self, x.dtype).product(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def put_layers(model: nn.Module, names: Iterable[str], quantization: Mapping[str, Any]) -> int:
    """Put a :class:`GptqLinear` in the place of every linear layer that a checkpoint has in GPTQ's layout.

    Then ``model.load_state_dict(tensors, assign=True)`` takes the checkpoint as it is.

    Args:
        model: with plain linear layers, whose numbers are not looked at.
        names: of the checkpoint's tensors.
        quantization: ``quantization_config`` of the model's configuration.

    Returns:
        How many layers were replaced.

    Raises:
        ModelError: a layout or a number of bits that is not known.
    """
    bits, layout = int(quantization.get("bits", 4)), str(quantization.get("checkpoint_format", "gptq"))
    if bits not in BITS or layout not in ("gptq", "gptq_v2"):
        raise ModelError(
            f"the GPTQ checkpoint has bits={bits} and checkpoint_format={layout!r}; known are bits 2, 4, 8 and the "
            "formats gptq and gptq_v2. Use another checkpoint of the model"
        )
    places = sorted({name.removesuffix(".qweight") for name in names if name.endswith(".qweight")})
    for place in places:
        owner, _, attribute = place.rpartition(".")
        parent = model.get_submodule(owner)
        linear: Any = getattr(parent, attribute)
        with linear.weight.device:
            made = GptqLinear(
                linear.in_features, linear.out_features, bits=bits, group_size=int(quantization.get("group_size", 128)),
                bias=linear.bias is not None, version=2 if layout == "gptq_v2" else 1,
            )  # fmt: skip
        setattr(parent, attribute, made)
    return len(places)
