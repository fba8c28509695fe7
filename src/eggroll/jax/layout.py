"""Which leaves of a pytree are perturbed, and along which of their axes the low-rank factors lie.

A matrix is its two axes. For leaves with more axes (convolution kernels, attention projections with an axis for heads,
layers that are scanned over) the function itself says what the matrix is: the layouts in ``_candidates`` are tried on
its jaxpr, and the first is taken whose every use is a product with a rule. A leaf that none fits is perturbed densely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from eggroll.core.select import ParameterSpec, matches, select
from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.jax.interpreter import evaluate
from eggroll.jax.noise import Leaf
from eggroll.jax.rules import NotAMatrixError
from eggroll.jax.weights import PerturbedWeight, Policy


def named_leaves(params: PyTree) -> dict[str, Array]:
    """The arrays of a pytree by path, parts joined by dots; leaves that are no arrays (functions) are left out."""
    named: dict[str, Any] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            named[jax.tree_util.keystr(path, simple=True, separator=".") or "params"] = value
    return named


def choose(
    params: PyTree, include: Sequence[str] | None = None, exclude: Sequence[str] = (), *, low_rank: bool = True
) -> list[Leaf]:
    """The leaves to perturb, each with the layout that its number of axes suggests (see :func:`fit`).

    Args:
        params: a pytree of arrays.
        include: path patterns (as in :mod:`eggroll.core.select`); ``None`` takes every floating-point leaf.
        exclude: path patterns of leaves that are left alone.
        low_rank: whether matrices are perturbed by factors; without it everything is perturbed densely.

    Raises:
        SelectionError: a pattern matches nothing, or nothing is left.
    """
    arrays = {name: value for name, value in named_leaves(params).items() if jnp.issubdtype(value.dtype, jnp.floating)}
    specs = [ParameterSpec(name, tuple(value.shape), _kind(value)) for name, value in arrays.items()]
    kinds = ("matrix", "conv", "experts", "embedding", "vector", "other")
    chosen = select(specs, include=include, exclude=exclude, kinds=kinds)
    return [Leaf(spec.name, spec.shape, 0, 1 if low_rank and len(spec.shape) > 1 else 0) for spec in chosen]


def _kind(value: Any) -> Any:
    return {0: "other", 1: "vector", 2: "matrix"}.get(value.ndim, "conv")


def fit(
    leaves: Sequence[Leaf], jaxpr: Any, names: Sequence[str], rank: int, *, materialize: Sequence[str] = ()
) -> list[Leaf]:
    """The leaves with the layouts that the function's jaxpr allows.

    Args:
        leaves: what is perturbed.
        jaxpr: the closed jaxpr of the function; its first inputs are the parameters.
        names: of those parameters, in order.
        rank: of the perturbations.
        materialize: path patterns of parameters that may be materialized where there is no rule.

    Raises:
        UnsupportedOperationError: a matrix is used in a primitive without a rule.
    """
    classes: dict[tuple[str, tuple[int, ...]], list[Leaf]] = {}
    for leaf in leaves:
        if leaf.low_rank:
            classes.setdefault((re.sub(r"\d+", "#", leaf.name), leaf.shape), []).append(leaf)
    layouts: dict[str, Leaf] = {}
    for members in classes.values():
        batch, rows = _layout(members, jaxpr, names, rank, materialize)
        layouts |= {leaf.name: Leaf(leaf.name, leaf.shape, batch, rows) for leaf in members}
    return [layouts.get(leaf.name, leaf) for leaf in leaves]


def _layout(
    members: Sequence[Leaf], jaxpr: Any, names: Sequence[str], rank: int, materialize: Sequence[str]
) -> tuple[int, int]:
    axes = len(members[0].shape)
    allowed = policy_for(members[0], materialize) == "materialize"
    matrix: Policy = "fit_matrix_materialize" if allowed else "fit_matrix"
    policy: Policy = matrix if axes == 2 else "fit"
    for batch, rows in _candidates(axes):
        trial = {leaf.name: Leaf(leaf.name, leaf.shape, batch, rows) for leaf in members}
        try:
            _try(trial, jaxpr, names, rank, policy)
        except NotAMatrixError:
            continue
        except UnsupportedOperationError:
            if axes == 2:
                raise
            continue
        return batch, rows
    return 0, 0


def _candidates(axes: int) -> list[tuple[int, int]]:
    """``(batch axes, row axes)`` in the order in which they are tried: first few batch axes, then few row axes."""
    return [(batch, rows) for batch in range(axes - 1) for rows in _ends_first(axes - batch)]


def _ends_first(axes: int) -> list[int]:
    """Where the rows may end: after the first axis, before the last one, then between."""
    return list(dict.fromkeys([1, axes - 1, *range(2, axes - 1)]))


def _try(trial: dict[str, Leaf], jaxpr: Any, names: Sequence[str], rank: int, policy: Policy) -> None:
    def run(inputs: list[Any]) -> list[Any]:
        arguments = []
        for index, value in enumerate(inputs):
            leaf = trial.get(names[index]) if index < len(names) else None
            if leaf is not None:
                factors = [jnp.zeros((*leaf.batch_shape, size, rank)) for size in leaf.matrix_shape]
                value = weight(value, leaf, factors[0], factors[1], policy)
            arguments.append(value)
        return [
            value.materialize() if isinstance(value, PerturbedWeight) else value
            for value in evaluate(jaxpr.jaxpr, jaxpr.consts, arguments)
        ]

    jax.eval_shape(run, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in jaxpr.in_avals])


def policy_for(leaf: Leaf, materialize: Sequence[str]) -> Policy:
    """Whether an operation without a rule may materialize the leaf."""
    return "materialize" if any(matches(leaf.name, pattern) for pattern in materialize) else "refuse"


def weight(base: Any, leaf: Leaf, a: Any, b: Any, policy: Policy) -> PerturbedWeight:
    """A leaf's value for one member: factors ``(*batch, m, r)`` and ``(*batch, n, r)`` laid along its axes."""
    split = leaf.batch + leaf.rows
    row_shape, column_shape = leaf.shape[leaf.batch : split], leaf.shape[split:]
    ones_for_rows, ones_for_columns = (1,) * len(row_shape), (1,) * len(column_shape)
    a = a.reshape(*leaf.batch_shape, *row_shape, *ones_for_columns, a.shape[-1])
    b = b.reshape(*leaf.batch_shape, *ones_for_rows, *column_shape, b.shape[-1])
    return PerturbedWeight(base, a.astype(base.dtype), b.astype(base.dtype), leaf.name, policy)


def check_patterns(materialize: Sequence[str], leaves: Sequence[Leaf]) -> None:
    """Raise ConfigError where a pattern of ``materialize`` matches no perturbed leaf."""
    for pattern in materialize:
        if not any(matches(leaf.name, pattern) for leaf in leaves):
            names = ", ".join(leaf.name for leaf in leaves[:12])
            raise ConfigError(f"materialize pattern {pattern!r} matches no perturbed parameter; those are {names}")


__all__: list[str] = ["check_patterns", "choose", "fit", "named_leaves", "policy_for", "weight"]
