"""The interpreter of jaxprs on the releases of jax that the extra allows, whose primitives bind differently."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.extend.core import Primitive  # noqa: E402

from eggroll.jax import interpreter  # noqa: E402


@pytest.fixture(params=["a pair (jax 0.9)", "parameters only (jax 0.10)"])
def form(request, monkeypatch):
    """What ``get_bind_params`` of a primitive without functions returns, whichever jax is installed."""
    own = Primitive.get_bind_params

    def bind_params(self, params):
        found = own(self, params)
        functions, params = found if isinstance(found, tuple) else ([], found)
        assert list(functions) == []
        return (functions, params) if request.param.startswith("a pair") else params

    monkeypatch.setattr(Primitive, "get_bind_params", bind_params)


def test_either_form_of_a_primitives_parameters(form):
    def program(x):
        return jnp.sum(x * 2.0, axis=0)[1:], jax.lax.sort((x[0], x[1]), num_keys=1)  # one result, and several

    x = np.array([[3.0, 1.0, 2.0], [4.0, 5.0, 6.0]], np.float32)
    closed = jax.make_jaxpr(program)(x)
    total, first, second = interpreter.evaluate(closed.jaxpr, closed.consts, [x])
    np.testing.assert_array_equal(total, [12.0, 16.0])
    np.testing.assert_array_equal(first, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(second, [5.0, 6.0, 4.0])


def test_functions_inside_are_bound_in_the_installed_form():
    """A custom derivative and a compiled function, which no weight enters."""

    @jax.custom_vjp
    def third(x):
        return x / 3

    third.defvjp(lambda x: (x / 3, None), lambda _, g: (g,))

    def program(x):
        return jax.nn.relu(x) + jax.jit(jnp.tanh)(x) + third(x)

    x = np.array([-1.0, 0.0, 6.0], np.float32)
    closed = jax.make_jaxpr(program)(x)
    (found,) = interpreter.evaluate(closed.jaxpr, closed.consts, [x])
    np.testing.assert_allclose(found, np.maximum(x, 0) + np.tanh(x) + x / 3, rtol=1e-6)
