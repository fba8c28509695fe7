"""The estimate ``(1/N) sum_p s_p E_p`` in JAX: noise is drawn again by its address, a part of the members at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.jax.noise import Leaf, draw_pairs, grouped

DRAW_BYTES = 2**26
"""Bound on the noise that is held at a time."""
CACHE_BYTES = 2**20
"""On a CPU, draws that stay in cache are made and used several times as fast."""


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
    draw_bytes: int | None = None,
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
        draw_bytes: bound on the noise that is held at a time; ``None`` takes what is fast here, at most 64 MiB.
    """
    weights = pair_weights(shaped_fitness, antithetic=antithetic)
    members = jnp.shape(shaped_fitness)[0]
    result = {}
    for group in grouped(leaves):
        most = draw_bytes if draw_bytes is not None else _draw_bytes(group)
        total = _total(words, group, weights, generation, rank=rank, noise_reuse=noise_reuse, draw_bytes=most)
        scale = 1.0 / members / (math.sqrt(rank) if group[0].low_rank else 1.0)
        for index, leaf in enumerate(group):
            result[leaf.name] = (total[index] * scale).reshape(leaf.shape)
    return {leaf.name: result[leaf.name] for leaf in leaves}


def _draw_bytes(group: Sequence[Leaf]) -> int:
    """Every part reads and writes the whole sum, so it should not be much smaller than that."""
    if jax.default_backend() != "cpu":
        return DRAW_BYTES
    return min(DRAW_BYTES, max(CACHE_BYTES, len(group) * group[0].spec.size))


def _total(
    words: Any, group: list[Leaf], weights: Any, generation: Any, *, rank: int, noise_reuse: int, draw_bytes: int
) -> Any:
    """``sum_k w_k A_k B_k^T`` of leaves of one shape: ``(leaves, *shape)``."""
    pairs = weights.shape[0]
    part = max(1, min(pairs, draw_bytes // (4 * len(group) * group[0].draw_size(rank))))
    parts = -(-pairs // part)
    padding = parts * part - pairs  # draws of pairs that do not exist, with weight 0
    weights = jnp.concatenate([weights, jnp.zeros(padding, jnp.float32)]).reshape(parts, part)
    numbers = jnp.arange(parts * part, dtype=jnp.int32).reshape(parts, part)

    def add(total: Any, chunk: tuple[Any, Any]) -> tuple[Any, None]:
        drawn = draw_pairs(words, group, rank, generation, chunk[0], noise_reuse=noise_reuse)
        return total + _sum([drawn[leaf.name] for leaf in group], group[0], chunk[1]), None

    zeros = jnp.zeros((len(group), *_shape(group[0])), jnp.float32)
    if parts == 1:
        return add(zeros, (numbers[0], weights[0]))[0]
    return jax.lax.scan(add, zeros, (numbers, weights))[0]


def _shape(leaf: Leaf) -> tuple[int, ...]:
    return (*leaf.batch_shape, *leaf.matrix_shape) if leaf.low_rank else leaf.shape


def _sum(drawn: list[Any], leaf: Leaf, weights: Any) -> Any:
    """``sum_k w_k A_k B_k^T`` of each leaf of a group (``w_k E_k`` for dense draws): ``(leaves, *shape)``."""
    if not leaf.low_rank:
        return jnp.einsum("p,lp...->l...", weights, jnp.stack(drawn))
    a, b = (jnp.stack(factors) for factors in zip(*drawn, strict=True))
    a = a * weights.reshape(1, -1, *(1,) * (a.ndim - 2))
    return jnp.einsum("lp...mr,lp...nr->l...mn", a, b)
