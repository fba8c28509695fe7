"""A perturbed weight as a value: ``base + sum_r a_r * b_r``, carried through a function's primitives.

``a`` and ``b`` have the base's number of axes and one more, the rank, at the end. Along each axis of the base a factor
either has the axis or has length 1 there: rows of a matrix are axes of ``a``, columns are axes of ``b``, and axes that
both have are a batch of matrices (layers that are scanned, experts). So every structural operation (transpose, slice,
squeeze, broadcast) is the same operation on three arrays, and :meth:`PerturbedWeight.materialize` is one expression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Policy = Literal["refuse", "materialize", "fit", "fit_matrix", "fit_matrix_materialize"]
"""What happens in an operation without a rule. The last three are for finding a layout (:mod:`eggroll.jax.layout`):
``fit`` refuses also what would be correct but slow, and all three refuse what shows that a leaf is no matrix."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class PerturbedWeight:
    """A member's weight, not materialized.

    Attributes:
        base: the center's weight as it is used here, for example transposed.
        a: base's shape with 1 where it lacks the axis, then the rank; scale and sign are in it.
        b: likewise.
        name: the parameter's name, for messages.
        policy: what happens in an operation without a rule.
    """

    base: Any
    a: Any
    b: Any
    name: str
    policy: Policy = "refuse"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return len(self.base.shape)

    @property
    def rank(self) -> int:
        """Of the perturbation."""
        return int(self.a.shape[-1])

    @property
    def may_materialize(self) -> bool:
        """Whether an operation without a rule gets the member's weight."""
        return self.policy.endswith("materialize")

    @property
    def fitting(self) -> bool:
        """Whether this is a trial of a layout."""
        return self.policy.startswith("fit")

    def in_a(self, axis: int) -> bool:
        """Whether ``a`` has the axis; an axis of length 1 counts as had by both."""
        return bool(self.a.shape[axis] == self.base.shape[axis])

    def in_b(self, axis: int) -> bool:
        """Whether ``b`` has the axis."""
        return bool(self.b.shape[axis] == self.base.shape[axis])

    def materialize(self) -> Any:
        """The weight itself, ``base.shape`` in the base's dtype; the sum is made in the factors' dtype."""
        if self.rank == 1:
            product = self.a[..., 0] * self.b[..., 0]
        else:
            product = _outer(self.a, self.b)
        return self.base + product.astype(self.base.dtype)

    def added(self, base: Any, a: Any, b: Any) -> PerturbedWeight:
        """The weight with an array added, which is as large as its base: from here on materializing costs no more."""
        policies: dict[Policy, Policy] = {"refuse": "materialize", "fit_matrix": "fit_matrix_materialize"}
        return PerturbedWeight(base, a, b, self.name, policies.get(self.policy, self.policy))

    def with_arrays(self, base: Any, a: Any, b: Any) -> PerturbedWeight:
        """The same parameter with other arrays."""
        return PerturbedWeight(base, a, b, self.name, self.policy)

    def splits(self, axes: Sequence[int]) -> bool:
        """Whether the axes belong to one factor only, as those that a product contracts should."""
        mine = [axis for axis in axes if self.shape[axis] != 1]
        return not any(self.in_a(i) for i in mine) or not any(self.in_b(i) for i in mine)

    def batched(self, axes: Sequence[int]) -> bool:
        """Whether both factors have the axes, so that each index along them is a matrix of its own."""
        return all(self.in_a(axis) and self.in_b(axis) for axis in axes)

    def swapped(self) -> PerturbedWeight:
        """The same weight with the two factors' roles exchanged."""
        return self.with_arrays(self.base, self.b, self.a)

    def tree_flatten(self) -> tuple[tuple[Any, Any, Any], tuple[str, Policy]]:
        """For JAX's transformations."""
        return (self.base, self.a, self.b), (self.name, self.policy)

    @classmethod
    def tree_unflatten(cls, aux: tuple[str, Policy], children: Sequence[Any]) -> PerturbedWeight:
        """For JAX's transformations."""
        base, a, b = children
        return cls(base, a, b, *aux)


def _outer(a: Any, b: Any) -> Any:
    """``sum_r a_r b_r`` with broadcasting, as one contraction."""
    letters = [chr(97 + axis) for axis in range(a.ndim - 1)]
    shape = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    had_a = [axis for axis in range(a.ndim - 1) if a.shape[axis] == shape[axis]]
    had_b = [axis for axis in range(b.ndim - 1) if b.shape[axis] == shape[axis]]
    left, right = "".join(letters[i] for i in had_a), "".join(letters[i] for i in had_b)
    out = "".join(letter for i, letter in enumerate(letters) if i in had_a or i in had_b)
    a = a.reshape([*(a.shape[i] for i in had_a), a.shape[-1]])
    b = b.reshape([*(b.shape[i] for i in had_b), b.shape[-1]])
    return jnp.einsum(f"{left}z,{right}z->{out}", a, b).reshape(shape)


