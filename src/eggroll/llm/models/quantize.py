"""Which format a model's weights are loaded in: its own, another one, or plain numbers."""

from __future__ import annotations

from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import nn

from eggroll._optional import require
from eggroll.errors import ConfigError, ModelError
from eggroll.llm.config import Quantize
from eggroll.llm.models.gguf_file import gguf_bits
from eggroll.llm.models.locate import Located
from eggroll.torch.quantized.adopt import adopt, grids
from eggroll.torch.quantized.grid import Bits

Form = Literal["plain", "int8", "int4", "gguf", "own"]
"""What a model is loaded as; ``own``: quantized by whoever made it, in its library's format."""

GROUP = 32
"""Columns that share a scale in int4, as in llama.cpp's formats."""


def check_quantize(quantize: Any) -> None:
    """Refuse what is none of :data:`Quantize`.

    Raises:
        ConfigError: with what is allowed.
    """
    if quantize not in get_args(Quantize):
        raise ConfigError(f"quantize (={quantize!r}) must be one of: {', '.join(get_args(Quantize))}")


def form_of(located: Located, config: Any, quantize: Quantize) -> Form:
    """What a model is loaded as.

    Raises:
        ModelError: it is quantized already and should be quantized otherwise, or it is RWKV-7.
    """
    method = _method(config)
    kept = "gguf" if located.gguf is not None else "own" if method else "plain"
    if quantize == "auto" or quantize == kept:
        return kept  # type: ignore[return-value]
    if quantize == "gguf":
        raise ModelError(f"{located.source} has no GGUF file; give a .gguf file, or quantize='int8' or 'int4'")
    if kept == "own":
        raise ModelError(
            f"the weights of {located.source} are quantized already ({method}), and stay in that format: "
            f"leave quantize (={quantize!r}) at 'auto', or give the model in float32 or bfloat16"
        )
    if quantize in ("int8", "int4") and getattr(config, "model_type", "") == "rwkv7":
        raise ModelError(
            f"{located.source} is an RWKV-7 model, whose weights cannot be quantized here; use quantize='none'"
        )
    return "plain" if quantize == "none" else quantize


def torchao_arguments(form: Form) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize linear layers while they are read, all but the output head.

    Args:
        form: ``int8`` (a scale a row), ``int4`` (a scale for each :data:`GROUP` columns), or another one: nothing.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    if form not in ("int8", "int4"):
        return {}
    quantization: Any = require("torchao.quantization", extra="quantized")
    granularity: Any = require("torchao.quantization.granularity", extra="quantized")
    if form == "int8":
        config = quantization.Int8WeightOnlyConfig(version=2)
    else:
        group = granularity.PerGroup(GROUP)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, form), granularity=group)
    transformers: Any = require("transformers", extra="llm")
    return {"quantization_config": transformers.TorchAoConfig(config)}


def take_over(model: Any, form: Form, source: str) -> None:
    """Take over the quantized weights of a loaded model.

    Raises:
        ModelError: it has none, though it should.
    """
    if form in ("int8", "int4", "own") and not adopt(model):
        raise ModelError(f"{source} has no linear layers whose weights are quantized; use quantize='none'")


def notes_of(model: Any) -> list[str]:
    """What is to be said about the formats of a loaded model's weights, if there is something."""
    formats: dict[str, int] = {}
    for grid in grids(model).values():
        formats[grid.format] = formats.get(grid.format, 0) + 1
    if not formats:
        return []
    kept = ", ".join(f"{number} weights in {name}" for name, number in formats.items())
    source = getattr(model, "gguf_source", None)
    expanded = ", ".join(f"{number} in {name}" for name, number in source.expanded.items()) if source else ""
    return [f"quantized: {kept}" + (f"; expanded to floating point: {expanded}" if expanded else "")]


def bits_by_parameter(model: Any, located: Located, form: Form) -> dict[str, Bits]:
    """Bits per weight (code, scales) of the parameters that will be quantized, by name; the others are plain.

    Args:
        model: the model without its weights.
        located: where it is.
        form: what it is loaded as.
    """
    if form == "gguf":
        return gguf_bits(model, located)
    if form == "own":
        code = _own_bits(model.config)
    elif form == "plain":
        return {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # torchao keeps a code of 4 bits in a byte on CPUs, and a scale and a zero point for each group
    shared = {"int8": 40.0, "int4": 24 / GROUP}.get(form, 0.5)

    def bits(columns: int) -> Bits:
        return (code, shared) if form == "own" else (8.0, shared / columns if form == "int8" else shared)

    return {
        f"{name}.weight": bits(module.in_features)
        for name, module in model.named_modules()
        if _is_quantizable(module, form) and module is not head
    }


def _is_quantizable(module: nn.Module, form: Form) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and (form != "int4" or module.in_features % GROUP == 0)


def _own_bits(config: Any) -> float:
    """Bits of a code in a checkpoint that is quantized already, as its configuration says it; 8 if it does not."""
    found = getattr(config, "quantization_config", None)
    values = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        return 4.0
    bits = values.get("bits")
    return float(bits) if isinstance(bits, int) else 8.0


def _method(config: Any) -> str:
    """The library that quantized a checkpoint; empty for a plain one."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "")
    return str(getattr(method, "value", method) or "")
