"""The low-rank part of a product: ``x @ (a b)`` as ``(x @ b) @ a``, for any axes that a ``dot_general`` contracts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from eggroll.jax.weights import PerturbedWeight


def contract(
    x: Any,
    weight: PerturbedWeight,
    x_contract: Sequence[int],
    w_contract: Sequence[int],
    x_batch: Sequence[int],
    w_batch: Sequence[int],
) -> Any:
    """The perturbation's part of ``dot_general(x, weight)``; axes in its order: batch, x's rest, the weight's rest.

    The factor that has more of the contracted axes meets ``x`` first, so that the intermediate is small. Half
    precision is added up in float32.
    """
    if _size(weight.a, w_contract) > _size(weight.b, w_contract):
        weight = weight.swapped()
    free = [j for j in range(weight.ndim) if j not in w_contract]
    if weight.rank == 1 and not w_batch and _size(weight.a, w_contract) == 1 and _size(weight.b, free) == 1:
        return _rank_one(x, weight, x_contract, w_contract)
    letters = iter(_letters())
    w_names = [next(letters) for _ in range(weight.ndim)]
    x_names = [""] * x.ndim
    for i, j in [*zip(x_contract, w_contract, strict=True), *zip(x_batch, w_batch, strict=True)]:
        x_names[i] = w_names[j]
    x_names = [name or next(letters) for name in x_names]
    rank = next(letters)
    a_names = [name for j, name in enumerate(w_names) if weight.in_a(j) and not _only_b(weight, j)]
    b_names = [name for j, name in enumerate(w_names) if weight.in_b(j) and not _only_a(weight, j)]
    a = weight.a.reshape(*_sizes(weight, w_names, a_names), weight.rank)
    b = weight.b.reshape(*_sizes(weight, w_names, b_names), weight.rank)
    contracted = {w_names[j] for j in w_contract}
    out = [w_names[j] for j in w_batch]
    out += [name for i, name in enumerate(x_names) if i not in x_contract and i not in x_batch]
    out += [w_names[j] for j in free if j not in w_batch]
    # After the first product: x's own axes, b's that go on, and those contracted ones that only a has.
    middle = [name for name in x_names if name not in contracted or name in a_names]
    middle += [name for name in b_names if name not in x_names]
    first = _einsum(x, x_names, b, [*b_names, rank], [*middle, rank])
    # Axes that neither factor has (an axis that was broadcast) are stretched at the end.
    had = set(middle) | set(a_names)
    result = _einsum(first, [*middle, rank], a, [*a_names, rank], [name for name in out if name in had])
    if any(name not in had for name in out):
        sizes = dict(zip(w_names, weight.shape, strict=True)) | dict(zip(x_names, x.shape, strict=True))
        result = result.reshape([sizes[name] if name in had else 1 for name in out])
        result = jnp.broadcast_to(result, [sizes[name] for name in out])
    return result


def _rank_one(x: Any, weight: PerturbedWeight, x_contract: Sequence[int], w_contract: Sequence[int]) -> Any:
    """Rank 1 as a weighted sum and an outer product, loops that XLA fuses with their neighbors.

    Against a product with one column it measured from a fifth faster to a tenth slower on a CPU (docs/dev/log.md).
    """
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, weight.b.dtype), jnp.float32)
    free = [j for j in range(weight.ndim) if j not in w_contract]
    b = weight.b[..., 0].astype(dtype)
    shape = [1] * x.ndim
    for i, j in zip(x_contract, w_contract, strict=True):
        shape[i] = b.shape[j]
    in_order = [j for _, j in sorted(zip(x_contract, w_contract, strict=True))]
    total = jnp.sum(x.astype(dtype) * b.transpose([*free, *in_order]).reshape(shape), axis=tuple(x_contract))
    total = total.reshape(*total.shape, *(1,) * len(free))
    a = weight.a[..., 0].astype(dtype).transpose([*w_contract, *free]).reshape([weight.a.shape[j] for j in free])
    return jnp.broadcast_to(total * a, [*total.shape[: x.ndim - len(x_contract)], *(weight.shape[j] for j in free)])


def _einsum(x: Any, x_names: list[str], y: Any, y_names: list[str], out: list[str]) -> Any:
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    spec = f"{''.join(x_names)},{''.join(y_names)}->{''.join(out)}"
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _only_a(weight: PerturbedWeight, axis: int) -> bool:
    """Of the two factors only ``a`` has the axis; one of length 1, which both could have, goes to ``a``."""
    return weight.in_a(axis) and (weight.b.shape[axis] == 1)


def _only_b(weight: PerturbedWeight, axis: int) -> bool:
    return weight.in_b(axis) and weight.a.shape[axis] == 1 and weight.shape[axis] != 1


def _size(factor: Any, axes: Sequence[int]) -> int:
    return math.prod(factor.shape[axis] for axis in axes)


def _sizes(weight: PerturbedWeight, names: list[str], kept: list[str]) -> list[int]:
    return [size for size, name in zip(weight.shape, names, strict=True) if name in kept]


def _letters() -> list[str]:
    return [chr(code) for code in [*range(97, 123), *range(65, 91)]]


__all__ = ["contract"]