def transposed(weight: PerturbedWeight, permutation: Sequence[int]) -> PerturbedWeight:
    """Axes in another order."""
    full = (*permutation, weight.ndim)
    return weight.with_arrays(weight.base.transpose(permutation), weight.a.transpose(full), weight.b.transpose(full))


def squeezed(weight: PerturbedWeight, axes: Sequence[int]) -> PerturbedWeight:
    """Axes of length 1 removed."""
    return weight.with_arrays(*(jnp.squeeze(array, tuple(axes)) for array in (weight.base, weight.a, weight.b)))


def broadcast(weight: PerturbedWeight, shape: Sequence[int], axes: Sequence[int]) -> PerturbedWeight | None:
    """``broadcast_in_dim`` that only brings in axes of length 1: axis ``i`` becomes ``axes[i]``. Else ``None``."""
    if math.prod(shape) != math.prod(weight.shape):
        return None
    base = jax.lax.broadcast_in_dim(weight.base, tuple(shape), tuple(axes))
    factors = []
    for factor in (weight.a, weight.b):
        new = [1] * len(shape)
        for i, axis in enumerate(axes):
            new[axis] = factor.shape[i]
        factors.append(factor.reshape(*new, factor.shape[-1]))
    return weight.with_arrays(base, *factors)


def sliced(weight: PerturbedWeight, start: Sequence[int], stop: Sequence[int], step: Sequence[int]) -> PerturbedWeight:
    """A static slice of every axis."""
    arrays = [jax.lax.slice(weight.base, start, stop, step)]
    for factor in (weight.a, weight.b):
        ones = [factor.shape[i] != weight.shape[i] for i in range(weight.ndim)]
        arrays.append(
            jax.lax.slice(
                factor,
                [0 if one else s for s, one in zip(start, ones, strict=True)] + [0],
                [1 if one else s for s, one in zip(stop, ones, strict=True)] + [factor.shape[-1]],
                [1 if one else s for s, one in zip(step, ones, strict=True)] + [1],
            )
        )
    return weight.with_arrays(*arrays)


def dynamically_sliced(weight: PerturbedWeight, start: Sequence[Any], sizes: Sequence[int]) -> PerturbedWeight:
    """A slice whose start is computed."""
    arrays = [jax.lax.dynamic_slice(weight.base, start, sizes)]
    for factor in (weight.a, weight.b):
        ones = [factor.shape[i] != weight.shape[i] for i in range(weight.ndim)]
        zero = jnp.zeros((), jnp.asarray(start[0]).dtype)
        arrays.append(
            jax.lax.dynamic_slice(
                factor,
                [zero if one else s for s, one in zip(start, ones, strict=True)] + [zero],
                [1 if one else s for s, one in zip(sizes, ones, strict=True)] + [factor.shape[-1]],
            )
        )
    return weight.with_arrays(*arrays)


def reshaped(weight: PerturbedWeight, shape: Sequence[int]) -> PerturbedWeight | None:
    """Axes split or merged, as long as rows stay rows and columns stay columns; else ``None``."""
    factors = [_reshape_factor(factor, weight.shape, tuple(shape)) for factor in (weight.a, weight.b)]
    if factors[0] is None or factors[1] is None:
        return None
    return weight.with_arrays(weight.base.reshape(shape), *factors)


def _reshape_factor(factor: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Any | None:
    """A factor in the new shape: each block of axes that keeps its product is wholly in the factor, or not at all."""
    target = list(new)
    for old_axes, new_axes in _blocks(old, new):
        full = math.prod(old[i] for i in old_axes)
        has = math.prod(factor.shape[i] for i in old_axes)
        if has == full:
            continue
        if has != 1:
            return None
        for i in new_axes:
            target[i] = 1
    return factor.reshape(*target, factor.shape[-1])


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest way to pair runs of old axes with runs of new axes of the same product."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + len(olds), j + len(news)
        while (left := math.prod(old[k] for k in olds)) != (right := math.prod(new[k] for k in news)):
            if left < right:
                olds.append(i)
                i += 1
            else:
                news.append(j)
                j += 1
        blocks.append((olds, news))
    return blocks
