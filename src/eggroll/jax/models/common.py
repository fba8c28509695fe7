"""Building blocks of models. Every ``rand_init`` takes keywords, and dtypes by name.

MLP.rand_init(key, in_dim=3, out_dim=1, hidden_dims=[256, 256], use_bias=True, activation="pqn", dtype="float32")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.errors import ConfigError
from eggroll.jax.models._leaves import EMB_PARAM, EXCLUDED, MM, MM_PARAM, PARAM, TMM, Embedding, Parameter
from eggroll.jax.models._tree import (
    call_submodule,
    merge_frozen,
    merge_inits,
    recursive_scan_split,
    simple_es_tree_key,
)
from eggroll.jax.models.base_model import CommonInit, CommonParams, Model

__all__ = [
    "ACTIVATIONS",
    "EMB_PARAM",
    "EXCLUDED",
    "MLP",
    "MM",
    "MM_PARAM",
    "PARAM",
    "TMM",
    "Embedding",
    "Linear",
    "Parameter",
    "call_submodule",
    "layer_norm",
    "merge_frozen",
    "merge_inits",
    "recursive_scan_split",
    "simple_es_tree_key",
]


def layer_norm(x: Any, eps: float = 1e-5) -> Any:
    """``(x - mean) / sqrt(var + eps)`` over the last axis, without scale and shift; half precision goes by float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _pqn(x: Any) -> Any:
    return jax.nn.relu(layer_norm(x))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
    "pqn": _pqn,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by name; ``pqn`` is ``relu(layer_norm(x))``, the one of the paper's policies."""


class Linear(Model):
    """``x @ weight.T + bias``; the weight is ``(out_dim, in_dim)``, the bias ``(out_dim,)`` and zero at first."""

    @classmethod
    def rand_init(
        cls,
        key: Any,
        in_dim: int,
        out_dim: int,
        use_bias: bool = True,
        dtype: Any = "float32",
        *args: Any,
        **kwargs: Any,
    ) -> CommonInit:
        """``weight`` as in :class:`MM`; ``bias`` only with ``use_bias``."""
        parts = {"weight": MM.rand_init(key, in_dim, out_dim, dtype)}
        if use_bias:
            parts["bias"] = Parameter.rand_init(key, raw_value=jnp.zeros(out_dim), dtype=dtype)
        return merge_inits(**parts)

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call_submodule(MM, "weight", common_params, x)
        return y + call_submodule(Parameter, "bias", common_params) if "bias" in common_params.params else y


class MLP(Model):
    """Linear layers with an activation between them, and none after the last. Layers are named ``"0"``, ``"1"``, ..."""

    @classmethod
    def rand_init(
        cls,
        key: Any,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int],
        use_bias: bool = True,
        activation: str = "relu",
        dtype: Any = "float32",
        *args: Any,
        **kwargs: Any,
    ) -> CommonInit:
        """``hidden_dims`` are the widths between input and output, ``activation`` a key of :data:`ACTIVATIONS`."""
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation (={activation!r}) must be one of {', '.join(ACTIVATIONS)}")
        widths = [in_dim, *hidden_dims, out_dim]
        keys = jax.random.split(key, len(widths) - 1)
        layers = {
            str(index): Linear.rand_init(keys[index], widths[index], widths[index + 1], use_bias, dtype)
            for index in range(len(widths) - 1)
        }
        return merge_frozen(merge_inits(**layers), activation=activation)

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, *args: Any, **kwargs: Any) -> Any:
        activation = ACTIVATIONS[common_params.frozen_params["activation"]]
        last = len(common_params.params) - 1
        for index in range(last):
            x = activation(call_submodule(Linear, str(index), common_params, x))
        return call_submodule(Linear, str(last), common_params, x)
