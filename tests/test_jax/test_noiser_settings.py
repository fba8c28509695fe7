"""Conversion of fitness, and what noisers refuse."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll.jax as hs
from eggroll.core.fitness import NonFiniteFitnessWarning
from eggroll.errors import ConfigError

EGGROLL = hs.noiser.eggroll.EggRoll
W, KEY = jnp.ones((4, 3)), jax.random.key(0)
FROZEN, STATE = EGGROLL.init_noiser(W, 0.1, 0.1)
SCORES = np.array([3.0, -1, 0.5, 7, 2, 2, -4, 1])


def converted(scores, episodes=None, group_size=0, jit=False):
    frozen, state = EGGROLL.init_noiser(W, 0.1, 0.1, group_size=group_size)
    convert = jax.jit(lambda s: EGGROLL.convert_fitnesses(frozen, state, s, num_episodes_list=episodes))
    return convert(scores) if jit else EGGROLL.convert_fitnesses(frozen, state, scores, episodes)


def test_conversion():
    deviation = np.sqrt(SCORES.var() + 1e-5)
    np.testing.assert_allclose(converted(SCORES), (SCORES - SCORES.mean()) / deviation, rtol=1e-6)
    groups = SCORES.reshape(-1, 4)
    expected = (groups - groups.mean(1, keepdims=True)).ravel() / deviation
    np.testing.assert_allclose(converted(SCORES, group_size=4), expected, rtol=1e-6)
    np.testing.assert_allclose(converted(SCORES, np.full(8, 3), 4), expected, rtol=1e-6)
    assert converted(np.arange(4)).dtype == jnp.float32


@pytest.mark.parametrize("group_size", [0, 4])
def test_episodes_count_alike(group_size):
    """A score of n episodes is as n equal scores; a member without an episode gets 0 and has no influence."""
    episodes = np.array([1, 4, 2, 3, 1, 1, 5, 2])
    each = np.repeat(SCORES, episodes)
    size = group_size or 8
    means = [
        np.average(s, weights=n) for s, n in zip(SCORES.reshape(-1, size), episodes.reshape(-1, size), strict=True)
    ]
    expected = (SCORES - np.repeat(means, size)) / np.sqrt(each.var() + 1e-5)
    np.testing.assert_allclose(converted(SCORES, episodes, group_size), expected, rtol=2e-6)
    without = converted(np.where(np.arange(8) == 3, np.nan, SCORES), np.where(np.arange(8) == 3, 0, episodes))
    rest = converted(np.delete(SCORES, 3), np.delete(episodes, 3))
    np.testing.assert_allclose(without, np.insert(np.asarray(rest), 3, 0), rtol=2e-6)


def test_scores_that_are_not_finite_count_as_the_worst():
    bad = np.array([1.0, np.nan, 3, np.inf])
    expected = converted(np.array([1.0, 1, 3, 1]))
    with pytest.warns(NonFiniteFitnessWarning, match="2 of 4 scores were NaN or infinite; they count as the worst"):
        np.testing.assert_array_equal(converted(bad), expected)
    np.testing.assert_allclose(converted(bad, jit=True), expected, rtol=1e-6)
    np.testing.assert_array_equal(converted(np.full(4, np.nan), jit=True), np.zeros(4))


@pytest.mark.parametrize(
    ("scores", "episodes", "group_size", "message"),
    [
        (np.ones(6), None, 4, r"group_size \(=4\) must divide the number of scores \(=6\)"),
        (np.ones((2, 3)), None, 0, r"raw_scores has the shape \(2, 3\); give one score per member"),
        (np.ones(0), None, 0, "raw_scores is empty"),
        (np.ones(4), np.ones(3), 0, r"num_episodes_list has the shape \(3,\); it must be that of raw_scores, \(4,\)"),
    ],
)
def test_refused_scores(scores, episodes, group_size, message):
    with pytest.raises(ConfigError, match=message):
        converted(scores, episodes, group_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank \(=0\) must be an integer >= 1"),
        ({"rank": 1.5}, r"rank \(=1.5\) must be an integer >= 1"),
        ({"noise_reuse": -1}, r"noise_reuse \(=-1\) must be an integer >= 0"),
        ({"group_size": 1}, r"group_size \(=1\) compares a member with itself only"),
        ({"sigma": -0.1}, r"sigma \(=-0.1\) must be finite and >= 0"),
        ({"sigma": float("nan")}, r"sigma \(=nan\) must be finite"),
        ({"solver": "adamw"}, "solver must be a function such as optax.adamw"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EGGROLL.init_noiser(W, settings.pop("sigma", 0.1), 0.1, **settings)


def test_all_problems_of_the_settings_at_once():
    with pytest.raises(ConfigError, match=r"(?s)has 2 problems.*rank.*group_size"):
        EGGROLL.init_noiser(W, 0.1, 0.1, rank=0, group_size=-2)


def update(**changes):
    arguments = {
        "params": {"w": W},
        "base_keys": {"w": KEY},
        "fitnesses": jnp.ones(4),
        "iterinfos": (jnp.zeros(4, int), jnp.arange(4)),
        "es_map": {"w": 1},
    }
    frozen, state = EGGROLL.init_noiser((arguments | changes)["params"], 0.1, 0.1)
    return EGGROLL.do_updates(frozen, state, **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fitnesses": jnp.ones(5)}, r"the number of fitnesses \(=5\) must be even and not 0, .* pair; use 6"),
        ({"fitnesses": jnp.ones(0)}, r"the number of fitnesses \(=0\) must be even and not 0"),
        ({"fitnesses": jnp.ones((2, 2))}, r"fitnesses has the shape \(2, 2\)"),
        ({"fitnesses": jnp.ones(6)}, r"thread_ids has the shape \(4,\), but there are 6 fitnesses"),
        ({"iterinfos": jnp.arange(4)}, r"iterinfos must be \(epochs, thread_ids\)"),
        ({"iterinfos": (0, jnp.ones(4))}, "thread_ids has the dtype float32; it must be an integer one"),
        ({"es_map": {"v": 1}}, "es_map must have the structure of params, but it differs"),
        ({"base_keys": {}}, "base_keys must have the structure of params"),
        ({"es_map": {"w": 7}}, r"es_map\['w'\] \(=7\) must be one of 0 \(PARAM\), 1 \(MM_PARAM\), 2 \(EMB_PARAM\), 3"),
        ({"params": {"w": jnp.ones(3)}}, r"params\['w'\] is MM_PARAM and has the shape \(3,\) .* needs 2 axes"),
        ({"params": {"w": jnp.ones((2, 3, 4))}}, r"is MM_PARAM and has the shape \(2, 3, 4\) .* scan_map"),
        (
            {"base_keys": {"w": jax.random.split(KEY, 3)}},
            r"holds keys of the shape \(3,\), but params\['w'\] has the s",
        ),
        ({"params": {"w": jnp.ones((4, 3), int)}}, r"params\['w'\] has the dtype int32, .* mark it EXCLUDED \(3\)"),
    ],
)
def test_refused_updates(changes, message):
    with pytest.raises(ConfigError, match=message):
        update(**changes)


def test_es_map_must_be_static():
    with pytest.raises(ConfigError, match=r"es_map\['w'\] is traced; it must be static"):
        jax.jit(lambda es_map: update(es_map=es_map))({"w": 1})


def test_an_epoch_for_all():
    for one, other in zip(
        jax.tree.leaves(update(iterinfos=(3, jnp.arange(4)))[1]),
        jax.tree.leaves(update(iterinfos=(jnp.full(4, 3), jnp.arange(4)))[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_product_needs_a_matrix():
    with pytest.raises(ConfigError, match=r"needs a parameter with 2 axes, but this one has the shape \(2, 4, 3\)"):
        EGGROLL.do_mm(FROZEN, STATE, jnp.ones((2, 4, 3)), KEY, (0, 0), jnp.ones(3))


def test_batching_makes_one_sum_for_a_shape():
    """What is compiled does not grow with the number of layers."""

    def sums(layers, batched):
        params = {str(index): W for index in range(layers)}
        keys = dict.fromkeys(params, KEY)
        frozen, state = EGGROLL.init_noiser(params, 0.1, 0.1, use_batched_update=batched)
        iterinfos, es_map = (0, jnp.arange(4)), dict.fromkeys(params, 1)
        step = jax.make_jaxpr(lambda p: EGGROLL.do_updates(frozen, state, p, keys, jnp.ones(4), iterinfos, es_map)[1])
        return str(step(params)).count("name=weighted_sums")

    assert [sums(2, True), sums(5, True), sums(5, False)] == [1, 1, 5]


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_both_kinds_of_keys_and_integers_that_are_excluded(make_key):
    params = {"w": W, "v": W, "steps": jnp.arange(3)}
    keys = hs.models.common.simple_es_tree_key(params, make_key(1), dict.fromkeys(params, ()))
    frozen, state = EGGROLL.init_noiser(params, 0.1, 0.1, use_batched_update=True)
    es_map = {"w": 1, "v": 2, "steps": 3}
    _, new = EGGROLL.do_updates(frozen, state, params, keys, jnp.array([1.0, -1]), (0, jnp.arange(2)), es_map)
    assert (new["steps"].dtype, new["steps"].tolist()) == (jnp.int32, [0, 1, 2])
    for index, name in ((1, "v"), (2, "w")):  # the flattened order is steps, v, w
        key = jax.random.split(jax.random.key(1), 3)[index]
        factors = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 0), 0), (7, 1))
        np.testing.assert_allclose(new[name], W + 0.1 * np.sqrt(2) * 0.1 * factors[3:] @ factors[:3].T, atol=1e-6)


def test_without_jax_the_import_names_the_extra():
    code = "import sys; sys.modules['jax'] = None; import eggroll.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError: 'jax' is needed here" in done.stderr
    assert "Install it with: pip install" in done.stderr
    assert "[jax]" in done.stderr
