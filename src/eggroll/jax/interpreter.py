"""Evaluate a jaxpr in which some values are perturbed weights.

Equations without a perturbed weight are bound as they are. Functions inside (``jit``, ``checkpoint``, custom
derivatives) and control flow (``scan``, ``while``, ``cond``) are entered only where a perturbed weight goes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from eggroll.errors import UnsupportedOperationError
from eggroll.jax.rules import RULES, NotAMatrixError, as_array
from eggroll.jax.weights import PerturbedWeight

CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat": "jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
"""Primitives that call a function with their operands, and the parameter that holds its jaxpr. Others (a reduction, a
Pallas kernel) have a parameter of the same name that means something else."""


def evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, arrays or perturbed weights.

    Raises:
        UnsupportedOperationError: a perturbed weight is used in a primitive that has no rule for it.
    """
    environment: dict[Any, Any] = {}

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, jax_core.Literal) else environment[variable]

    environment.update(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        outputs = _apply(equation, operands)
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    # A vector is cheap to have as it is, and every operation is then allowed.
    operands = [
        value.materialize() if isinstance(value, PerturbedWeight) and value.ndim <= 1 else value for value in operands
    ]
    if not any(isinstance(value, PerturbedWeight) for value in operands):
        return _bind(equation, operands)
    handler = CONTROL.get(primitive.name)
    if handler is not None:
        return handler(operands, params)
    if primitive.name in CALLS:
        inner = params[CALLS[primitive.name]]
        closed = inner if hasattr(inner, "consts") else jax_core.ClosedJaxpr(inner, ())
        return evaluate(closed.jaxpr, closed.consts, operands)
    found = RULES.get(primitive.name)
    result = found(operands, params) if found is not None else None
    if result is None and found is not None:  # of two weights one may be as large as an array already
        fewer = [
            value.materialize() if isinstance(value, PerturbedWeight) and value.may_materialize else value
            for value in operands
        ]
        if any(isinstance(value, PerturbedWeight) for value in fewer):
            operands, result = fewer, found(fewer, params)
    if result is None:
        return _bind(equation, [_materialized(value, primitive.name) for value in operands])
    return list(result) if primitive.multiple_results else [result]


def _bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    found = equation.primitive.get_bind_params(equation.params)
    # jax 0.9 gives the functions to call and the parameters; jax 0.10 gives parameters that hold those functions.
    functions, params = found if isinstance(found, tuple) else ((), found)
    result = equation.primitive.bind(*functions, *operands, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _materialized(value: Any, primitive: str) -> Any:
    if not isinstance(value, PerturbedWeight):
        return value
    if value.may_materialize:
        return value.materialize()
    raise UnsupportedOperationError(
        f"the perturbed parameter {value.name!r}, of shape {value.shape} here, is used in {primitive!r}, which has no "
        f"rule for low-rank perturbations. Leave it unperturbed with exclude=({value.name!r},), or let each member's "
        f"weight be materialized there with materialize=({value.name!r},)"
    )


def _scan(operands: list[Any], params: dict[str, Any]) -> list[Any]:
    """Weights may be constants of the loop, or stacked and scanned over (their first axis is then a batch)."""
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    closed, length = params["jaxpr"], params["length"]
    consts = operands[:num_consts]
    carry = [_materialized(value, "scan (as its carry)") for value in operands[num_consts : num_consts + num_carry]]
    stacked = [_stacked(value, length) for value in operands[num_consts + num_carry :]]

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        results = evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *sliced])
        results = [_materialized(value, "scan (as its result)") for value in results]
        return results[:num_carry], results[num_carry:]

    carry, outputs = lax.scan(
        body, carry, stacked, length=length, reverse=params["reverse"], unroll=params["unroll"]
    )  # fmt: skip
    return [*carry, *outputs]


def _stacked(value: Any, length: int) -> Any:
    if not isinstance(value, PerturbedWeight):
        return value
    if value.ndim == 2:  # vectors, which are cheap to have as they are
        if value.fitting:
            raise NotAMatrixError(f"{value.name!r} is a stack of vectors that a scan goes over")
        return value.materialize()
    if value.policy == "fit" and not value.batched((0,)):
        _materialized(value, "scan (which goes over one factor's axis)")
    a, b = (jnp.broadcast_to(factor, (length, *factor.shape[1:])) for factor in (value.a, value.b))
    return value.with_arrays(value.base, a, b)


def _while(operands: list[Any], params: dict[str, Any]) -> list[Any]:
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test_consts, body_consts = operands[: split[0]], operands[split[0] : split[1]]
    carry = [_materialized(value, "while (as its carry)") for value in operands[split[1] :]]

    def go_on(carry: list[Any]) -> Any:
        return as_array(evaluate(test.jaxpr, test.consts, [*test_consts, *carry])[0])

    def step(carry: list[Any]) -> list[Any]:
        results = evaluate(body.jaxpr, body.consts, [*body_consts, *carry])
        return [_materialized(value, "while (as its result)") for value in results]

    return list(lax.while_loop(go_on, step, carry))


def _cond(operands: list[Any], params: dict[str, Any]) -> list[Any]:
    index, *values = operands

    def branch(closed: Any) -> Any:
        def run(*values: Any) -> list[Any]:
            results = evaluate(closed.jaxpr, closed.consts, values)
            return [_materialized(value, "cond (as its result)") for value in results]

        return run

    return list(lax.switch(index, [branch(closed) for closed in params["branches"]], *values))


CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
