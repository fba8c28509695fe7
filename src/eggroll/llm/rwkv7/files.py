"""RWKV-7 in files: BlinkDL's ``.pth``, and Hugging Face directories in the layouts in use."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eggroll.errors import ModelError
from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.layouts import config_of, from_layout, layout_of, to_layout
from eggroll.llm.rwkv7.model import RWKV7ForCausalLM
from eggroll.llm.rwkv7.tokenizer import VOCABULARY, RWKV7Tokenizer

PTH_FILE = "rwkv7.pth"
"""The original format beside the Hugging Face files of a saved model."""
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""What original files may hold and no model reads; kept, so that a file goes in and out unchanged."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def register() -> None:
    """Let transformers' automatic classes know RWKV-7, so that its directories load without code of their own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("rwkv7", RWKV7Config, exist_ok=True)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM, exist_ok=True)


def load_tokenizer(location: str | None) -> Any:
    """The tokenizer of a directory or hub id: its own, or that of the World models.

    Args:
        location: ``None`` for an original file, which has none of its own.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    def file(name: str) -> str | None:
        return cached_file(location, name, _raise_exceptions_for_missing_entries=False) if location else None

    if file("tokenizer.json"):
        return PreTrainedTokenizerFast.from_pretrained(location)
    template = file("chat_template.jinja")
    chat = {"chat_template": Path(template).read_text(encoding="utf-8")} if template else {}
    return RWKV7Tokenizer(file(VOCABULARY), **chat)


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an original file, read as data: no code in it is run.

    Raises:
        ModelError: the file cannot be read, or holds something else than tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a file of tensors ({reason[:200]}). Give an RWKV-7 checkpoint as torch.save "
            "writes it: a dictionary of tensors and nothing else"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ModelError(f"{path} holds a {type(found).__name__} and not a dictionary of tensors only")
    return found


def config_of_pth(path: str | Path) -> RWKV7Config:
    """The configuration that an original file's shapes say.

    Raises:
        ModelError: it is no RWKV-7 model.
    """
    tensors = read_pth(path)
    if layout_of(tensors, str(path)) == "fla":
        raise ModelError(f"{path} has Hugging Face's names; give the directory that it belongs to")
    return config_of(tensors, str(path))


def load_pth(path: str | Path, dtype: torch.dtype) -> RWKV7ForCausalLM:
    """The model of an original file."""
    config, tensors = config_of_pth(path), read_pth(path)
    model = _filled(config, tensors, dtype, str(path))
    model.unused = {name: tensors[name].to(dtype) for name in UNUSED if name in tensors}
    return model


def load_directory(location: str, config: RWKV7Config, dtype: torch.dtype) -> RWKV7ForCausalLM:
    """The model of a Hugging Face directory or hub id, whichever layout its parameters have."""
    return _filled(config, _read_weights(location), dtype, location)


def save_pth(model: RWKV7ForCausalLM, path: str | Path) -> None:
    """Write an original file: its names, shapes, and the model's dtype."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = {**to_layout(own, "original", model.config), **model.unused}
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)


def save_directory(model: RWKV7ForCausalLM, directory: str | Path, **arguments: Any) -> None:
    """Write a Hugging Face directory with the names of ``flash-linear-attention``, and the original file beside."""
    tensors = to_layout(model.state_dict(), "fla", model.config)
    super(RWKV7ForCausalLM, model).save_pretrained(directory, state_dict=tensors, **arguments)
    save_pth(model, Path(directory, PTH_FILE))


def _filled(config: RWKV7Config, tensors: dict[str, Tensor], dtype: torch.dtype, source: str) -> RWKV7ForCausalLM:
    own = from_layout(tensors, layout_of(tensors, source))
    with torch.device("meta"):
        model = RWKV7ForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(set(expected) ^ set(own)) or sorted(n for n in expected if expected[n] != tuple(own[n].shape))
    if wrong:
        shapes = ", ".join(f"{n} (is {_shape(own.get(n))}, must be {expected.get(n, 'absent')})" for n in wrong[:3])
        raise ModelError(f"{source} does not fit its configuration: {len(wrong)} tensors differ: {shapes}")
    model.load_state_dict({name: tensor.to(dtype, copy=True).contiguous() for name, tensor in own.items()}, assign=True)
    return model.eval()


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def _read_weights(location: str) -> dict[str, Tensor]:
    import json

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
