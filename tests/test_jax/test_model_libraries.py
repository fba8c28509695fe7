"""``perturb`` on unmodified models of Flax (Linen, NNX) and Equinox, attention and convolutions included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from test_perturbed import check, normal  # noqa: E402


def test_a_linen_transformer_block():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8)(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return nn.Dense(11)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))

    tokens = jnp.array([[1, 2, 10, 4], [0, 3, 3, 7]])
    model = Block()
    params = model.init(jax.random.key(0), tokens)
    apply = check(model.apply, params, tokens, members=2, tolerance=1e-4)
    layouts = {leaf.name: (leaf.batch, leaf.rows) for leaf in apply.leaves(params, tokens)}
    attention = "params.MultiHeadDotProductAttention_0"
    assert layouts[f"{attention}.query.kernel"] == (0, 1)  # (d, heads, k): contracted over the first
    assert layouts[f"{attention}.out.kernel"] == (0, 2)  # (heads, k, d): contracted over the first two
    assert layouts["params.Embed_0.embedding"] == (0, 1)
    assert layouts["params.LayerNorm_0.scale"] == (0, 0)


def test_an_nnx_network_with_convolutions():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.linear = nnx.Linear(4 * 9, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            return self.linear(x.reshape(x.shape[0], -1))

    structure, params = nnx.split(Net(nnx.Rngs(0)))
    apply = check(lambda p, x: nnx.merge(structure, p)(x), params, normal(2, 6, 6, 2), members=2, tolerance=1e-4)
    layouts = {leaf.name: (leaf.batch, leaf.rows) for leaf in apply.leaves(params, normal(2, 6, 6, 2))}
    assert (0, 3) in layouts.values()  # the kernel, HWIO: rows are height, width and inputs


def test_an_equinox_module_with_functions_among_its_leaves():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    class Net(eqx.Module):
        conv: eqx.nn.Conv1d
        cell: eqx.nn.GRUCell
        out: eqx.nn.MLP

        def __call__(self, x):
            h = jax.nn.relu(self.conv(x)).T
            state = jnp.zeros(5)
            state, _ = jax.lax.scan(lambda s, row: (self.cell(row, s), None), state, h)
            return self.out(state)

    model = Net(
        eqx.nn.Conv1d(2, 4, 3, key=keys[0]), eqx.nn.GRUCell(4, 5, key=keys[1]), eqx.nn.MLP(5, 2, 8, 1, key=keys[2])
    )
    x = normal(2, 7)

    def fn(params, x):
        return params(x)

    apply = check(fn, model, x, members=2, tolerance=1e-4, jit_reference=eqx.filter_jit)
    layouts = {leaf.name: (leaf.batch, leaf.rows) for leaf in apply.leaves(model, x)}
    assert layouts["conv.weight"] == (0, 1)  # (out, in, width)
    assert layouts["cell.weight_hh"] == (0, 1)
