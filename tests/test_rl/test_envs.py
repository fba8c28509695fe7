"""Environments: names and errors, what each of the sixteen promises, short runs against the libraries, pictures."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from eggroll._optional import install_line  # noqa: E402
from eggroll.errors import ConfigError, MissingExtraError  # noqa: E402
from eggroll.rl.envs import _common, registry  # noqa: E402
from eggroll.rl.envs.base import Continuous, Discrete, MultiDiscrete  # noqa: E402

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles a fifth faster

MULTI = MultiDiscrete((3, 3, 3, 3, 2, 2))
SIXTEEN = {  # name: observation, actions, time limit
    "CartPole-v1": (4, Discrete(2), 500),
    "Pendulum-v1": (3, 1, 200),
    "brax/ant": (27, 8, 1000),
    "brax/humanoid": (244, 17, 1000),
    "brax/inverted_double_pendulum": (8, 1, 1000),
    "craftax/Craftax-Classic-Symbolic-AutoReset-v1": (1345, Discrete(17), 10000),
    "craftax/Craftax-Symbolic-AutoReset-v1": (8268, Discrete(43), 100000),
    "jumanji/Game2048-v1": (16 + 4, Discrete(4), 1000),
    "jumanji/Knapsack-v1": (4 * 50, Discrete(50), 50),
    "jumanji/Snake-v1": (12 * 12 * 5 + 1 + 4, Discrete(4), 4000),
    "kinetix/l/hard_pinball": (679, MULTI, 256),
    "kinetix/m/h17_thrustcontrol_left": (247, MULTI, 256),
    "kinetix/s/h1_thrust_over_ball": (140, MULTI, 256),
    "navix/Navix-DoorKey-8x8-v0": (8 * 8 * 3, Discrete(7), 100),
    "navix/Navix-Dynamic-Obstacles-6x6-Random-v0": (6 * 6 * 3, Discrete(7), 100),
    "navix/Navix-FourRooms-v0": (19 * 19 * 3, Discrete(7), 100),
}
CHEAP = [name for name in SIXTEEN if not name.startswith(("brax", "craftax", "kinetix"))]


@functools.cache
def make(name):
    pytest.importorskip(registry.resolve(name)[0])
    return registry.make(name)


def random_actions(env, key, *batch):
    if isinstance(env.actions, Discrete):
        return jax.random.randint(key, batch, 0, env.actions.num)
    if isinstance(env.actions, MultiDiscrete):
        return jax.random.randint(key, (*batch, len(env.actions.nums)), 0, jnp.array(env.actions.nums))
    low, high = env.actions.low, env.actions.high
    return jax.random.uniform(key, (*batch, env.actions.size), minval=low, maxval=high)


def run(env, *, steps, episodes=3, action=None):
    """``(steps, episodes, ...)`` observations, rewards and dones, all in one compilation."""

    def episode(key):
        state, first = env.reset(key)

        def body(state, key):
            chosen = random_actions(env, key) if action is None else jnp.int32(action)
            state, *seen = env.step(key, state, chosen)
            return state, seen

        return first, jax.lax.scan(body, state, jax.random.split(key, steps))[1]

    keys = jax.random.split(jax.random.key(3), episodes)
    first, seen = jax.jit(jax.vmap(episode, out_axes=(0, 1)), compiler_options=QUICK)(keys)
    return np.asarray(first), *(np.asarray(x) for x in seen)


# names


def test_the_sixteen_are_canonical():
    assert tuple(SIXTEEN) == registry.PAPER
    for name in SIXTEEN:
        library, id = registry.resolve(name)
        assert name in (id, f"{library}/{id}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gymnax/CartPole-v1", "gymnax/CartPole-v1"),
        ("CartPole", "gymnax/CartPole-v1"),
        ("Acrobot-v1", "gymnax/Acrobot-v1"),
        ("Breakout-MinAtar", "gymnax/Breakout-MinAtar"),
        ("brax-ant", "brax/ant"),
        ("ant", "brax/ant"),
        (" brax/InvertedDoublePendulum?backend=spring", "brax/inverted_double_pendulum"),
        ("craftax", "craftax/Craftax-Symbolic-AutoReset-v1"),
        ("craftax-classic", "craftax/Craftax-Classic-Symbolic-AutoReset-v1"),
        ("Craftax-Symbolic-v1", "craftax/Craftax-Symbolic-AutoReset-v1"),
        ("jumanji-Snake", "jumanji/Snake-v1"),
        ("kinetix-hard_pinball", "kinetix/l/hard_pinball"),
        ("kinetix-s-h1_thrust_over_ball", "kinetix/s/h1_thrust_over_ball"),
        ("navix-DoorKey-8x8", "navix/Navix-DoorKey-8x8-v0"),
        ("navix/doorkey-8x8-v0", "navix/Navix-DoorKey-8x8-v0"),
        ("Navix-FourRooms-v0", "navix/Navix-FourRooms-v0"),
        ("gym/CartPole-v1", "gymnasium/CartPole-v1"),
        ("gymnasium/ALE/Pong-v5", "gymnasium/ALE/Pong-v5"),
    ],
)
def test_short_names(name, meant):
    assert "/".join(registry.resolve(name)) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gymnax/Breakout", "gymnax/Breakout-MinAtar"),
        ("brax/hopper", "brax/hopper"),
        ("jumanji-rubikscube", "jumanji/RubiksCube-v0"),
        ("kinetix/h2_one_wheel_car", "kinetix/s/h2_one_wheel_car"),
        ("navix-Empty-5x5", "navix/Navix-Empty-5x5-v0"),
    ],
)
def test_other_environments_of_the_libraries(name, meant):
    library = meant.partition("/")[0]
    pytest.importorskip(library)
    assert "/".join(registry.resolve(name)) == meant


def test_names_of_gymnasium():
    pytest.importorskip("gymnasium")
    assert registry.resolve("HalfCheetah-v5") == ("gymnasium", "HalfCheetah-v5")
    assert registry.resolve("CartPole-v0") == ("gymnasium", "CartPole-v0")
    with pytest.raises(ConfigError, match=r"'HalfCheetah-v5' is an environment of gymnasium, which cannot be compiled"):
        registry.make("HalfCheetah-v5")


def test_the_sixteen_and_the_list_import_no_library():
    code = (
        "import sys; from eggroll.rl.envs import registry; [registry.resolve(name) for name in registry.PAPER]; "
        "registry.listing(); print(sorted({'jax', 'gymnasium', *registry.LIBRARIES} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kinetix", None)
    rows = registry.listing()
    assert [row.name for row in rows] == list(registry.PAPER)
    assert rows[10] == ("kinetix/l/hard_pinball", "kinetix", install_line("kinetix"))


# errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", r"'CartPol-v1' is no environment.* Did you mean CartPole-v1.*\? 'eggroll rl --list' shows"),
        ("nvix-DoorKey-8x8", r"'nvix-DoorKey-8x8' is no environment.* Did you mean navix/Navix-DoorKey-8x8-v0"),
        ("Humanoid-v99", r"'Humanoid-v99' is no environment.* Did you mean brax/humanoid"),
        ("what/is-this", r"'what/is-this' is no environment.*\. 'eggroll rl --list' shows the names"),
        ("", r"'' is no environment"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        registry.resolve(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("navix-DoorKey-8x8-v1", r"is no environment of navix. Did you mean navix/Navix-DoorKey-8x8-v0 or "),
        ("jumanji/Snak", r"'jumanji/Snak' is no environment of jumanji. Did you mean jumanji/Snake-v1\? 'eggroll rl"),
        ("kinetix/h1_car_left", r"fits several environments of kinetix: l/h1_car_left, m/h1_car_left; give the whole"),
    ],
)
def test_unknown_names_of_a_library(name, message):
    pytest.importorskip(name.replace("/", "-").partition("-")[0])
    with pytest.raises(ConfigError, match=message):
        registry.resolve(name)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"'speed' is no option of brax; allowed: backend"):
        registry.make("brax/ant?speed=9")
    with pytest.raises(ConfigError, match=r"backend='bullet' is not possible; allowed: generalized, spring, "):
        registry.make("brax/ant", backend="bullet")
    with pytest.raises(ConfigError, match=r"(?s)has 2 problems:.*'a' is no option of navix; it has none"):
        registry.make("navix-FourRooms?a=1&b=2")


def test_brax_without_the_backend():
    pytest.importorskip("brax")
    with pytest.raises(ConfigError, match=r"swimmer of brax cannot run with backend='spring': Unsupported backend"):
        registry.make("brax/swimmer?backend=spring")


def test_a_missing_library_says_what_installs_it(monkeypatch):
    for library in ("navix", "kinetix"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"'navix' is needed here .*pip install .*\[rl\]"):
        registry.make("navix/Navix-FourRooms-v0")
    with pytest.raises(MissingExtraError, match=r"'kinetix' is needed .*pip install .*\[kinetix\]"):
        registry.resolve("kinetix/s/some_level")


# promises


@pytest.mark.parametrize("name", SIXTEEN)
def test_shapes_and_dtypes(name):
    env = make(name)
    obs_size, actions, max_steps = SIXTEEN[name]
    assert (env.name, env.obs_size, env.max_steps) == (name, obs_size, max_steps)
    if isinstance(env.actions, Continuous):
        assert env.actions.size == actions
        assert env.actions.low.dtype == env.actions.high.dtype == np.float32
        bound = 2 if name == "Pendulum-v1" else 1
        assert (env.actions.low == -bound).all()
        assert (env.actions.high == bound).all()
    else:
        assert env.actions == actions

    key = jax.random.key(0)
    first, start = jax.eval_shape(env.reset, key)
    assert (start.shape, start.dtype) == ((obs_size,), jnp.float32)
    if name.startswith(("kinetix/m", "kinetix/l")):
        return  # tracing a step takes many seconds, and the small level's is the same code
    action = jax.eval_shape(lambda key: random_actions(env, key), key)
    second, observation, reward, done = jax.eval_shape(env.step, key, first, action)
    assert (observation.shape, observation.dtype) == ((obs_size,), jnp.float32)
    assert (reward.shape, reward.dtype, reward.weak_type) == ((), jnp.float32, False)
    assert (done.shape, done.dtype) == ((), bool)
    # a state goes through lax.scan
    before, after = ([(x.shape, x.dtype) for x in jax.tree.leaves(state)] for state in (first, second))
    assert before == after


@pytest.mark.parametrize("name", CHEAP)
def test_runs(name):
    env = make(name)
    # 4000 steps of Snake hit the wall long before
    steps = min(env.max_steps, 200)
    first, observations, rewards, dones = run(env, steps=steps)
    assert np.isfinite(first).all()
    assert np.isfinite(observations[:20]).all()
    assert np.isfinite(rewards[:20]).all()
    assert len(np.unique(observations[0], axis=0)) > 1, "episodes of different keys are the same"
    assert (observations[1] != first).any()
    if name != "jumanji/Game2048-v1":
        assert dones.any(axis=0).all()
    if name == "Pendulum-v1":
        assert dones[-1].all()
        assert not dones[:-1].any()


def test_the_adapters_own_time_limit():
    """One direction for ever ends in illegal moves, which Jumanji lets go on for ever."""
    env = make("jumanji/Game2048-v1")
    dones = run(env, steps=env.max_steps, action=0)[-1]
    assert dones[-1].all()
    assert not dones[:-1].any()


@pytest.mark.slow
def test_brax_runs():
    pytest.importorskip("brax")
    env = registry.make("brax-inverted_double_pendulum", backend="spring")
    assert env.name == "brax/inverted_double_pendulum?backend=spring"
    env.max_steps = 4
    _, observations, rewards, dones = run(env, steps=10)
    assert np.isfinite(observations).all()
    assert (rewards[:3] > 5).all(), "every step upright gives almost 10"
    assert not dones[:3].any()
    assert dones[3:].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["craftax-classic", "kinetix-h1_thrust_over_ball"])
def test_heavy_ones_run(name):
    first, observations, rewards, _ = run(
        make(registry.PAPER[5] if "craftax" in name else registry.PAPER[12]), steps=10
    )
    assert np.isfinite(observations).all()
    assert np.isfinite(rewards).all()
    assert (observations[-1] != first).any(axis=-1).all()


def test_the_steps_are_those_of_gymnax():
    """The adapter calls what is below gymnax's step; until an episode ends, both are the same."""
    gymnax = pytest.importorskip("gymnax")
    own, params = gymnax.make("CartPole-v1")
    env = make("CartPole-v1")
    key = jax.random.key(1)
    (state, observation), (expected, theirs) = env.reset(key), own.reset(key, params)
    np.testing.assert_array_equal(observation, expected)
    for action in [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        state, observation, reward, done = env.step(key, state, jnp.int32(action))
        _, theirs, expected_reward, terminated, _, info = own.step(key, theirs, action, params)
        np.testing.assert_allclose(observation, info["final_observation"], rtol=1e-4, atol=1e-6)
        assert (float(reward), bool(done)) == (float(expected_reward), bool(terminated))
        if done:
            return
    pytest.fail("the pole never fell")


def test_the_steps_are_those_of_navix():
    """The adapter calls what is below NAVIX's step; until an episode ends, both are the same."""
    navix = pytest.importorskip("navix")
    env, own = make("navix/Navix-Empty-5x5-v0"), navix.make("Navix-Empty-5x5-v0")

    def both(key):
        (state, _), theirs = env.reset(key), own.reset(key)

        def body(states, key):
            action = jax.random.randint(key, (), 0, 7)
            state, *mine = env.step(key, states[0], action)
            theirs = own.step(states[1], action)
            return (state, theirs), (mine, [theirs.observation.ravel(), theirs.reward, theirs.is_done()])

        return jax.lax.scan(body, (state, theirs), jax.random.split(key, 100))[1]

    mine, theirs = jax.jit(jax.vmap(both, out_axes=1), compiler_options=QUICK)(jax.random.split(jax.random.key(0), 4))
    alive = np.cumsum(theirs[2], axis=0) - theirs[2] == 0
    for left, right in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(left)[alive], np.asarray(right)[alive])
    assert np.asarray(theirs[2]).any()


