"""How a perturbed weight goes through each primitive: products become base + low rank, structure stays structure.

A rule takes ``(operands, params)``, at least one operand a :class:`PerturbedWeight`, and gives the primitive's result,
an array or again a perturbed weight, or ``None`` where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from eggroll.errors import UnsupportedOperationError
from eggroll.jax.products import contract
from eggroll.jax.weights import (
    PerturbedWeight,
    broadcast,
    dynamically_sliced,
    reshaped,
    sliced,
    squeezed,
    transposed,
)


class NotAMatrixError(UnsupportedOperationError):
    """While a layout is sought: the leaf is used as vectors are, so it should be perturbed densely."""


Rule = Callable[[Sequence[Any], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for primitives by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule("dot_general")
def _dot_general(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    x, weight = operands
    if isinstance(x, PerturbedWeight):
        if isinstance(weight, PerturbedWeight):
            return None
        return _weight_first(x, weight, params)
    (x_contract, w_contract), (x_batch, w_batch) = params["dimension_numbers"]
    if weight.policy == "fit" and not (weight.splits(w_contract) and weight.batched(w_batch)):
        return None
    base = lax.dot_general_p.bind(x, weight.base, **params)
    return base + contract(x, weight, x_contract, w_contract, x_batch, w_batch).astype(base.dtype)


def _weight_first(weight: PerturbedWeight, x: Any, params: dict[str, Any]) -> Any:
    """``weight @ x``: the low-rank part comes with the weight's axes last, and they are moved to the front."""
    (w_contract, x_contract), (w_batch, x_batch) = params["dimension_numbers"]
    if weight.policy == "fit" and not (weight.splits(w_contract) and weight.batched(w_batch)):
        return None
    base = lax.dot_general_p.bind(weight.base, x, **params)
    part = contract(x, weight, x_contract, w_contract, x_batch, w_batch)
    batch = len(w_batch)
    w_free = weight.ndim - len(w_contract) - batch
    x_free = part.ndim - batch - w_free
    order = [*range(batch), *range(batch + x_free, part.ndim), *range(batch, batch + x_free)]
    return base + part.transpose(order).astype(base.dtype)


@rule("conv_general_dilated")
def _convolution(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """``conv(x, W + a b) = conv(x, W) + conv1x1(conv(x, b), a)``, for each group of channels."""
    x, weight = operands
    if not isinstance(weight, PerturbedWeight) or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis = numbers.rhs_spec[0]
    rest = [axis for axis in range(weight.ndim) if axis != out_axis]
    if weight.in_b(out_axis) and not weight.in_a(out_axis):
        weight = weight.swapped()
    if any(weight.a.shape[axis] != 1 for axis in rest) or any(not weight.in_b(axis) for axis in rest):
        return None
    base = lax.conv_general_dilated_p.bind(x, weight.base, **params)
    kernel = jnp.moveaxis(weight.b.squeeze(out_axis), -1, out_axis)  # the rank takes the place of the outputs
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    low = lax.conv_general_dilated_p.bind(x, kernel.astype(x.dtype), **params)
    feature = numbers.out_spec[1]
    low = jnp.moveaxis(low, feature, -1).reshape(*_without(low.shape, feature), groups, weight.rank)
    a = weight.a.reshape(groups, -1, weight.rank).astype(low.dtype)
    part = jnp.einsum("...gr,gor->...go", low, a)
    part = jnp.moveaxis(part.reshape(*part.shape[:-2], -1), -1, feature)
    return base + part.astype(base.dtype)


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != axis]


