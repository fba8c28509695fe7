"""The estimate ``(1/N) sum_p s_p E_p`` in JAX: noise is drawn again by its address, a part of the members at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Int

from eggroll.core.noise_spec import NoiseSpec
from eggroll.jax.noise import Draw, Leaf, draw_pairs, grouped

DRAW_BYTES = 2**26
"""Bound on the noise that is held at a time."""
CACHE_BYTES = 2**20
"""On a CPU, draws that stay in cache are made and used several times as fast."""


def es_gradient(
    noise: NoiseSpec,
    leaves: Sequence[Leaf],
    shaped_fitness: Float[ArrayLike, " N"],
    generation: Int[ArrayLike, ""],
    *,
    draw_bytes: int | None = None,
) -> dict[str, Float32[Array, "*shape"]]:
    """``es_gradient`` of every leaf, float32, of its shape (EGGROLL, section 4).

    Matrices of one shape are one batched GEMM ``(m, pairs * r) x (pairs * r, n)`` for each part of the pairs, so that
    memory stays within ``draw_bytes`` whatever the population and compiling does not grow with the number of layers.

    Args:
        noise: which noise the members were drawn from.
        leaves: what is perturbed.
        shaped_fitness: the weights of the N members.
        generation: of the noise.
        draw_bytes: bound on the noise that is held at a time; ``None`` takes what is fast here, at most 64 MiB.
    """
    weights = noise.draw_weights(jnp.asarray(shaped_fitness, jnp.float32))
    members = jnp.shape(shaped_fitness)[0]
    result = {}
    for group in grouped(leaves):
        most = draw_bytes if draw_bytes is not None else chunk_bytes(len(group) * group[0].spec.size)
        total = _total(noise, group, weights, generation, most)
        scale = 1.0 / members / (math.sqrt(noise.rank) if group[0].low_rank else 1.0)
        for index, leaf in enumerate(group):
            result[leaf.name] = (total[index] * scale).reshape(leaf.shape)
    return {leaf.name: result[leaf.name] for leaf in leaves}


def chunk_bytes(sum_bytes: int) -> int:
    """Bytes of noise to hold at a time. Every part reads and writes the whole sum, so it should not be much smaller."""
    if jax.default_backend() != "cpu":
        return DRAW_BYTES
    return min(DRAW_BYTES, max(CACHE_BYTES, sum_bytes))


def _total(noise: NoiseSpec, group: list[Leaf], weights: Array, generation: Any, draw_bytes: int) -> Array:
    """``sum_k w_k A_k B_k^T`` of leaves of one shape: ``(leaves, *shape)``."""
    pairs = weights.shape[0]
    part = max(1, min(pairs, draw_bytes // (4 * len(group) * group[0].draw_size(noise.rank))))
    parts = -(-pairs // part)
    padding = parts * part - pairs  # draws of pairs that do not exist, with weight 0
    weights = jnp.concatenate([weights, jnp.zeros(padding, jnp.float32)])

    def one_part(index: Array) -> Array:
        numbers = index * part + jnp.arange(part, dtype=jnp.int32)
        drawn = draw_pairs(noise, group, generation, numbers)
        stacked = jax.tree.map(lambda *draws: jnp.stack(draws), *(drawn[leaf.name] for leaf in group))
        chosen = jax.lax.dynamic_slice_in_dim(weights, index * part, part)
        return jax.vmap(weighted_sum, in_axes=(0, None))(stacked, chosen)

    shape = (*group[0].batch_shape, *group[0].matrix_shape) if group[0].low_rank else group[0].shape
    return add_parts(parts, one_part, jnp.zeros((len(group), *shape), jnp.float32))


def weighted_sum(drawn: Draw, weights: Float[Array, " K"], *, precision: str | None = None) -> Float[Array, "*shape"]:
    """``sum_k w_k A_k B_k^T`` of K pairs of factors, or ``sum_k w_k E_k`` of K dense draws."""
    if not isinstance(drawn, tuple):
        return jnp.tensordot(weights, drawn, axes=1, precision=precision)
    a, b = drawn
    a = a * weights.reshape(-1, *(1,) * (a.ndim - 1))
    return jnp.einsum("k...mr,k...nr->...mn", a, b, precision=precision)


def add_parts(parts: int | Int[Array, ""], one_part: Callable[[Array], Array], zeros: Array) -> Array:
    """``sum_i one_part(i)`` for ``i`` below ``parts``, one after the other; their number may be known late."""
    return jax.lax.fori_loop(0, parts, lambda index, total: total + one_part(index), zeros)
