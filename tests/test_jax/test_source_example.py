"""The worked example of code written for HyperscaleES, with one import changed: an MLP learns to predict 2."""

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll.jax as hs

MEMBERS = 64
EPOCHS = 6


def clean_scores(seed):
    """Scores of the center before and after each of the six epochs."""
    model, noiser = hs.models.common.MLP, hs.noiser.eggroll.EggRoll
    model_key, es_key = jax.random.split(jax.random.key(seed))
    frozen_params, params, scan_map, es_map = model.rand_init(
        model_key, in_dim=3, out_dim=1, hidden_dims=[256, 256], use_bias=True, activation="relu", dtype="float32"
    )
    frozen_noiser_params, noiser_params = noiser.init_noiser(params, 0.2, 0.03, solver=optax.adamw, rank=8)
    es_tree_key = hs.models.common.simple_es_tree_key(params, es_key, scan_map)
    x = jnp.full(3, 0.1)

    def score(noiser_params, params, iterinfo):
        y = model.forward(noiser, frozen_noiser_params, noiser_params, frozen_params, params, es_tree_key, iterinfo, x)
        return -jnp.mean(jnp.square(y - 2))

    @jax.jit
    def train(noiser_params, params):
        def epoch(carry, number):
            noiser_params, params = carry
            iterinfos = jnp.full(MEMBERS, number), jnp.arange(MEMBERS)
            raw = jax.vmap(lambda *iterinfo: score(noiser_params, params, iterinfo))(*iterinfos)
            fitnesses = noiser.convert_fitnesses(frozen_noiser_params, noiser_params, raw)
            carry = noiser.do_updates(
                frozen_noiser_params, noiser_params, params, es_tree_key, fitnesses, iterinfos, es_map
            )
            return carry, score(*carry, None)

        return score(noiser_params, params, None), jax.lax.scan(epoch, (noiser_params, params), jnp.arange(EPOCHS))[1]

    first, rest = train(noiser_params, params)
    return [float(first), *map(float, rest)]


def test_the_mlp_learns_to_predict_two():
    """From about -4 (it predicts 0) to above -2; over twelve seeds the worst end was -1.6."""
    scores = clean_scores(9)
    assert scores[0] == pytest.approx(-3.97, abs=0.1)
    assert scores[-1] > -2