@rule("gather")
def _gather(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Rows of an embedding: one axis is indexed, every other is taken whole."""
    weight, indices = operands
    if not isinstance(weight, PerturbedWeight):
        return None
    numbers, sizes, indexed = (
        params["dimension_numbers"],
        params["slice_sizes"],
        params["dimension_numbers"].start_index_map,
    )
    if weight.ndim != 2 or numbers.operand_batching_dims or not indexed:
        return None
    axis = next((i for i in indexed if sizes[i] != weight.shape[i]), indexed[0])
    other = 1 - axis
    if sizes[axis] != 1 or sizes[other] != weight.shape[other] or other in numbers.collapsed_slice_dims:
        return None
    if weight.a.shape[other] != 1:
        weight = weight.swapped()
    if weight.a.shape[other] != 1 or weight.b.shape[axis] != 1:
        return None
    base = lax.gather_p.bind(weight.base, indices, **params)
    table = jnp.moveaxis(weight.a, axis, 0).reshape(weight.shape[axis], weight.rank)
    place = indices[..., indexed.index(axis)]
    if params["mode"] == lax.GatherScatterMode.CLIP:
        rows = jnp.take(table, place, axis=0, mode="clip")
    else:  # rows out of range get no noise on top of the fill; a start in the axis that is taken whole can only be 0
        inside = (place >= 0) & (place < len(table))
        for column in (indices[..., indexed.index(i)] for i in indexed if i != axis):
            inside &= column == 0
        rows = jnp.where(inside[..., None], jnp.take(table, place, axis=0, mode="clip"), 0)
    columns = jnp.moveaxis(weight.b, other, 0).reshape(weight.shape[other], weight.rank)
    part = jnp.einsum("...r,nr->...n", rows, columns)
    if axis in numbers.collapsed_slice_dims:
        part = jnp.moveaxis(part, -1, numbers.offset_dims[0])
    else:  # the axis stays, with a length of 1
        part = jnp.moveaxis(jnp.expand_dims(part, -2 if axis == 0 else -1), (-2, -1), numbers.offset_dims)
    return base + part.astype(base.dtype)


@rule("transpose")
def _transpose(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    return transposed(operands[0], params["permutation"])


@rule("squeeze")
def _squeeze(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    return squeezed(operands[0], params["dimensions"])


@rule("broadcast_in_dim")
def _broadcast(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """A weight that is stretched is used element by element, like a bias: as large as it is, it may be made."""
    weight, shape, axes = operands[0], params["shape"], params["broadcast_dimensions"]
    same = broadcast(weight, shape, axes)
    if same is not None:
        return same
    if weight.fitting:
        raise NotAMatrixError(f"{weight.name!r}, of shape {weight.shape} here, is used element by element")
    return lax.broadcast_in_dim(weight.materialize(), shape, axes)


@rule("reshape")
def _reshape(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    return None if params.get("dimensions") is not None else reshaped(operands[0], params["new_sizes"])


@rule("slice")
def _slice(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    step = params["strides"] or [1] * operands[0].ndim
    return sliced(operands[0], params["start_indices"], params["limit_indices"], step)


@rule("split")
def _split(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    weight, axis, parts, at = operands[0], params["axis"], [], 0
    for size in params["sizes"]:
        start, stop = [0] * weight.ndim, list(weight.shape)
        start[axis], stop[axis] = at, at + size
        parts.append(sliced(weight, start, stop, [1] * weight.ndim))
        at += size
    return parts


@rule("dynamic_slice")
def _dynamic_slice(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    weight, *start = operands
    return dynamically_sliced(weight, start, params["slice_sizes"]) if isinstance(weight, PerturbedWeight) else None


@rule("convert_element_type")
def _convert(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    weight, dtype = operands[0], params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return weight.with_arrays(weight.base.astype(dtype), weight.a, weight.b)


@rule("copy", "copy_p", "stop_gradient")
def _same(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    return operands[0] if len(operands) == 1 else None


@rule("optimization_barrier")
def _barrier(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """A hint to the compiler about plain values; a weight needs none."""
    return list(operands)


def _not_a_matrix(*operands: Any) -> None:
    """While a layout is sought: stretched over another array, a weight is used as biases and scales are."""
    shape = jnp.broadcast_shapes(*(jnp.shape(value) for value in operands))
    for value in operands:
        if isinstance(value, PerturbedWeight) and value.fitting and value.shape != shape:
            raise NotAMatrixError(f"{value.name!r}, of shape {value.shape} here, is used element by element")


@rule("max", "min", "pow", "atan2")
def _elementwise(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    _not_a_matrix(*operands)


@rule("neg")
def _negative(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    weight = operands[0]
    return weight.with_arrays(-weight.base, -weight.a, weight.b)


@rule("mul")
def _multiply(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    first, second = operands
    weight, scalar = (first, second) if isinstance(first, PerturbedWeight) else (second, first)
    if isinstance(scalar, PerturbedWeight) or jnp.shape(scalar) != ():
        _not_a_matrix(weight, scalar)
        return None
    return weight.with_arrays(weight.base * scalar, weight.a * jnp.asarray(scalar, weight.a.dtype), weight.b)


@rule("div")
def _divide(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    weight, scalar = operands
    if not isinstance(weight, PerturbedWeight) or isinstance(scalar, PerturbedWeight) or jnp.shape(scalar) != ():
        _not_a_matrix(*operands)
        return None
    return weight.with_arrays(weight.base / scalar, weight.a / jnp.asarray(scalar, weight.a.dtype), weight.b)


@rule("add", "add_any")
def _add(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    first, second = operands
    weight, other = (first, second) if isinstance(first, PerturbedWeight) else (second, first)
    _not_a_matrix(weight, other)
    if isinstance(other, PerturbedWeight):
        return None
    return weight.added(weight.base + other, weight.a, weight.b)


@rule("sub")
def _subtract(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    first, second = operands
    _not_a_matrix(first, second)
    if isinstance(first, PerturbedWeight) and isinstance(second, PerturbedWeight):
        return None
    if isinstance(first, PerturbedWeight):
        return first.added(first.base - second, first.a, first.b)
    return second.added(first - second.base, -second.a, second.b)


def as_array(value: Any) -> Any:
    """A perturbed weight as the array it stands for; anything else as it is."""
    return value.materialize() if isinstance(value, PerturbedWeight) else value


__all__ = ["RULES", "as_array", "rule"]
