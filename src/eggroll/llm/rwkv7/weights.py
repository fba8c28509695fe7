"""The weights of RWKV-7 in files: read as data, checked against a model, and written."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from eggroll.core.rwkv7 import from_layout, layout_of, to_layout
from eggroll.errors import ModelError

PTH_FILE = "rwkv7.pth"
"""The original format beside the Hugging Face files of a saved model."""
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""What original files may hold and no model reads; kept, so that a file goes in and out unchanged."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an original file, read as data: no code in it is run.

    Raises:
        ModelError: the file cannot be read, or holds something else than tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a file of tensors ({reason[:200]}). Give an RWKV-7 checkpoint as torch.save "
            "writes it: a dictionary of tensors and nothing else"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ModelError(f"{path} holds a {type(found).__name__} and not a dictionary of tensors only")
    return found


def read_directory(location: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face directory or hub id.

    Raises:
        ModelError: it has none.
    """
    from safetensors.torch import load_file
    from transformers.utils.hub import cached_file

    for name in _WEIGHTS:
        file = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        files = [file]
        if name.endswith(".json"):
            shards = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [str(cached_file(location, shard)) for shard in shards]
        found: dict[str, Tensor] = {}
        for path in files:
            found.update(load_file(path) if path.endswith(".safetensors") else read_pth(path))
        return found
    raise ModelError(f"{location} has no weights: none of {', '.join(_WEIGHTS)} is there")


def fill(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Give a model that was made without memory (on the ``meta`` device) its weights, of whatever layout.

    Raises:
        ModelError: they are of another model.
    """
    own = from_layout(tensors, layout_of(tensors, source))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(set(expected) ^ set(own)) or sorted(n for n in expected if expected[n] != tuple(own[n].shape))
    if wrong:
        shapes = ", ".join(f"{n} (is {_shape(own.get(n))}, must be {expected.get(n, 'absent')})" for n in wrong[:3])
        raise ModelError(f"{source} does not fit its configuration: {len(wrong)} tensors differ: {shapes}")
    held = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in own.items()}
    model.load_state_dict(held, assign=True)
    model.unused = {name: tensors[name].to(dtype) for name in UNUSED if name in tensors}


def save_pth(model: Any, path: str | Path) -> None:
    """Write an original file: its names, shapes, and the model's dtype."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = {**to_layout(own, "original", model.config.head_dim), **model.unused}
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
