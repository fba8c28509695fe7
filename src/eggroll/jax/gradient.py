"""The estimate ``(1/N) sum_p s_p E_p`` in JAX: noise is drawn again by its address, a part of the members at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.jax.noise import Leaf, draw_pairs, grouped

DRAW_BYTES = 2**26
"""Noise that is held at a time."""


def pair_weights(shaped_fitness: Any, *, antithetic: bool) -> Any:
    """One weight for each draw: ``s_{2k} - s_{2k+1}`` for pairs, ``s_k`` for one-sided members."""
    weights = jnp.asarray(shaped_fitness, jnp.float32)
    return weights[0::2] - weights[1::2] if antithetic else weights


def es_gradient(
    words: Any,
    leaves: Sequence[Leaf],
    shaped_fitness: Any,
    generation: Any,
    *,
    rank: int,
    antithetic: bool = True,
    noise_reuse: int = 1,
    draw_bytes: int = DRAW_BYTES,
) -> dict[str, Any]:
    """``es_gradient`` of every leaf, float32, of its shape (EGGROLL, section 4).

    Matrices of one shape are one batched GEMM ``(m, pairs * r) x (pairs * r, n)`` for each part of the pairs, so that
    memory stays within ``draw_bytes`` whatever the population and compiling does not grow with the number of layers.

    Args:
        words: of :func:`eggroll.jax.noise.seed_key`.
        leaves: what is perturbed.
        shaped_fitness: ``(N,)``.
        generation: int32 scalar.
        rank: of the perturbations.
        antithetic: whether members ``2k`` and ``2k + 1`` are a pair.
        noise_reuse: generations that share their noise.
        draw_bytes: bound on the noise that is held at a time.
    """
    weights = pair_weights(shaped_fitness, antithetic=antithetic)
    members, pairs = jnp.shape(shaped_fitness)[0], weights.shape[0]
    per_pair = 4 * sum(leaf.draw_size(rank) for leaf in leaves)
    part = max(1, min(pairs, draw_bytes // per_pair))
    parts = -(-pairs // part)
    padding = parts * part - pairs  # draws of pairs that do not exist, with weight 0
    weights = jnp.concatenate([weights, jnp.zeros(padding, jnp.float32)]).reshape(parts, part)
    numbers = jnp.arange(parts * part, dtype=jnp.int32).reshape(parts, part)
    groups = grouped(leaves)

    def add(totals: list[Any], chunk: tuple[Any, Any]) -> tuple[list[Any], None]:
        pairs_here, weights_here = chunk
        drawn = draw_pairs(words, leaves, rank, generation, pairs_here, noise_reuse=noise_reuse)
        return [
            total + _sum([drawn[leaf.name] for leaf in group], group[0], weights_here)
            for total, group in zip(totals, groups, strict=True)
        ], None

    zeros = [jnp.zeros((len(group), *_shape(group[0])), jnp.float32) for group in groups]
    if parts == 1:
        totals, _ = add(zeros, (numbers[0], weights[0]))
    else:
        totals, _ = jax.lax.scan(add, zeros, (numbers, weights))
    result = {}
    for total, group in zip(totals, groups, strict=True):
        scale = 1.0 / members / (math.sqrt(rank) if group[0].low_rank else 1.0)
        for index, leaf in enumerate(group):
            result[leaf.name] = (total[index] * scale).reshape(leaf.shape)
    return {leaf.name: result[leaf.name] for leaf in leaves}


def _shape(leaf: Leaf) -> tuple[int, ...]:
    return (*leaf.batch_shape, *leaf.matrix_shape) if leaf.low_rank else leaf.shape


def _sum(drawn: list[Any], leaf: Leaf, weights: Any) -> Any:
    """``sum_k w_k A_k B_k^T`` of each leaf of a group (``w_k E_k`` for dense draws): ``(leaves, *shape)``."""
    if not leaf.low_rank:
        return jnp.einsum("p,lp...->l...", weights, jnp.stack(drawn))
    a, b = (jnp.stack(factors) for factors in zip(*drawn, strict=True))
    a = a * weights.reshape(1, -1, *(1,) * (a.ndim - 2))
    return jnp.einsum("lp...mr,lp...nr->l...mn", a, b)
