"""Noisers against explicit weights, dense float64 sums and a trajectory written in NumPy.

The reference here draws with ``jax.random`` from the documented keys and shares nothing else with the library.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eggroll.jax as hs
from eggroll.jax.noiser import _update

PARAM, MM_PARAM, EMB_PARAM, EXCLUDED = range(4)
EGGROLL, OPEN_ES, NOOP = hs.noiser.eggroll.EggRoll, hs.noiser.open_es.OpenES, hs.noiser.base_noiser.Noiser
SIGMA = 0.25
EPS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


def reference_noise(noiser, es_class, key, shape, dtype, rank, epoch, thread, sigma=SIGMA):
    """A member's perturbation, sigma and sign in it, dense float64."""
    draw = jax.random.fold_in(jax.random.fold_in(key, epoch), thread // 2)
    sign = 1 if thread % 2 == 0 else -1
    if noiser is OPEN_ES or es_class == PARAM:
        return sign * sigma * np.float64(jax.random.normal(draw, shape, dtype))
    a, b = shape
    factors = np.float64(jax.random.normal(draw, (a + b, rank), dtype))
    return sign * sigma / np.sqrt(rank) * factors[b:] @ factors[:b].T


def dense_gradient(noiser, es_class, key, param, rank, fitnesses, epochs, threads):
    """``(1/N) sum_p s_p perturbation_p``, float64, member by member."""
    noise = [
        score * reference_noise(noiser, es_class, key, param.shape, param.dtype, rank, epoch, thread)
        for score, epoch, thread in zip(np.float64(fitnesses), epochs, threads, strict=True)
    ]
    return np.sum(noise, axis=0) / len(noise)


def gradient_of(noiser, params, keys, es_map, fitnesses, iterinfos, **settings_):
    """What ``do_updates`` moved by, over sqrt(N): an SGD step of size 1 is the gradient times sqrt(N)."""
    frozen, dynamic = noiser.init_noiser(params, SIGMA, 1.0, **settings_)
    _, new = noiser.do_updates(frozen, dynamic, params, keys, fitnesses, iterinfos, es_map)
    return jax.tree.map(lambda a, b: (np.float64(a) - np.float64(b)) / np.sqrt(len(fitnesses)), new, params)


@settings(max_examples=8)
@given(
    noiser=st.sampled_from([EGGROLL, OPEN_ES]),
    shape=st.sampled_from([(5, 3), (1, 6)]),
    rank=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    epoch=st.integers(0, 50),
    thread=st.integers(0, 2000),
)
def test_products_equal_explicit_weights(noiser, shape, rank, dtype, epoch, thread):
    key = jax.random.key(3)
    param = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    frozen, dynamic = noiser.init_noiser(param, SIGMA, 1.0, rank=rank, noise_reuse=1)
    x, xt = (jax.random.normal(jax.random.key(2), (2, 3, size)).astype(dtype) for size in reversed(shape))
    ids = jnp.arange(6).reshape(2, 3) % shape[0]
    weight, full = (
        np.float64(param) + reference_noise(noiser, kind, key, shape, dtype, rank, epoch, thread)
        for kind in (MM_PARAM, PARAM)
    )
    state = (frozen, dynamic, param, key, (epoch, thread))
    for result, expected in (
        (noiser.do_mm(*state, x), np.float64(x) @ weight.T),
        (noiser.do_Tmm(*state, xt), np.float64(xt) @ weight),
        (noiser.do_emb(*state, ids), weight[ids]),
        (noiser.get_noisy_standard(*state), full),
    ):
        assert (result.dtype, result.shape) == (dtype, expected.shape)
        scale = np.abs(expected).max() + 1
        np.testing.assert_allclose(np.float64(result) / scale, expected / scale, atol=EPS[dtype])


@pytest.mark.parametrize("noiser", [NOOP, EGGROLL, OPEN_ES])
def test_no_noise(noiser):
    param, x = jnp.ones((4, 3)), jnp.ones((2, 3))
    frozen, dynamic = noiser.init_noiser(param, SIGMA, 1.0)
    state = (frozen, dynamic, param, jax.random.key(0), (0, 1) if noiser is NOOP else None)
    np.testing.assert_array_equal(noiser.do_mm(*state, x), x @ param.T)
    np.testing.assert_array_equal(noiser.do_Tmm(*state, jnp.ones(4)), jnp.ones(4) @ param)
    np.testing.assert_array_equal(noiser.do_emb(*state, jnp.array([1, 3])), param[:2])
    np.testing.assert_array_equal(noiser.get_noisy_standard(*state), param)
    if noiser is NOOP:
        out = noiser.do_updates(frozen, dynamic, param, state[3], jnp.ones(2), (jnp.zeros(2, int), jnp.arange(2)), 1)
        assert out == (dynamic, param)


def test_factors_and_antithetic_pairs():
    module = hs.noiser.eggroll
    param, key = jnp.zeros((4, 6), jnp.float32), jax.random.key(5)
    frozen, _ = EGGROLL.init_noiser(param, SIGMA, 1.0, rank=3, noise_reuse=1)
    a, b = module.get_lora_update_params(frozen, 0.5, (7, 8), param, key)
    a_odd, b_odd = module.get_lora_update_params(frozen, 0.5, (7, 9), param, key)
    draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 7), 4), (10, 3))
    np.testing.assert_array_equal(b, draw[:6])
    np.testing.assert_array_equal(a, draw[6:] * 0.5)
    np.testing.assert_array_equal(a_odd, -a)
    np.testing.assert_array_equal(b_odd, b)
    dense = module.get_nonlora_update_params(frozen, 0.5, (7, 8), param, key)
    np.testing.assert_array_equal(dense, -module.get_nonlora_update_params(frozen, 0.5, (7, 9), param, key))


