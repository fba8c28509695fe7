"""Noise in JAX, the same numbers as everywhere: ``jax.random`` with the keys of the noise specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float32, Int, UInt32

from eggroll.core import threefry
from eggroll.core.noise_spec import NoiseSpec
from eggroll.core.select import ParameterSpec

Draw: TypeAlias = Float32[Array, "*shape"] | tuple[Float32[Array, "*batch m r"], Float32[Array, "*batch n r"]]
"""A dense draw, or the two factors ``(a, b)`` of a matrix's."""


@dataclass(frozen=True)
class Leaf:
    """A parameter of a pytree, and how it is perturbed.

    Attributes:
        name: its path, parts joined by dots.
        shape: its shape.
        batch: leading axes that hold matrices of their own (layers that are scanned, experts).
        rows: axes after those that make the rows of its matrix; the axes after them make the columns. 0: it is
            perturbed densely.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    rows: int

    @property
    def low_rank(self) -> bool:
        """Whether the perturbation is a product of two factors."""
        return self.rows > 0

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the axes in front."""
        return self.shape[: self.batch]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, n)``: all row axes as one, all column axes as one."""
        split = self.batch + self.rows
        return math.prod(self.shape[self.batch : split]), math.prod(self.shape[split:])

    @property
    def spec(self) -> ParameterSpec:
        """The same parameter as the oracle and the other frameworks know it, its axes merged."""
        if not self.low_rank:
            return ParameterSpec(self.name, self.shape, "vector" if len(self.shape) == 1 else "other")
        if not self.batch:
            return ParameterSpec(self.name, self.matrix_shape, "matrix")
        return ParameterSpec(self.name, (math.prod(self.batch_shape), *self.matrix_shape), "experts")

    def draw_size(self, rank: int) -> int:
        """Number of normals in a draw."""
        return self.spec.draw_size(rank)


def draw(noise: NoiseSpec, leaf: Leaf, generation: Int[ArrayLike, ""], pair: Int[ArrayLike, ""]) -> Draw:
    """One draw of a parameter in float32, not scaled: ``normal(key(draw))`` of the noise specification.

    Returns:
        ``(a, b)`` of shapes ``(*batch, m, rank)`` and ``(*batch, n, rank)``, or an array of the parameter's shape.
    """
    return _draw(noise, _name_words([leaf])[0], leaf, generation, pair)


def draw_pairs(
    noise: NoiseSpec, leaves: Sequence[Leaf], generation: Int[ArrayLike, ""], pairs: Int[ArrayLike, " K"]
) -> dict[str, Draw]:
    """The draws of many pairs: each leaf's arrays get a first axis of length K.

    Parameters of one shape are drawn in one go, so that compiling does not grow with the number of layers.
    """
    drawn: dict[str, Any] = {}
    for group in grouped(leaves):

        def one(name_words: Any, pair: Any, shape: Leaf = group[0]) -> Draw:
            return _draw(noise, name_words, shape, generation, pair)

        many = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(_name_words(group), jnp.asarray(pairs))
        for index, leaf in enumerate(group):
            drawn[leaf.name] = jax.tree.map(lambda array, i=index: array[i], many)
    return {leaf.name: drawn[leaf.name] for leaf in leaves}


def grouped(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Leaves of one shape and layout together, in the order of their first."""
    groups: dict[tuple[tuple[int, ...], int, int], list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault((leaf.shape, leaf.batch, leaf.rows), []).append(leaf)
    return list(groups.values())


def _name_words(leaves: Sequence[Leaf]) -> UInt32[Array, "L 2"]:
    hashes = [threefry.name_hash(leaf.name) for leaf in leaves]
    return jnp.array([[value >> 32, value & 0xFFFFFFFF] for value in hashes], jnp.uint32)


def _draw(noise: NoiseSpec, name_words: UInt32[Array, " two"], leaf: Leaf, generation: Any, pair: Any) -> Draw:
    words = jnp.array(threefry.seed_key(noise.seed), jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    for word in (name_words[0], name_words[1], jnp.uint32(noise.epoch(generation)), jnp.uint32(pair)):
        key = jax.random.fold_in(key, word)
    if not leaf.low_rank:
        return jax.random.normal(key, leaf.shape, jnp.float32)
    m, n = leaf.matrix_shape
    factors = jax.random.normal(key, (*leaf.batch_shape, n + m, noise.rank), jnp.float32)
    return factors[..., n:, :], factors[..., :n, :]
