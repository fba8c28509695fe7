"""Fitness shaping inside a compiled function; the same rules as :mod:`eggroll.core.fitness`, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eggroll.core.config import ESConfig
from eggroll.core.fitness import VARIANCE_EPSILON


def shape_fitness(fitness: Any, config: ESConfig) -> Any:
    """The weights ``s_p`` of the estimate: ``(N,)`` float32 from ``(N,)`` raw scores, higher is better.

    NaN and infinite scores count as the worst of the generation; if nothing is finite, all weights are 0.
    """
    values = jnp.asarray(fitness, jnp.float32)
    finite = jnp.isfinite(values)
    worst = jnp.min(jnp.where(finite, values, jnp.inf))
    values = jnp.where(finite, values, jnp.where(jnp.isfinite(worst), worst, 0.0))
    size = values.shape[0]
    groups = values.reshape(-1, config.group_size or size)
    members = groups.shape[1]
    if config.fitness_shaping == "centered_rank":
        shaped = jax.vmap(_centered_rank)(groups)
    elif config.fitness_shaping == "normalized":
        centred = groups - groups.mean(axis=1, keepdims=True)
        shaped = centred / jnp.sqrt(values.var() + VARIANCE_EPSILON)
    elif config.sampling == "one_sided":
        shaped = (groups - groups.mean(axis=1, keepdims=True)) * (members / max(members - 1, 1))
    else:
        shaped = groups
    weights = shaped.reshape(size)
    if config.elite_k:
        weights = jnp.maximum(weights - jnp.sort(weights)[::-1][config.elite_k], 0.0)
    return weights


def _centered_rank(values: Any) -> Any:
    """Ranks in [-0.5, 0.5]; ties share their mean rank."""
    if values.shape[0] == 1:
        return jnp.zeros_like(values)
    order = jnp.sort(values)
    first = jnp.searchsorted(order, values, side="left")
    last = jnp.searchsorted(order, values, side="right") - 1
    return (first + last) / 2 / (values.shape[0] - 1) - 0.5