@pytest.mark.parametrize(("reuse", "same_as_epoch_0"), [(0, [0, 1, 2, 3, 9]), (1, [0]), (3, [0, 1, 2])])
def test_noise_reuse(reuse, same_as_epoch_0):
    param, key = jnp.zeros((3, 4)), jax.random.key(5)
    frozen, _ = EGGROLL.init_noiser(param, SIGMA, 1.0, noise_reuse=reuse)
    draws = {e: hs.noiser.eggroll.get_lora_update_params(frozen, 1.0, (e, 2), param, key)[1] for e in (0, 1, 2, 3, 9)}
    assert [e for e, draw in draws.items() if np.array_equal(draw, draws[0])] == same_as_epoch_0
    fitnesses, threads = jnp.array([1.0, -0.5]), jnp.array([2, 3])
    grads = {
        e: gradient_of(EGGROLL, param, key, MM_PARAM, fitnesses, (jnp.full(2, e), threads), noise_reuse=reuse)
        for e in draws
    }
    assert [e for e, grad in grads.items() if np.array_equal(grad, grads[0])] == same_as_epoch_0


# Few shapes, because each costs a compilation: that is where the time of these tests goes.
PARAMS = {"w": (6, 4), "emb": (6, 4), "u": (6, 4), "bias": (6,), "gain": (6,), "still": (3, 3)}
ES_MAP = {"w": MM_PARAM, "emb": EMB_PARAM, "u": np.int32(MM_PARAM), "bias": PARAM, "gain": PARAM, "still": EXCLUDED}


def a_model(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), len(PARAMS))
    params = {name: jax.random.normal(k, PARAMS[name]).astype(dtype) for name, k in zip(PARAMS, keys, strict=True)}
    return params, hs.models.common.simple_es_tree_key(params, jax.random.key(11), dict.fromkeys(PARAMS, ()))


