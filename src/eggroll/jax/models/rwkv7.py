"""RWKV-7 in the form that noisers evolve (arXiv 2503.14456), from the same checkpoints as the PyTorch model.

    frozen_params, params, scan_map, es_map = load("rwkv7-0.1b.pth")     or RWKV7.rand_init(key, hidden_size=64, ...)
    logits, state = RWKV7.forward(..., iterinfo, tokens)                 a text at once, or one token after the other

Parameters have the names of the original files. Those of the blocks are stacked, ``(blocks, ...)``, and the forward
pass scans over them. The first block has no ``v0``, ``v1``, ``v2``, so that these have one slice less.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.core.rwkv7 import ORIGINAL_HEAD_EPS
from eggroll.errors import ConfigError
from eggroll.jax.models._leaves import EXCLUDED, MM_PARAM, PARAM
from eggroll.jax.models._rwkv7_files import read, write
from eggroll.jax.models._rwkv7_parts import Block, Norm, Shift
from eggroll.jax.models._tree import call_submodule
from eggroll.jax.models.base_model import CommonInit, CommonParams, Model

__all__ = ["RWKV7", "load", "save"]

LATER = ("v0", "v1", "v2")
"""What the time mix of the first block does not have."""
_EXCLUDED_PARTS = ("emb", "head")
_SHIFTS = ("att_shift", "ffn_shift")


class RWKV7(Model):
    """RWKV-7 with its head. Reading a text at once or token by token gives the same.

    Classes of parameters, as in HyperscaleES: embedding and head EXCLUDED (read without noise), matrices MM_PARAM, the
    low-rank pairs among them, and norms, biases, mixes and scales PARAM (left alone under ``freeze_nonlora``).
    """

    @classmethod
    def rand_init(
        cls,
        key: Any,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        head_dim: int = 64,
        intermediate_size: int | None = None,
        decay_low_rank_dim: int = 64,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 128,
        dtype: Any = "float32",
        *args: Any,
        norm_eps: float = 1e-5,
        head_norm_eps: float = ORIGINAL_HEAD_EPS,
        **kwargs: Any,
    ) -> CommonInit:
        """Random parameters. Sizes have the names and defaults of Hugging Face configurations.

        Args:
            key: a ``jax.random`` key.
            vocab_size: rows of the embedding and of the head.
            hidden_size: width C of the residual stream, ``heads * head_dim``.
            num_hidden_layers: blocks.
            head_dim: entries N of a head.
            intermediate_size: width inside the channel mix, ``4 * hidden_size`` by default.
            decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim: inner sizes of the pairs w, a, v, g.
            dtype: of all parameters, by name.
            *args: ignored.
            norm_eps: of the layer norms.
            head_norm_eps: of the norm over heads.
            **kwargs: ignored, such as what else a configuration states.

        Raises:
            ConfigError: the heads do not make the width, or a size is below 1.
        """
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        pairs = {"w": decay_low_rank_dim, "a": a_low_rank_dim, "v": v_low_rank_dim, "g": gate_low_rank_dim}
        _check_sizes(hidden_size, head_dim, vocab_size, num_hidden_layers, inner, *pairs.values())
        shapes = _shapes(vocab_size, hidden_size, num_hidden_layers, inner, pairs)
        flat = {name: jnp.asarray(value, jnp.dtype(dtype)) for name, value in _first_values(key, shapes).items()}
        return _init(flat, head_dim, norm_eps, head_norm_eps)

    @classmethod
    def empty_state(cls, params: Any, frozen_params: dict[str, Any], *rows: int) -> dict[str, Any]:
        """The state before the first token, for texts ``(*rows, T)``; its size does not depend on T.

        Returns:
            ``wkv (blocks, *rows, H, N, N)`` float32, and ``att_shift``, ``ffn_shift`` ``(blocks, *rows, C)``: the last
            token that each half of a block has read.
        """
        weight = params["blocks"]["ln1"]["weight"]
        blocks, width = weight.shape
        size = frozen_params["blocks"]["att"]["head_dim"]
        shifts = {name: jnp.zeros((blocks, *rows, width), weight.dtype) for name in _SHIFTS}
        return {"wkv": jnp.zeros((blocks, *rows, width // size, size, size), jnp.float32), **shifts}

    @classmethod
    def _forward(
        cls,
        common_params: CommonParams,
        tokens: Any,
        state: dict[str, Any] | None = None,
        mask: Any = None,
        *,
        last_only: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Logits of the next token at every place, and the state behind the last.

        Args:
            common_params: as for all models.
            tokens: ``(..., T)`` integers; the rows of one member, whose noise is drawn once for all of them.
            state: of :meth:`empty_state` or of an earlier call; ``None`` is the empty one.
            mask: ``(..., T)`` booleans, false for padding, which leaves the state as it is. A row's padding may stand
                anywhere but at its end; ``None`` for no padding.
            last_only: give logits of the last place only, ``(..., V)``.

        Returns:
            ``logits (..., T, V)`` and the state.
        """
        params, frozen = common_params.params, common_params.frozen_params
        eps = frozen["norm_eps"]
        x = call_submodule(Norm, "ln0", common_params, params["emb"]["weight"][tokens], eps)
        state = cls.empty_state(params, frozen, *tokens.shape[:-1]) if state is None else state
        shift = Shift(mask)
        stacked, later = _split(params["blocks"])
        keys, later_keys = _split(common_params.es_tree_key["blocks"])

        def layer(carry: tuple[Any, Any], one: tuple[Any, Any, Any, Any]) -> tuple[tuple[Any, Any], Any]:
            (x, v_first), (index, params, keys, state) = carry, one
            # the first block reads a slice too, and does not use it
            own, own_keys = jax.tree.map(lambda leaf: leaf[jnp.maximum(index - 1, 0)], (later, later_keys))
            part = common_params._replace(
                frozen_params=frozen["blocks"], params=_with(params, own), es_tree_key=_with(keys, own_keys)
            )
            x, state, v_first = Block._forward(part, x, state, v_first, index == 0, shift)
            return (x, v_first), state

        blocks = jnp.arange(state["wkv"].shape[0])
        (x, _), state = jax.lax.scan(layer, (x, jnp.zeros_like(x)), (blocks, stacked, keys, state))
        x = call_submodule(Norm, "ln_out", common_params, x[..., -1, :] if last_only else x, eps)
        return x @ params["head"]["weight"].T, state


