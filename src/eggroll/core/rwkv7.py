"""Names and shapes of RWKV-7 parameters: this model's, the original files', and the Hugging Face directories'.

here                        original (.pth)                         Hugging Face (fla, rwkv7-hf)
blocks.1.att.x_r (C,)       blocks.1.att.x_r (1, 1, C)              model.layers.1.attn.x_r (1, 1, C)
blocks.1.att.w1 (C, D)      the same                                model.layers.1.attn.w_lora.lora.0.weight (D, C)
blocks.1.att.r_k (C,)       blocks.1.att.r_k (H, N)                 model.layers.1.attn.r_k (H, N)
blocks.1.att.key.weight     the same                                model.layers.1.attn.k_proj.weight

Arrays may be of any library: only ``shape``, ``reshape`` and ``T`` are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from eggroll.errors import ModelError

Layout = Literal["original", "fla"]

ORIGINAL_HEAD_EPS = 64e-5
"""Epsilon of the norm over heads, in every original file."""

_OUTER = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
_PARTS = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_PROJECTIONS = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
_PAIRS = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_BACK = {
    **{theirs: ours for ours, theirs in _OUTER.items()},
    **{theirs: ours for ours, theirs in _PARTS.items()},
    **{theirs: ours for ours, theirs in _PROJECTIONS.items()},
}
_VECTORS = re.compile(r"\.(x_[rwkvag]|[wav]0|k_k|k_a)$")
_MIXES = re.compile(r"\.att\.x_[rwkvag]$")
_UNUSED = re.compile(r"^blocks\.0\.att\.v[012]$")
_OLDER = {
    "RWKV-4": lambda names: any(name.endswith("att.time_first") for name in names),
    "RWKV-6": lambda names: any(".att.time_maa_" in name for name in names),
    "RWKV-5": lambda names: any(name.endswith("att.time_faaaa") for name in names),
}


def layout_of(names: Mapping[str, Any], source: str) -> Layout:
    """Whose names these are.

    Raises:
        ModelError: they belong to another generation of RWKV, or to another model.
    """
    if "blocks.0.att.r_k" in names:
        return "original"
    if "model.layers.0.attn.r_k" in names:
        return "fla"
    for version, is_it in _OLDER.items():
        if is_it(names):
            raise ModelError(f"{source} is {version}; of the RWKV models, RWKV-7 is supported. Give an RWKV-7 file")
    some = ", ".join(sorted(names)[:4]) or "none"
    raise ModelError(f"{source} holds no RWKV-7 model: it has no blocks.0.att.r_k. Its tensors are {some}, ...")


def from_layout(tensors: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Parameters as the model has them; what no model uses (``v0``, ``v1``, ``v2`` of the first block) is left out."""
    found = {}
    for name, tensor in tensors.items():
        own, turned = (name, False) if layout == "original" else _from_fla(name)
        if _UNUSED.match(own):
            continue
        tensor = tensor.T if turned else tensor
        plain = _VECTORS.search(own) or own.endswith((".r_k", ".ffn.x_k"))
        found[own] = tensor.reshape(-1) if plain else tensor
    return found


def to_layout(tensors: Mapping[str, Any], layout: Layout, head_dim: int) -> dict[str, Any]:
    """The inverse of :func:`from_layout`."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".r_k"):
            tensor = tensor.reshape(-1, head_dim)
        elif (layout == "original" and _VECTORS.search(name)) or (
            layout == "fla" and (re.search(r"\.att\.x_.$", name))
        ):
            tensor = tensor.reshape(1, 1, -1)
        theirs, turned = (name, False) if layout == "original" else _to_fla(name)
        found[theirs] = tensor.T if turned else tensor
    return found


def sizes_of(tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What an original file's shapes say: the sizes of a Hugging Face configuration, with its names.

    Raises:
        ModelError: a tensor is missing or its shape fits no RWKV-7 model.
    """
    try:
        layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        vocabulary, width = tensors["emb.weight"].shape
        heads, size = tensors["blocks.0.att.r_k"].shape
        inner = tensors["blocks.0.ffn.key.weight"].shape[0]
        pairs = {name: tensors[f"blocks.{min(1, layers - 1)}.att.{name}1"].shape[1] for name in "wag"}
        pairs["v"] = tensors["blocks.1.att.v1"].shape[1] if layers > 1 else 32
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{source} is no complete RWKV-7 model: {error} is missing or has another shape") from error
    if heads * size != width:
        raise ModelError(f"{source}: {heads} heads of {size} do not make a width of {width}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "head_dim": size,
        "intermediate_size": inner,
        "hidden_ratio": inner / width,
        "decay_low_rank_dim": pairs["w"],
        "a_low_rank_dim": pairs["a"],
        "v_low_rank_dim": pairs["v"],
        "gate_low_rank_dim": pairs["g"],
        "head_norm_eps": ORIGINAL_HEAD_EPS,
    }


def _to_fla(name: str) -> tuple[str, bool]:
    parts = name.split(".")
    if parts[0] in _OUTER:
        return ".".join([_OUTER[parts[0]], *parts[1:]]), False
    head, part, rest = f"model.layers.{parts[1]}", parts[2], parts[3:]
    if part == "att" and re.fullmatch(r"[wavg][012]", rest[0]):
        pair, which = rest[0][0], rest[0][1]
        return f"{head}.attn.{pair}_lora.lora.{_PAIRS[which]}", which != "0"
    if part == "att":
        rest = [_PROJECTIONS.get(rest[0], rest[0]), *rest[1:]]
    return ".".join([head, _PARTS[part], *rest]), False


def _from_fla(name: str) -> tuple[str, bool]:
    parts = name.split(".")
    for length in (1, 2):
        if (outer := ".".join(parts[:length])) in _BACK:
            return ".".join([_BACK[outer], *parts[length:]]), False
    if parts[:2] != ["model", "layers"] or len(parts) < 5 or parts[3] not in _BACK:
        raise ModelError(f"{name} is no parameter of an RWKV-7 model")
    head, part, rest = f"blocks.{parts[2]}", _BACK[parts[3]], parts[4:]
    if part == "att" and rest[0].endswith("_lora"):
        which = next(number for number, theirs in _PAIRS.items() if ".".join(rest[2:]) == theirs)
        return f"{head}.att.{rest[0][0]}{which}", which != "0"
    if part == "att":
        rest = [_BACK.get(rest[0], rest[0]), *rest[1:]]
    return ".".join([head, part, *rest]), False
