"""Models that are one parameter: the four classes of parameters and the noiser's call for each."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.errors import ConfigError
from eggroll.jax.models.base_model import CommonInit, CommonParams, Model

PARAM = 0
"""Perturbed densely; read with ``get_noisy_standard``."""
MM_PARAM = 1
"""A matrix that is multiplied with; perturbed at low rank."""
EMB_PARAM = 2
"""A matrix whose rows are gathered; perturbed at low rank."""
EXCLUDED = 3
"""Neither perturbed nor updated."""

CLASS_NAMES = {PARAM: "PARAM", MM_PARAM: "MM_PARAM", EMB_PARAM: "EMB_PARAM", EXCLUDED: "EXCLUDED"}


class Parameter(Model):
    """An array that is used as it is: a bias, a scale, a state."""

    @classmethod
    def rand_init(
        cls,
        key: Any,
        shape: Any = None,
        scale: float | None = None,
        raw_value: Any = None,
        dtype: Any = "float32",
        *args: Any,
        **kwargs: Any,
    ) -> CommonInit:
        """``raw_value`` in ``dtype`` if it is given, else ``scale * N(0, 1)`` (scale 1 by default) of ``shape``."""
        if raw_value is None and shape is None:
            raise ConfigError("Parameter.rand_init needs a shape or a raw_value")
        if raw_value is not None:
            value = jnp.asarray(raw_value, dtype=jnp.dtype(dtype))
            if shape is not None and value.shape != tuple(shape):
                raise ConfigError(f"raw_value has the shape {value.shape}, but shape (={tuple(shape)}) was asked for")
        else:
            value = _normal(key, shape, 1.0 if scale is None else scale, dtype)
        return CommonInit(None, value, (), PARAM)

    @classmethod
    def _forward(cls, common_params: CommonParams, *args: Any, **kwargs: Any) -> Any:
        return common_params.noiser.get_noisy_standard(*_noiser_arguments(common_params))


class MM(Model):
    """``x @ weight.T``; the weight is ``(out_dim, in_dim)``."""

    @classmethod
    def rand_init(
        cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32", *args: Any, **kwargs: Any
    ) -> CommonInit:
        """Entries of ``N(0, 1) / sqrt(in_dim)``."""
        return CommonInit(None, _normal(key, (out_dim, in_dim), 1 / math.sqrt(in_dim), dtype), (), MM_PARAM)

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, *args: Any, **kwargs: Any) -> Any:
        return common_params.noiser.do_mm(*_noiser_arguments(common_params), x)


class TMM(Model):
    """``x @ weight``; the weight is ``(in_dim, out_dim)``."""

    @classmethod
    def rand_init(
        cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32", *args: Any, **kwargs: Any
    ) -> CommonInit:
        """Entries of ``N(0, 1) / sqrt(in_dim)``."""
        return CommonInit(None, _normal(key, (in_dim, out_dim), 1 / math.sqrt(in_dim), dtype), (), MM_PARAM)

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, *args: Any, **kwargs: Any) -> Any:
        return common_params.noiser.do_Tmm(*_noiser_arguments(common_params), x)


class Embedding(Model):
    """``weight[x]`` for integers ``x``; the weight is ``(in_dim, out_dim)``."""

    @classmethod
    def rand_init(
        cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32", *args: Any, **kwargs: Any
    ) -> CommonInit:
        """Entries of ``N(0, 1)``: a row is one entry's vector, whatever the number of rows."""
        return CommonInit(None, _normal(key, (in_dim, out_dim), 1.0, dtype), (), EMB_PARAM)

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, *args: Any, **kwargs: Any) -> Any:
        return common_params.noiser.do_emb(*_noiser_arguments(common_params), x)


def _normal(key: Any, shape: Any, scale: float, dtype: Any) -> Any:
    """``scale * N(0, 1)``, drawn in float32 and then cast, so that the values do not depend on the dtype."""
    return (jax.random.normal(key, tuple(shape), jnp.float32) * scale).astype(jnp.dtype(dtype))


def _noiser_arguments(common: CommonParams) -> tuple[Any, ...]:
    return common.frozen_noiser_params, common.noiser_params, common.params, common.es_tree_key, common.iterinfo