def load(source: Any, dtype: str = "float32") -> CommonInit:
    """The model of a checkpoint, in the form that ``rand_init`` gives.

    Args:
        source: BlinkDL's ``.pth`` (read as data; this needs PyTorch), or a Hugging Face directory in the layouts of
            ``flash-linear-attention`` and ``rwkv7-hf``, or with the original names.
        dtype: of all parameters, by name.

    Raises:
        ModelError: there is no such file, or it is no RWKV-7 model.
        MissingExtraError: a ``.pth`` without PyTorch, a directory without safetensors.
    """
    checkpoint = read(source)
    return _init(
        {name: jnp.asarray(value, jnp.dtype(dtype)) for name, value in stack(checkpoint.tensors).items()},
        checkpoint.head_dim, checkpoint.norm_eps, checkpoint.head_norm_eps,
    )  # fmt: skip


def save(directory: Any, params: Any, frozen_params: dict[str, Any]) -> None:
    """Write a Hugging Face directory (``flash-linear-attention``'s names), which ``load`` and ``eggroll.llm`` read."""
    flat: dict[str, Any] = {}
    for name, value in _flat(params).items():
        if not name.startswith("blocks."):
            flat[f"blocks.0.{name}" if name.startswith("ln0") else name] = value
            continue
        start = int(name.split(".")[-1] in LATER)
        for index, slice_ in enumerate(value):
            flat[f"blocks.{index + start}.{name.removeprefix('blocks.')}"] = slice_
    sizes = frozen_params["blocks"]
    write(directory, flat, sizes["att"]["head_dim"], sizes["norm_eps"], sizes["att"]["head_norm_eps"])