@pytest.mark.parametrize(("noiser", "dtype"), [(EGGROLL, "float32"), (EGGROLL, "bfloat16"), (OPEN_ES, "float32")])
def test_update_is_the_sum_over_members(noiser, dtype):
    """Every class of parameter, with shuffled threads, a draw that occurs four times and pairs that are torn apart."""
    params, keys = a_model(dtype)
    threads = np.array([4, 1, 9, 0, 5, 4, 30, 5, 2, 7])
    epochs = np.array([3, 3, 3, 3, 3, 3, 2, 3, 3, 2])
    fitnesses = np.sin(np.arange(10) * 1.3).astype(np.float32)
    arguments = (noiser, params, keys, ES_MAP, fitnesses, (epochs, threads))
    grads, batched = (gradient_of(*arguments, rank=2, noise_reuse=1, use_batched_update=b) for b in (False, True))
    for name, param in params.items():
        expected = dense_gradient(noiser, ES_MAP[name], keys[name], param, 2, fitnesses, epochs, threads)
        tolerance = 2e-6 if dtype == "float32" else 1e-2  # a bfloat16 weight near 1 has a spacing of 0.008
        np.testing.assert_allclose(grads[name], expected * (name != "still"), atol=tolerance, err_msg=name)
        np.testing.assert_allclose(batched[name], grads[name], atol=1e-6)
        assert (np.abs(grads[name]).max() > 0.01) == (name != "still")


@pytest.mark.parametrize("noiser", [EGGROLL, OPEN_ES])
def test_what_is_not_evolved_stays_bit_for_bit(noiser):
    """Weight decay would move it, and adding zero would turn -0.0 into 0.0."""
    params, keys = a_model()
    params["still"] = params["still"].at[0, 0].set(-0.0)
    frozen, dynamic = noiser.init_noiser(
        params, SIGMA, 0.1, solver=optax.adamw, solver_kwargs={"weight_decay": 0.5}, freeze_nonlora=True, rank=2
    )
    for name in ("bias", "gain"):
        kept = noiser.get_noisy_standard(frozen, dynamic, params[name], keys[name], (0, 1))
        np.testing.assert_array_equal(kept, params[name])
    iterinfos = (jnp.zeros(4, int), jnp.arange(4))
    _, new = noiser.do_updates(frozen, dynamic, params, keys, jnp.array([1.0, -1, 2, 0]), iterinfos, ES_MAP)
    same = {name for name in params if np.asarray(new[name]).tobytes() == np.asarray(params[name]).tobytes()}
    assert same == {"bias", "gain", "still"}


@pytest.mark.parametrize(
    ("rank", "size", "members_at_a_time", "dtype"), [(0, 10, 3, "float32"), (1, 14, 2, "float16"), (3, 4, 1, "float32")]
)
def test_chunks_change_nothing(rank, size, members_at_a_time, dtype):
    shape, keys = (5, 4), jax.random.split(jax.random.key(0), 2)
    fitnesses = jnp.cos(jnp.arange(size) * 2.1)
    draws = _update.distinct_draws(fitnesses, jnp.full(size, 4), jnp.arange(size) // 3, 1)
    one_draw = 4 * (9 * rank if rank else 20)
    sums = [
        _update.weighted_sums(keys, draws, 0.5, shape, jnp.dtype(dtype), rank, limit)
        for limit in (one_draw * members_at_a_time, 2**26)
    ]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-6)


def test_each_distinct_draw_is_made_once():
    draws = _update.distinct_draws(jnp.arange(1.0, 7), jnp.array([5, 5, 4, 5, 4, 5]), jnp.array([3, 2, 0, 3, 0, 0]), 1)
    assert int(draws.number) == 3
    np.testing.assert_array_equal(draws.epochs[:3], [4, 5, 5])
    np.testing.assert_array_equal(draws.pairs[:3], [0, 0, 1])
    np.testing.assert_array_equal(draws.weights, [3 + 5, 6, -1 + 2 - 4, 0, 0, 0])


