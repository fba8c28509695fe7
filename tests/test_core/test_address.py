"""Addresses: the same place gives the same noise, every other place independent noise."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll.core import address, threefry
from eggroll.core.address import Member, dense_draw, draw_key, draw_keys, factor_draw, member_of, parameter_key
from eggroll.core.select import ParameterSpec

MATRIX = ParameterSpec("layers.0.q_proj.weight", (6, 4), "matrix")
VECTOR = ParameterSpec("norm.weight", (4096,), "vector")


@pytest.mark.parametrize(
    ("index", "antithetic", "expected"),
    [
        (0, True, Member(0, 1)),
        (1, True, Member(0, -1)),
        (6, True, Member(3, 1)),
        (7, True, Member(3, -1)),
        (0, False, Member(0, 1)),
        (7, False, Member(7, 1)),
    ],
)
def test_members(index, antithetic, expected):
    assert member_of(index, antithetic=antithetic) == expected


def test_the_keys_are_the_documented_chain_of_jax_fold_ins():
    seed, generation, pair, name = 42, 9, 5, "layers.0.q_proj.weight"
    digest = threefry.name_hash(name)
    key = jax.random.key(seed)
    for data in (digest >> 32, digest & 0xFFFFFFFF):
        key = jax.random.fold_in(key, np.uint32(data))
    assert parameter_key(seed, name) == tuple(np.asarray(jax.random.key_data(key)).tolist())
    for data in (generation, pair):
        key = jax.random.fold_in(key, data)
    assert draw_key(seed, name, generation, pair) == tuple(np.asarray(jax.random.key_data(key)).tolist())


@settings(max_examples=30)
@given(
    st.integers(0, 2**64 - 1),
    st.text(max_size=8),
    st.integers(0, 2**20),
    st.lists(st.integers(0, 2**32 - 1), max_size=8),
)
def test_many_keys_equal_single_keys(seed, name, generation, pairs):
    keys = draw_keys(seed, name, generation, pairs)
    assert keys.dtype == np.uint32
    assert [tuple(row) for row in keys.tolist()] == [draw_key(seed, name, generation, pair) for pair in pairs]


@pytest.mark.parametrize("pairs", [range(3, 9), np.arange(3, 9), [3, 4, 5, 6, 7, 8]], ids=["range", "array", "list"])
def test_pairs_may_be_a_range_an_array_or_a_list(pairs):
    assert draw_keys(1, "w", 0, pairs).tolist() == [list(draw_key(1, "w", 0, pair)) for pair in range(3, 9)]


def test_noise_reuse_holds_the_noise_for_k_generations():
    keys = [draw_key(0, "w", generation, 3, noise_reuse=4) for generation in range(12)]
    assert keys[0:4] == [keys[0]] * 4
    assert keys[4:8] == [keys[4]] * 4
    assert len(set(keys)) == 3
    assert len({draw_key(0, "w", generation, 3) for generation in range(12)}) == 12


def test_factors_are_the_last_and_the_first_rows_of_one_draw():
    a, b = factor_draw(MATRIX, 3, seed=1, generation=2, pair=4)
    assert a.shape == (6, 3)
    assert b.shape == (4, 3)
    key = jax.random.wrap_key_data(jnp.asarray(draw_key(1, MATRIX.name, 2, 4), dtype=jnp.uint32))
    whole = np.asarray(jax.random.normal(key, (4 + 6, 3), dtype=jnp.float32))
    np.testing.assert_allclose(np.concatenate([b, a]), whole, rtol=4e-7)


@pytest.mark.parametrize(
    ("spec", "a_shape", "b_shape"),
    [
        (ParameterSpec("conv.weight", (8, 3, 5, 5), "conv"), (8, 2), (75, 2)),
        (ParameterSpec("embed.weight", (11, 4), "embedding"), (11, 2), (4, 2)),
        (ParameterSpec("mlp.experts.up", (3, 5, 7), "experts"), (3, 5, 2), (3, 7, 2)),
    ],
    ids=["conv", "embedding", "experts"],
)
def test_factor_shapes_of_other_kinds(spec, a_shape, b_shape):
    a, b = factor_draw(spec, 2, seed=0, generation=0, pair=0)
    assert a.shape == a_shape
    assert b.shape == b_shape
    assert a.size + b.size == spec.draw_size(2)


def test_experts_do_not_share_factors():
    a, b = factor_draw(ParameterSpec("experts", (4, 64, 64), "experts"), 4, seed=0, generation=0, pair=0)
    for factors in (a.reshape(4, -1), b.reshape(4, -1)):
        correlation = np.corrcoef(factors) - np.eye(4)
        assert np.abs(correlation).max() < 4.5 / factors.shape[1] ** 0.5


def test_noise_at_every_other_address_is_independent():
    """One seed, name, generation and pair changed at a time or together: no two draws are correlated.

    The correlation of two independent draws of d entries has standard error 1/sqrt(d); the largest of the 2,016
    pairs below is expected near 3.5 standard errors, and shared noise gives sqrt(d) = 64 of them.
    """
    seeds, names = (0, 1, 2**32, 2**32 + 1), ("layers.0.w", "layers.1.w", "layers.0.v", "")
    draws = [
        dense_draw(ParameterSpec(name, VECTOR.shape, "vector"), seed, generation, pair)
        for seed, name, generation, pair in itertools.product(seeds, names, (0, 1), (0, 1))
    ]
    correlation = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / VECTOR.size**0.5


def test_addresses_do_not_collide_when_numbers_trade_places():
    """(generation, pair) = (a, b) and (b, a) are different places, as are neighboring seeds and generations."""
    keys = {
        draw_key(seed, "w", generation, pair) for seed in range(8) for generation in range(24) for pair in range(24)
    }
    assert len(keys) == 8 * 24 * 24


def test_the_noise_of_version_1_is_frozen():
    """Runs can be replayed only while these numbers stand; a change needs a new noise version."""
    assert threefry.NOISE_VERSION == 1
    assert draw_key(42, MATRIX.name, 3, 7) == (0x93A964E1, 0xD2FD5029)
    a, b = factor_draw(MATRIX, 2, seed=42, generation=3, pair=7)
    np.testing.assert_allclose(b[0], [-6.3131790e-04, 1.4922653], rtol=1e-6)
    np.testing.assert_allclose(a[0], [1.6358182, 0.8788085], rtol=1e-6)


def test_generation_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        address.draw_key(0, "w", 2**32, 0)
