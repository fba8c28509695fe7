"""Checkpoints in GPTQ's format, read as they are published: what loads them in transformers needs another PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from eggroll._optional import require
from eggroll.errors import ModelError
from eggroll.llm.models.locate import Located
from eggroll.torch.quantized.gptq import put_layers


def quantization_of(config: Any) -> dict[str, Any] | None:
    """``quantization_config`` of a GPTQ checkpoint; ``None`` for any other model."""
    found: Any = getattr(config, "quantization_config", None)
    values = found if isinstance(found, dict) else found.to_dict() if hasattr(found, "to_dict") else {}
    method = values.get("quant_method", "")
    return values if str(getattr(method, "value", method)) == "gptq" else None


def load_gptq(located: Located, config: Any, auto: Any, dtype: torch.dtype) -> Any:
    """A model whose linear layers hold the checkpoint's own tensors, on the CPU.

    Args:
        located: a directory or a hub id.
        config: the model's configuration, with ``quantization_config``.
        auto: the class of transformers that makes the model.
        dtype: of everything that is not quantized, and of the products' results.

    Raises:
        ModelError: the checkpoint's layout is not known, or it has not all of the model's parameters.
    """
    safetensors: Any = require("safetensors.torch", extra="llm")
    accelerate: Any = require("accelerate", extra="llm")
    quantization = quantization_of(config)
    assert quantization is not None
    plain = copy.deepcopy(config)
    del plain.quantization_config  # or transformers looks for the library that made the checkpoint
    with accelerate.init_empty_weights(include_buffers=False):
        model = auto.from_config(plain, dtype=dtype)
    tensors: dict[str, Any] = {}
    for file in _files(located):
        tensors |= safetensors.load_file(str(file))
    if not put_layers(model, tensors, quantization):
        raise ModelError(
            f"{located.source} says that it is a GPTQ checkpoint, but has no tensors named *.qweight; give a directory "
            "with the safetensors files of the whole checkpoint"
        )
    kept = {"qweight", "qzeros", "scales", "g_idx"}
    tensors = {
        name: tensor if name.rpartition(".")[2] in kept or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    empty = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if empty:
        raise ModelError(
            f"the GPTQ checkpoint {located.source} lacks {len(empty)} of the model's parameters (the first is "
            f"{empty[0]!r}); give a complete checkpoint"
        )
    model.config.quantization_config = quantization  # so that it is saved as what it is
    return model


def _files(located: Located) -> list[Path]:
    folder = Path(located.path)
    if not folder.is_dir():
        hub: Any = require("huggingface_hub", extra="llm")
        wanted = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(hub.snapshot_download(located.path, revision=located.revision, allow_patterns=wanted))
    return sorted(folder.glob("*.safetensors"))