@pytest.mark.parametrize(("noiser", "decay"), [(EGGROLL, 0.0), (OPEN_ES, 0.7)])
def test_trajectory_in_numpy(noiser, decay):
    """Five epochs of a small network, forward and update in float64 NumPy; SGD and its momentum (``decay``) by hand."""
    members, rank, lr, epochs = 16, 2, lambda step: 0.1 * 0.9**step, 5
    model = hs.models.common.MLP
    frozen_params, params, scan_map, es_map = model.rand_init(jax.random.key(1), 3, 2, [7], True, "tanh", "float32")
    keys = hs.models.common.simple_es_tree_key(params, jax.random.key(2), scan_map)
    frozen, state = noiser.init_noiser(
        params, SIGMA, lr, solver_kwargs={"momentum": decay} if decay else None, group_size=4, rank=rank, noise_reuse=2
    )
    x, target = jax.random.normal(jax.random.key(3), (5, 3)), jnp.array([0.5, -1.0])
    ids = jnp.arange(members)

    @jax.jit
    def step(state, params, epoch):
        def score(thread):
            y = model.forward(noiser, frozen, state, frozen_params, params, keys, (epoch, thread), x)
            return -jnp.mean(jnp.square(y - target))

        fitnesses = noiser.convert_fitnesses(frozen, state, jax.vmap(score)(ids))
        return noiser.do_updates(frozen, state, params, keys, fitnesses, (jnp.full(members, epoch), ids), es_map)

    flat, treedef = jax.tree.flatten(params)
    flat_keys, classes = treedef.flatten_up_to(keys), treedef.flatten_up_to(es_map)
    shapes, center = [leaf.shape for leaf in flat], [np.float64(leaf) for leaf in flat]
    velocity = [np.zeros(shape) for shape in shapes]
    draw = partial(reference_noise, noiser, dtype="float32", rank=rank)
    for epoch in range(epochs):
        noise = [
            [draw(*leaf, epoch=epoch // 2, thread=thread) for thread in range(members)]
            for leaf in zip(classes, flat_keys, shapes, strict=True)
        ]
        scores = []
        for thread in range(members):
            b0, w0, b1, w1 = (c + n[thread] for c, n in zip(center, noise, strict=True))
            y = np.tanh(np.float64(x) @ w0.T + b0) @ w1.T + b1
            scores.append(-np.mean((y - np.float64(target)) ** 2))
        groups = np.reshape(scores, (-1, 4))
        shaped = (groups - groups.mean(1, keepdims=True)).ravel() / np.sqrt(np.var(scores) + 1e-5)
        for i, n in enumerate(noise):
            gradient = -np.sqrt(members) * np.tensordot(shaped, n, 1) / members
            velocity[i] = gradient + decay * velocity[i]
            center[i] = center[i] - lr(epoch) * velocity[i]
        state, params = step(state, params, epoch)
        for ours, theirs in zip(jax.tree.leaves(params), center, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert max(np.abs(c - f).max() for c, f in zip(center, flat, strict=True)) > 0.1


def test_state_keeps_its_types():
    """So that epochs can be a ``lax.scan``: half precision, a solver with moments, and the caller's own entries."""
    params, keys = a_model("bfloat16")
    frozen, state = EGGROLL.init_noiser(params, jnp.float32(SIGMA), 0.1, solver=optax.adamw, use_batched_update=True)
    state["mine"] = jnp.ones(2)
    iterinfos = (jnp.zeros(4, int), jnp.arange(4))

    def epoch(carry, _):
        return EGGROLL.do_updates(frozen, *carry, keys, jnp.array([1.0, -1, 2, 0]), iterinfos, ES_MAP), None

    (state, params), _ = jax.jit(lambda carry: jax.lax.scan(epoch, carry, length=2))((state, params))
    assert set(state) == {"sigma", "opt_state", "mine"}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
