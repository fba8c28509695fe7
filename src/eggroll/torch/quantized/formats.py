"""The formats whose weights can be moved, and how quantized layers of any library are recognized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec, asked_for
from eggroll.errors import UnsupportedOperationError
from eggroll.torch.quantized.bitsandbytes import Bnb4Grid, Bnb8Grid
from eggroll.torch.quantized.compressed_tensors import CompressedGrid
from eggroll.torch.quantized.gptq import GptqGrid
from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.tensor import grid_of
from eggroll.torch.quantized.torchao import TorchaoGrid


@dataclass(frozen=True)
class Format:
    """A format that is known.

    Attributes:
        name: as messages say it.
        takes: whether a module, or a parameter's contents, are in it.
        grid: makes the grid, of the dtype of the activations around it.
        in_module: whether the library keeps it in a module of its own, and not in a tensor of its own.
    """

    name: str
    takes: Callable[[Any], bool]
    grid: Callable[[Any, torch.dtype], Grid]
    in_module: bool = True


FORMATS = (
    Format("torchao int8 and intx weight-only", TorchaoGrid.takes, lambda w, _: TorchaoGrid(w), in_module=False),
    Format("bitsandbytes int8", Bnb8Grid.takes, Bnb8Grid),
    Format("bitsandbytes nf4 and fp4", Bnb4Grid.takes, Bnb4Grid),
    Format("compressed-tensors int1 to int8", CompressedGrid.takes, CompressedGrid),
    Format("GPTQ int2, int4 and int8", GptqGrid.takes, GptqGrid),
)
"""Formats of a loaded model. GGUF's are taken from the file (:mod:`eggroll.torch.quantized.gguf`)."""


def known() -> str:
    """The formats that can be moved, for messages."""
    return ", ".join([*(row.name for row in FORMATS), "GGUF Q8_0, Q4_0 and Q4_1"])


CLASSES = {
    "fp8": "FP8",
    "awq": "AWQ",
    "wqlinear": "AWQ",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "fpquant": "FP-Quant",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "vquantlinear": "VPTQ",
    "spqr": "SpQR",
    "bitlinear": "BitNet",
    "quanto": "quanto",
    "aqlm": "AQLM",
}
"""What names of classes and of their packages have in them, in lower case, to the format's name."""
STORES = ("weight", "qweight", "W_q", "weight_packed", "codes")
"""What libraries call the tensor that holds a layer's codes."""


@dataclass(frozen=True)
class Layer:
    """A quantized weight in a model.

    Attributes:
        name: of the module in the model.
        module: the module that has it.
        attribute: where the weight is in the module, or would be.
        weight: the parameter, if there is one.
        format: what it is in; ``None`` for one that is not known.
        what: the format's name.
    """

    name: str
    module: nn.Module
    attribute: str
    weight: Any
    format: Format | None
    what: str

    @property
    def parameter(self) -> str:
        """The weight's name in the model."""
        return f"{self.name}.{self.attribute}" if self.name else self.attribute


def find(model: nn.Module) -> list[Layer]:
    """The quantized weights of a model that were not taken over, known or not; shared modules once."""
    return [layer for name, module in model.named_modules() for layer in _layers_of(name, module)]


def refuse_raw(
    model: nn.Module, *, include: Sequence[str] | None, exclude: Sequence[str], kinds: Sequence[str]
) -> list[ParameterSpec]:
    """Refuse a population of quantized weights that were not taken over: their libraries' kernels know no members.

    Returns:
        Those that are no parameters of their modules, so that patterns can name them.

    Raises:
        UnsupportedOperationError: patterns and kinds ask for one of them.
    """
    nameless = []
    for layer in find(model):
        kind: Kind = "embedding" if isinstance(layer.module, nn.Embedding) else "matrix"
        spec = ParameterSpec(layer.parameter, (), kind, dtype=layer.what)
        if layer.weight is None:
            nameless.append(spec)
        if asked_for(spec, include=include, exclude=exclude, kinds=kinds):
            way = (
                f"cannot be moved; known: {known()}. Load the model in one of these, or not quantized"
                if layer.format is None
                else "were not taken over: call eggroll.torch.quantized.adopt.adopt(model) first"
            )
            raise UnsupportedOperationError(
                f"parameter {layer.parameter!r} is quantized ({layer.what}), and such weights {way}; or leave them out "
                f"(exclude=[{layer.parameter!r}])"
            )
    return nameless


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    for row in FORMATS:
        if row.in_module and row.takes(module):
            yield Layer(name, module, "weight", module._parameters.get("weight"), row, row.name)
            return
    for attribute, weight in module._parameters.items():
        if weight is None or grid_of(weight) is not None:
            continue
        row = next((row for row in FORMATS if not row.in_module and row.takes(weight)), None)  # type: ignore[assignment]
        if row is not None:
            yield Layer(name, module, attribute, weight, row, row.name)
        elif type(weight.data).__module__.split(".")[0] in ("torchao", "optimum", "quanto"):
            library, kind = type(weight.data).__module__.split(".")[0], type(weight.data).__name__
            yield Layer(name, module, attribute, weight, None, f"{library}'s {kind}")
    what = _unknown(module)
    if what is not None:
        yield Layer(name, module, "weight", module._parameters.get("weight"), None, what)


def _unknown(module: nn.Module) -> str | None:
    """The name of a format that is not known; ``None`` for a layer that is not quantized."""
    held = [
        getattr(module, name, None)
        for name in STORES
        if name in module.__dict__ or name in module._parameters or name in module._buffers
    ]
    narrow = [x for x in held if isinstance(x, Tensor) and grid_of(x) is None and x.ndim >= 2 and not _is_wide(x.dtype)]
    if not narrow:
        return None
    text = f"{type(module).__module__}.{type(module).__name__}".lower()
    named = next((what for part, what in CLASSES.items() if part in text), None)
    kind = str(narrow[0].dtype).removeprefix("torch.")
    if named is None and kind.startswith("float8"):
        named = "FP8"
    return named or f"{kind} codes of {type(module).__module__.split('.')[0]}'s {type(module).__name__}"


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_complex or dtype == torch.bool or (dtype.is_floating_point and dtype.itemsize > 1)
