"""Threefry against its authors' vectors and against jax.random, which it promises to equal."""

from __future__ import annotations

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.core import normal, threefry

# NumPy's and XLA's log1p differ in the last place, which the polynomial carries to at most 3 ulp.
NORMAL_ULPS = 4

word = st.integers(0, 2**32 - 1)


def jax_key(key):
    return jax.random.wrap_key_data(jnp.asarray(key, dtype=jnp.uint32), impl="threefry2x32")


def assert_same_normals(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= NORMAL_ULPS * np.spacing(np.abs(expected)))


# Random123's kat_vectors, "threefry2x32 20": counter, key, output.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    hi, lo = threefry.threefry2x32(key, np.array([counter[0]], np.uint32), np.array([counter[1]], np.uint32))
    assert (int(hi[0]), int(lo[0])) == expected


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1])
def test_seed_key_equals_jax(seed):
    with jax.enable_x64(True):  # without it jax drops the upper half of a seed
        expected = np.asarray(jax.random.key_data(jax.random.key(seed)))
    assert threefry.seed_key(seed) == tuple(int(half) for half in expected)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=rf"seed \(={seed}\) must be a whole number from 0 to 2\*\*64 - 1"):
        threefry.seed_key(seed)


@pytest.mark.parametrize("data", [0, 1, 12345, 2**31, 2**32 - 1])
@pytest.mark.parametrize("key", [(0, 0), (0, 42), (0xDEADBEEF, 0x01234567), (2**32 - 1, 2**32 - 1)])
def test_fold_in_equals_jax(key, data):
    expected = jax.random.key_data(jax.random.fold_in(jax_key(key), np.uint32(data)))
    assert threefry.fold_in(key, data) == tuple(int(half) for half in np.asarray(expected))


@pytest.mark.parametrize("data", [-1, 2**32])
def test_fold_in_out_of_range(data):
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        threefry.fold_in((0, 0), data)


@pytest.mark.parametrize("key", [(0, 0), (0, 42), (0xDEADBEEF, 0x01234567)])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_bits_equal_jax(key, count):
    np.testing.assert_array_equal(threefry.random_bits(key, count), jax.random.bits(jax_key(key), (count,)))


def test_bits_beyond_32_bit_counters_equal_jax():
    # jax.random would need a draw of 2**32 elements to get there; its block cipher takes the counters directly.
    key, start, count = (7, 9), 2**32 - 3, 8
    index = np.arange(start, start + count, dtype=np.uint64)
    halves = np.concatenate([index >> np.uint64(32), index & np.uint64(2**32 - 1)]).astype(np.uint32)
    out = np.asarray(jax.extend.random.threefry_2x32((np.uint32(key[0]), np.uint32(key[1])), jnp.asarray(halves)))
    np.testing.assert_array_equal(threefry.random_bits(key, count, start=start), out[:count] ^ out[count:])


def test_counters_do_not_wrap():
    low = threefry.random_bits((7, 9), 64, start=0)
    for start in (2**32, 2**33, 2**40):
        assert not np.array_equal(threefry.random_bits((7, 9), 64, start=start), low)


@given(key=st.tuples(word, word), start=st.integers(0, 2**34), count=st.integers(1, 40), cut=st.integers(0, 40))
def test_any_part_of_a_draw_can_be_made_alone(key, start, count, cut):
    cut = min(cut, count)
    whole = threefry.random_bits(key, count, start=start)
    parts = [threefry.random_bits(key, cut, start=start), threefry.random_bits(key, count - cut, start=start + cut)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (2, 3, 4), (100_000,), ()])
def test_normals_equal_jax(shape):
    key = (0xC0FFEE, 17)
    assert_same_normals(threefry.normal(key, shape), jax.random.normal(jax_key(key), shape, dtype=jnp.float32))


def test_normals_of_part_of_a_draw():
    whole = threefry.normal((1, 2), (10, 4))
    np.testing.assert_array_equal(threefry.normal((1, 2), (3, 4), start=8), whole[2:5])


def test_every_word_gives_a_finite_normal():
    bits = np.array([0, 1, 511, 512, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1], np.uint32)
    normals = normal.bits_to_normal(bits)
    assert normals.dtype == np.float32
    assert np.isfinite(normals).all()
    # sqrt(2) * erfinv of the lowest and the highest uniform, 2**-24 above -1 and 3 * 2**-24 below 1.
    np.testing.assert_allclose(normals[[0, -1]], [-5.4199832, 5.2201131], rtol=1e-6)
    assert np.all(np.diff(normals) >= 0), "more bits, larger normal"


def test_normals_have_the_moments_of_a_normal():
    # 2**20 fixed draws: the standard errors of the four moments are 1, sqrt(2), sqrt(15), sqrt(96) over 1024.
    draw = threefry.normal(threefry.seed_key(5), (2**20,)).astype(np.float64)
    error = 1 / 1024
    assert abs(draw.mean()) < 4 * error
    assert abs((draw**2).mean() - 1) < 4 * 2**0.5 * error
    assert abs((draw**3).mean()) < 4 * 15**0.5 * error
    assert abs((draw**4).mean() - 3) < 4 * 96**0.5 * error


# Each is what `printf '%s' NAME | b2sum -l 64` prints.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", 0xE4A6A0577479B2B4),
        ("model.layers.0.self_attn.q_proj.weight", 0x0AA7677B12D62EE3),
        ("größe", 0xF4F8E155C9329AE9),
    ],
)
def test_name_hash_is_frozen(name, expected):
    assert threefry.name_hash(name) == expected
