"""RWKV-7 checkpoints as arrays: BlinkDL's ``.pth``, and Hugging Face directories in the layouts in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import jax.numpy as jnp
import numpy as np

from eggroll._optional import require
from eggroll.core.rwkv7 import ORIGINAL_HEAD_EPS, from_layout, layout_of, sizes_of, to_layout
from eggroll.errors import ModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Checkpoint:
    """Parameters with this project's names (``blocks.1.att.x_r``), and what their shapes do not say."""

    tensors: dict[str, Any]
    head_dim: int
    norm_eps: float
    head_norm_eps: float


def read(source: str | Path) -> Checkpoint:
    """A checkpoint of a file or a directory.

    Raises:
        ModelError: there is none, or it is no RWKV-7 model.
        MissingExtraError: a ``.pth`` without PyTorch, a directory without safetensors.
    """
    path = Path(source)
    if path.is_file():
        tensors, about = _read_pth(path), {}
        if layout_of(tensors, str(path)) == "fla":
            raise ModelError(f"{path} has Hugging Face's names; give the directory that it belongs to")
    elif path.is_dir():
        tensors, about = _read_directory(path), _read_config(path)
    else:
        raise ModelError(
            f"{source} does not exist. Give an RWKV-7 .pth file or a Hugging Face directory; a hub id has to be "
            "downloaded first: hf download ID --local-dir DIR"
        )
    layout = layout_of(tensors, str(path))
    own = from_layout(tensors, layout)
    heads = tensors["blocks.0.att.r_k" if layout == "original" else "model.layers.0.attn.r_k"]
    sizes = sizes_of({**own, "blocks.0.att.r_k": heads}, str(path))
    _check_shapes(own, sizes, str(path))
    head_dim = sizes["head_dim"]
    norm_eps = about.get("norm_eps", NORM_EPS)
    by_default = head_dim * norm_eps if about else ORIGINAL_HEAD_EPS
    return Checkpoint(own, head_dim, norm_eps, about.get("head_norm_eps") or by_default)


def write(
    directory: str | Path, tensors: Mapping[str, Any], head_dim: int, norm_eps: float, head_norm_eps: float
) -> None:
    """Write parameters as a Hugging Face directory: ``flash-linear-attention``'s names, and ``config.json``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = to_layout(tensors, "fla", head_dim)
    arrays = {name: jnp.array(value, copy=True) for name, value in named.items()}
    require("safetensors.flax", extra="jax").save_file(arrays, directory / WEIGHTS, metadata={"format": "pt"})
    sizes = sizes_of({**tensors, "blocks.0.att.r_k": named["model.layers.0.attn.r_k"]}, str(directory))
    about = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        **sizes,
        "norm_eps": norm_eps,
        "head_norm_eps": head_norm_eps,
        "num_heads": sizes["hidden_size"] // head_dim,
        "tie_word_embeddings": False,
        "dtype": str(arrays["lm_head.weight"].dtype),
    }
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _read_pth(path: Path) -> dict[str, Any]:
    """The tensors of an original file, read as data: no code in it is run."""
    torch = require("torch", extra="torch")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a file of tensors ({reason[:200]}). Give an RWKV-7 checkpoint as torch.save "
            "writes it: a dictionary of tensors and nothing else"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelError(f"{path} holds a {type(found).__name__} and not a dictionary of tensors only")
    # NumPy has no bfloat16; float32 holds all of its values
    return {name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in found.items()}


def _read_directory(path: Path) -> dict[str, Any]:
    files = [path / WEIGHTS]
    if (path / INDEX).is_file():
        shards = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [path / name for name in sorted(set(shards))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path} has no {missing[0]}, from which the weights are read")
    load_file = require("safetensors.flax", extra="jax").load_file
    found: dict[str, Any] = {}
    for file in files:
        found |= {name: np.asarray(value) for name, value in load_file(file).items()}
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / CONFIG} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("model_type") != "rwkv7":
        kind = about.get("model_type") if isinstance(about, dict) else type(about).__name__
        raise ModelError(f'{path / CONFIG} has the model_type {kind!r}; an RWKV-7 directory has "rwkv7"')
    return about


def _check_shapes(tensors: Mapping[str, Any], sizes: Mapping[str, Any], source: str) -> None:
    """All blocks must have the same parameters, so that they can be stacked."""
    blocks = range(min(1, sizes["num_hidden_layers"] - 1), sizes["num_hidden_layers"])
    model = f"blocks.{blocks[0]}."
    wanted = {name.removeprefix(model): value.shape for name, value in tensors.items() if name.startswith(model)}
    for block in range(sizes["num_hidden_layers"]):
        for name, shape in wanted.items():
            if block == 0 and blocks[0] == 1 and name in ("att.v0", "att.v1", "att.v2"):
                continue
            value = tensors.get(f"blocks.{block}.{name}")
            if value is None or value.shape != shape:
                found = "missing" if value is None else str(value.shape)
                raise ModelError(f"{source} does not fit itself: blocks.{block}.{name} is {found}, must be {shape}")