def test_observations_hold_all_fields_of_jumanji():
    jumanji = pytest.importorskip("jumanji")
    key = jax.random.key(5)
    _, observation = jax.jit(make("jumanji/Snake-v1").reset)(key)
    fields = jax.jit(jumanji.make("Snake-v1").reset)(key)[1].observation
    expected = [fields.grid.ravel(), fields.step_count[None], fields.action_mask]
    np.testing.assert_array_equal(observation, np.concatenate([np.asarray(x, np.float32) for x in expected]))


def test_kinetix_with_continuous_actions():
    pytest.importorskip("kinetix")
    env = registry.make("kinetix-h1_thrust_over_ball?actions=continuous")
    assert env.name == "kinetix/s/h1_thrust_over_ball?actions=continuous"
    np.testing.assert_array_equal(env.actions.low, [-1, -1, -1, -1, 0, 0])
    np.testing.assert_array_equal(env.actions.high, np.ones(6))


# pictures


def episode_of(name, steps):
    env = make(name)
    states = [jax.jit(env.reset)(jax.random.key(0))[0]]
    step = jax.jit(env.step)
    for i in range(steps):
        key = jax.random.key(i)
        states.append(step(key, states[-1], random_actions(env, key))[0])
    return env, states


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "navix/Navix-Empty-5x5-v0", "jumanji/Knapsack-v1"])
def test_render(name, tmp_path):
    image = pytest.importorskip("PIL.Image")
    env, states = episode_of(name, 3)
    path = env.render(states, tmp_path / "best" / "step-1.5")
    assert path == tmp_path / "best" / "step-1.5.gif"
    with image.open(path) as picture:
        # equal pictures in a row become one
        assert 2 <= picture.n_frames <= 4
        assert min(picture.size) >= 200


def test_what_cannot_be_drawn_is_none(tmp_path, monkeypatch):
    pytest.importorskip("gymnax")
    env, states = episode_of("gymnax/Reacher-misc", 1)
    assert env.render(states, tmp_path / "a") is None
    env, states = episode_of("CartPole-v1", 1)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert env.render(states, tmp_path / "a") is None
    assert list(tmp_path.iterdir()) == []


def test_long_episodes_are_thinned():
    assert _common.frames_of([1, 2, 3]) == [1, 2, 3]
    frames = _common.frames_of(list(range(10_000)))
    assert (len(frames), frames[0], frames[-1]) == (_common.MAX_FRAMES, 0, 9_999)