def stack(tensors: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a file by their names here: those of the blocks one above the other."""
    found: dict[str, Any] = {}
    blocks: dict[str, dict[int, Any]] = {}
    for name, value in tensors.items():
        parts = name.split(".", 2)
        if parts[0] != "blocks":
            found[name] = value
        elif parts[2].startswith("ln0."):
            found[parts[2]] = value
        else:
            blocks.setdefault(f"blocks.{parts[2]}", {})[int(parts[1])] = value
    for name, each in blocks.items():
        found[name] = jnp.stack([jnp.asarray(each[index]) for index in sorted(each)])
    return found


def _shapes(vocabulary: int, width: int, blocks: int, inner: int, pairs: dict[str, int]) -> dict[str, tuple[int, ...]]:
    vectors = [f"att.x_{name}" for name in "rwkvag"] + [f"att.{name}" for name in ("k_k", "k_a", "r_k", "w0", "a0")]
    norms = [f"{name}.{part}" for name in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")]
    shapes: dict[str, tuple[int, ...]] = {
        f"blocks.{name}": (blocks, width) for name in (*vectors, *norms, "ffn.x_k", "att.v0")
    }
    for name, size in pairs.items():
        shapes |= {f"blocks.att.{name}1": (blocks, width, size), f"blocks.att.{name}2": (blocks, size, width)}
    for name in ("receptance", "key", "value", "output"):
        shapes[f"blocks.att.{name}.weight"] = (blocks, width, width)
    shapes["blocks.ffn.key.weight"], shapes["blocks.ffn.value.weight"] = (blocks, inner, width), (blocks, width, inner)
    for name in LATER:
        lead, *rest = shapes.pop(f"blocks.att.{name}")
        if lead > 1:
            shapes[f"blocks.att.{name}"] = (lead - 1, *rest)
    shapes |= {f"{name}.{part}": (width,) for name in ("ln0", "ln_out") for part in ("weight", "bias")}
    return {**shapes, "emb.weight": (vocabulary, width), "head.weight": (vocabulary, width)}


def _first_values(key: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The first value of each parameter, float32: that of the PyTorch model, as to its distribution."""
    scales = {name: _scale(name, shape) for name, shape in sorted(shapes.items())}
    drawn = [name for name, scale in scales.items() if scale is not None]
    # one draw for all, as each shape would have to be compiled
    normals = np.asarray(jax.random.normal(key, (sum(math.prod(shapes[name]) for name in drawn),)))
    parts = np.split(normals, np.cumsum([math.prod(shapes[name]) for name in drawn]))
    found = {name: scales[name] * part.reshape(shapes[name]) for name, part in zip(drawn, parts, strict=False)}
    return found | {name: _constant(name, shape) for name, shape in shapes.items() if scales[name] is None}


def _scale(name: str, shape: tuple[int, ...]) -> float | None:
    """The standard deviation of what is drawn, ``None`` for what is not."""
    if name == "emb.weight":
        return 0.02
    if name[-1] in "12" and "ln" not in name:
        return 0.1 / math.sqrt(shape[-2])
    return 0.5 / math.sqrt(shape[-1]) if name.endswith(".weight") and "ln" not in name else None


def _constant(name: str, shape: tuple[int, ...]) -> Any:
    last = name.split(".")[-1]
    if last.startswith("x_"):
        return np.full(shape, 0.5, np.float32)
    if last == "w0":
        return np.broadcast_to(np.linspace(-6.0, -1.0, shape[-1], dtype=np.float32), shape)
    return np.full(shape, last in ("k_k", "k_a", "weight"), np.float32)


def _init(flat: dict[str, Any], head_dim: int, norm_eps: float, head_norm_eps: float) -> CommonInit:
    """The four trees of parameters by their names here."""
    frozen = {
        "norm_eps": norm_eps,
        "blocks": {"norm_eps": norm_eps, "att": {"head_dim": head_dim, "head_norm_eps": head_norm_eps}},
    }
    scans = {name: (0,) if name.startswith("blocks.") else () for name in flat}
    classes = {name: _class(name, value.ndim - len(scans[name])) for name, value in flat.items()}
    return CommonInit(frozen, *map(_nested, (flat, scans, classes)))


def _class(name: str, axes: int) -> int:
    if name.split(".")[0] in _EXCLUDED_PARTS:
        return EXCLUDED
    return MM_PARAM if axes == 2 else PARAM


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _split(blocks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of stacks without those that the first block lacks, and those."""
    later = {name: value for name, value in blocks["att"].items() if name in LATER}
    return {**blocks, "att": {name: value for name, value in blocks["att"].items() if name not in LATER}}, later


def _with(blocks: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {**blocks, "att": {**blocks["att"], **later}}


def _check_sizes(width: int, head_dim: int, *others: int) -> None:
    if min(width, head_dim, *others) < 1:
        raise ConfigError(f"an RWKV-7 model needs sizes of at least 1, not {(width, head_dim, *others)}")
    if width % head_dim:
        raise ConfigError(f"hidden_size (={width}) must be a multiple of head_dim (={head_dim})")
