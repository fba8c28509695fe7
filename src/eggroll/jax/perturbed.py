"""``perturb(fn)``: evaluate a member of a population with an unmodified function of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PyTree

from eggroll.core.noise_spec import NoiseSpec
from eggroll.errors import ConfigError
from eggroll.jax.interpreter import evaluate
from eggroll.jax.layout import check_patterns, choose, fit, named_leaves, policy_for, weight
from eggroll.jax.noise import Draw, Leaf, draw, draw_pairs
from eggroll.jax.rules import as_array
from eggroll.jax.weights import PerturbedWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Address:
    """Which member of which generation; noise is a pure function of it.

    Attributes:
        generation: from 0.
        member: from 0. With antithetic sampling members ``2k`` and ``2k + 1`` are a pair.
        sigma: the standard deviation of a perturbation's entries.
    """

    generation: Int[ArrayLike, "*members"]
    member: Int[ArrayLike, "*members"]
    sigma: Float[ArrayLike, "*members"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemberNoise:
    """A member's noise, drawn in advance.

    Attributes:
        draws: for each parameter ``(a, b)`` or a dense array, of one pair, not scaled.
        scale: sigma, with the member's sign.
    """

    draws: dict[str, Draw]
    scale: Float[ArrayLike, ""]


class Perturbed:
    """``(params, x, address) -> fn(params of the member, x)``; made by :func:`perturb`."""

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree], PyTree],
        noise: NoiseSpec,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        materialize: Sequence[str] = (),
        low_rank: bool = True,
    ) -> None:
        self.fn, self.noise = fn, noise
        self.include, self.exclude, self.materialize = include, tuple(exclude), tuple(materialize)
        self.low_rank = low_rank
        self._fitted: dict[Any, list[Leaf]] = {}
        self._latest: dict[Any, list[Leaf]] = {}
        if problems := noise.problems():
            raise ConfigError.from_problems("perturb", problems)

    def __call__(self, params: PyTree, x: PyTree, address: Address | MemberNoise) -> PyTree:
        """``fn(params of the member, x)``; use it under ``jit``, ``vmap`` over addresses, inside ``scan``.

        Args:
            params: the center.
            x: the second argument of ``fn``, any pytree.
            address: the member's address, or its noise drawn in advance (:meth:`draw`).

        Raises:
            UnsupportedOperationError: a perturbed matrix is used in a primitive that has no rule.
        """
        closed, shape, arrays = self._trace(params, x)
        leaves = self._leaves(params, closed)
        noise = address if isinstance(address, MemberNoise) else self._drawn(leaves, address)
        by_name = {leaf.name: leaf for leaf in leaves}
        values = [
            self._value(value, by_name.get(name), noise)
            for name, value in zip(named_leaves(params), arrays, strict=True)
        ]
        outputs = evaluate(closed.jaxpr, closed.consts, [*values, *jax.tree_util.tree_leaves(x)])
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shape), [as_array(value) for value in outputs])

    def leaves(self, params: PyTree, x: PyTree) -> list[Leaf]:
        """What is perturbed, and how, for these arguments (arrays or their shapes)."""
        return self._leaves(params, self._trace(params, x)[0])

    def _trace(self, params: PyTree, x: PyTree) -> tuple[Any, PyTree, list[Array]]:
        """The function's closed jaxpr over the arrays of ``params`` and ``x``, its result's shapes, and the arrays."""
        flat, structure = jax.tree_util.tree_flatten(params)
        is_array = [hasattr(value, "shape") and hasattr(value, "dtype") for value in flat]
        arrays = [value for value, array in zip(flat, is_array, strict=True) if array]

        def call(arrays: list[Any], x: Any) -> Any:
            rest = iter(arrays)
            values = [next(rest) if array else value for value, array in zip(flat, is_array, strict=True)]
            return self.fn(jax.tree_util.tree_unflatten(structure, values), x)

        closed, shape = jax.make_jaxpr(call, return_shape=True)(arrays, x)
        return closed, shape, arrays

    def draw(
        self, leaves: Sequence[Leaf], generation: Int[ArrayLike, ""], pairs: Int[ArrayLike, " K"]
    ) -> dict[str, Draw]:
        """The draws of many pairs in advance; see :func:`eggroll.jax.noise.draw_pairs`."""
        return draw_pairs(self.noise, leaves, generation, pairs)

    def _leaves(self, params: PyTree, closed: Any) -> list[Leaf]:
        named = named_leaves(params)
        signature = (_signature(params), str(closed.in_avals))
        if signature not in self._fitted:
            leaves = choose(params, self.include, self.exclude, low_rank=self.low_rank)
            check_patterns(self.materialize, leaves)
            self._fitted[signature] = fit(leaves, closed, list(named), self.noise.rank, materialize=self.materialize)
        self._latest[signature[0]] = self._fitted[signature]
        return self._fitted[signature]

    def known_leaves(self, params: PyTree) -> list[Leaf]:
        """What is perturbed for these parameters, known from the last call with them.

        Raises:
            ConfigError: the function has not been evaluated yet, so nothing is known of it.
        """
        try:
            return self._latest[_signature(params)]
        except KeyError:
            raise ConfigError(
                "the layout of these parameters is not known yet: evaluate a generation first (evaluate or step), or "
                "call leaves(params, x)"
            ) from None

    def _drawn(self, leaves: Sequence[Leaf], address: Address) -> MemberNoise:
        pair, sign = self.noise.draw_of(jnp.asarray(address.member))
        draws = {leaf.name: draw(self.noise, leaf, address.generation, pair) for leaf in leaves}
        return MemberNoise(draws, jnp.asarray(address.sigma, jnp.float32) * sign)

    def _value(self, value: Array, leaf: Leaf | None, noise: MemberNoise) -> Array | PerturbedWeight:
        if leaf is None:
            return value
        drawn = noise.draws[leaf.name]
        if not leaf.low_rank:
            return value + (noise.scale * drawn).astype(value.dtype)
        a, b = drawn
        return weight(
            value, leaf, a * (noise.scale / math.sqrt(self.noise.rank)), b, policy_for(leaf, self.materialize)
        )


def _signature(params: PyTree) -> Any:
    return tuple((name, tuple(value.shape), str(value.dtype)) for name, value in named_leaves(params).items())


def perturb(
    fn: Callable[[PyTree, PyTree], PyTree],
    *,
    rank: int = 1,
    seed: int = 0,
    antithetic: bool = True,
    noise_reuse: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    materialize: Sequence[str] = (),
    low_rank: bool = True,
) -> Perturbed:
    """A function ``(params, x, address) -> y`` that gives ``fn(params of the member, x)``.

    Member ``p`` has ``W + sigma A_p B_p^T / sqrt(rank)`` for a matrix ``W`` and dense noise elsewhere (EGGROLL, section
    4). A product with a perturbed matrix becomes ``x W + (x A) B^T``; the member's matrix is never made. ``fn`` is
    taken as it is: Flax and Equinox modules, plain pytrees, with ``scan``, ``while``, ``cond``, ``jit`` inside.

    Args:
        fn: a JAX function of a pytree of parameters and one more argument (any pytree).
        rank: of the perturbations of matrices.
        seed: of the noise.
        antithetic: members ``2k`` and ``2k + 1`` have the same draw with opposite signs.
        noise_reuse: generations that share their noise, at least 1.
        include: path patterns of parameters to perturb, such as ``"layers.*.kernel"``; ``None`` takes all.
        exclude: path patterns of parameters to leave alone.
        materialize: path patterns of parameters that may be materialized, for each member, in primitives that have no
            rule; elsewhere those raise.
        low_rank: false perturbs matrices densely too: plain ES, to compare with.

    Raises:
        ConfigError: a setting cannot work.

    Example:
        >>> apply = perturb(lambda params, x: jnp.tanh(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones(3)
        >>> jax.vmap(lambda member: apply(params, x, Address(0, member, 0.1)))(jnp.arange(8)).shape
        (8, 2)
    """
    noise = NoiseSpec(seed, rank, antithetic, noise_reuse)
    return Perturbed(fn, noise, include=include, exclude=exclude, materialize=materialize, low_rank=low_rank)
