"""The base of all noisers adds no noise, and what a fitness function must return."""

import jax
import numpy as np
import pytest

import jax.numpy as jnp  # isort: skip

import eggroll.jax as hs
from eggroll.core.config import ESConfig
from eggroll.errors import ConfigError
from eggroll.jax.strategy import Strategy

NOOP = hs.noiser.base_noiser.Noiser


def test_the_base_of_the_noisers_is_no_noise():
    """As code written for HyperscaleES has it: two empty dictionaries, and everything comes back as it was given."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.arange(4.0)}
    frozen, state = NOOP.init_noiser(params, 0.1, 0.01, "more", solver=None, group_size=7, rank=0)
    assert (frozen, state) == ({}, {})
    assert hs.noiser.all_noisers["noop"] is NOOP
    x = jnp.arange(6.0).reshape(2, 3)
    for iterinfo in (None, (0, 1)):
        member = (frozen, state, params["w"], jax.random.key(0), iterinfo)
        np.testing.assert_array_equal(NOOP.do_mm(*member, x), x @ params["w"].T)
        np.testing.assert_array_equal(NOOP.do_Tmm(*member, jnp.ones((2, 4))), jnp.ones((2, 4)) @ params["w"])
        np.testing.assert_array_equal(NOOP.do_emb(*member, jnp.array([[1], [3]])), params["w"][jnp.array([[1], [3]])])
        assert NOOP.get_noisy_standard(*member) is params["w"]
    scores = [3.0, float("nan"), -1.0]
    assert NOOP.convert_fitnesses(frozen, state, scores) is scores
    assert NOOP.convert_fitnesses(frozen, state, scores, num_episodes_list=[1, 2, 3]) is scores
    out_state, out = NOOP.do_updates(frozen, state, params, None, scores, None, None)
    assert out_state is state
    assert out is params


@pytest.mark.parametrize("name", ["eggroll", "open_es"])
def test_noisers_with_noise_keep_their_settings(name):
    noiser = hs.noiser.all_noisers[name]
    assert issubclass(noiser, NOOP)
    frozen, state = noiser.init_noiser(jnp.ones((4, 3)), 0.1, 0.01, rank=2)
    assert (frozen["rank"], set(state)) == (2, {"sigma", "opt_state"})
    np.testing.assert_allclose(noiser.convert_fitnesses(frozen, state, np.array([1.0, 3])), [-1, 1], rtol=1e-5)
    with pytest.raises(ConfigError, match=rf"{noiser.__name__}\.init_noiser"):
        noiser.init_noiser(jnp.ones((4, 3)), 0.1, 0.01, rank=0)


@pytest.mark.parametrize(
    ("fitness", "message"),
    [
        (
            lambda params, x: (params["w"].sum(), {"seen": x}),
            r"gave a tuple of 2; it must give one number",
        ),
        (lambda params, x: {"score": params["w"].sum()}, r"gave a dict of 1; it must give one number"),
        (lambda params, x: None, r"gave NoneType; it must give one number"),
        (lambda params, x: params["w"] + x, r"gave shape \(3,\); it must give one number"),
        (lambda params, x: params["w"].sum() * 1j, r"gave the dtype complex64; it must give one number"),
    ],
)
def test_a_fitness_that_is_no_number_is_one_sentence(fitness, message):
    strategy = Strategy(fitness, ESConfig(population_size=4))
    state = strategy.init({"w": jnp.ones(3)})
    with pytest.raises(ConfigError, match=message):
        strategy.step(state, jnp.float32(2.0))


def test_numbers_of_other_kinds_are_scores():
    strategy = Strategy(lambda params, x: jnp.int32(params["w"].sum() > 0), ESConfig(population_size=4))
    scores = strategy.evaluate(strategy.init({"w": jnp.ones(3)}), jnp.float32(2.0))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, np.ones(4))
