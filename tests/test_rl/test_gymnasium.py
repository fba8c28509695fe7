"""Environments of Gymnasium: every space in its own shape and dtype, and what an environment can do wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
gymnasium = pytest.importorskip("gymnasium")
from gymnasium import spaces  # noqa: E402

from eggroll.cli.main import main  # noqa: E402
from eggroll.errors import ConfigError, RewardError  # noqa: E402
from eggroll.rl import RLConfig, make_worker  # noqa: E402
from eggroll.rl.envs.base import Continuous, Discrete, MultiDiscrete  # noqa: E402
from eggroll.rl.envs.gymnasium_env import GymnasiumEnvironment  # noqa: E402
from eggroll.rl.envs.gymnasium_spaces import check_observations, flatten, own_actions, policy_actions  # noqa: E402
from eggroll.rl.policies import act  # noqa: E402

QUICK = {"population_size": 4, "hidden": 8, "layers": 1, "eval_episodes": 2, "lr": 0.1, "sigma": 0.3, "rank": 1}
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64)
BOX = {
    "of one number": spaces.Box(-2.0, 2.0),
    "scalar": spaces.Box(-1.0, 1.0, ()),
    "of shape (2, 3)": spaces.Box(np.arange(6.0).reshape(2, 3), np.arange(1.0, 7.0).reshape(2, 3), dtype=np.float64),
    "not in float32": spaces.Box(0.1, 0.7, (2, 2), np.float64),
    "of a point": spaces.Box(0.3, 0.3, (2,), np.float64),
    "bools": spaces.Box(0, 1, (3,), np.bool_),
    **{f"{dtype.__name__} around 0": spaces.Box(0, 5, (2, 1), dtype) for dtype in INTEGERS},
    **{f"all of {dtype.__name__}": spaces.Box(
        np.full(2, np.iinfo(dtype).min), np.full(2, np.iinfo(dtype).max), dtype=dtype) for dtype in INTEGERS},
    **{f"{dtype.__name__}": spaces.Box(-0.1, 3.3, (1, 2), dtype) for dtype in FLOATS},
}  # fmt: skip
CHOICES = {
    "Discrete": spaces.Discrete(3),
    "Discrete from 1": spaces.Discrete(3, start=1),
    "Discrete from -1": spaces.Discrete(3, start=-1),
    "Discrete of int8": spaces.Discrete(100, start=-50, dtype=np.int8),
    "Discrete of uint8": spaces.Discrete(5, start=250, dtype=np.uint8),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiDiscrete from 5": spaces.MultiDiscrete([3, 2], start=[5, -5]),
    "MultiDiscrete of two dimensions": spaces.MultiDiscrete([[3, 2], [4, 5]], start=[[1, 2], [3, 4]]),
    "MultiDiscrete of uint8": spaces.MultiDiscrete([3, 2], dtype=np.uint8, start=[200, 0]),
    "MultiBinary": spaces.MultiBinary(3),
    "MultiBinary of two dimensions": spaces.MultiBinary([2, 3]),
}
USABLE = BOX | CHOICES
NEITHER = {
    "Tuple": spaces.Tuple([spaces.Discrete(2)]),
    "Dict": spaces.Dict(a=spaces.Discrete(2)),
    "Text": spaces.Text(3),
    "Sequence": spaces.Sequence(spaces.Discrete(2)),
    "Graph": spaces.Graph(spaces.Box(0, 1), None),
    "OneOf": spaces.OneOf([spaces.Discrete(2)]),
    "Box": spaces.Box(0, 1, (0,)),
}
NO_ACTIONS = NEITHER | {
    "Box(-inf, inf": spaces.Box(-np.inf, np.inf, (2,)),
    "Box(0.0, inf": spaces.Box(0, np.inf, (2,), np.float64),
    "Box(-9223372036854775808": spaces.Box(-np.inf, np.inf, (2,), np.int64),
    "Box(-3.4": spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
    "Box(-1.7": spaces.Box(np.finfo(np.float64).min, np.finfo(np.float64).max, (2,), np.float64),
}


class Spaces(gymnasium.Env):
    """Keeps what it is told; ``wrong`` happens in a method of it, and the reward is for one of its actions."""

    told: list = []  # noqa: RUF012

    def __init__(self, actions=None, observations=None, wrong=None, best=None):
        self.action_space = actions or spaces.Discrete(2)
        self.observation_space = observations or spaces.Box(-1, 1, (2,))
        self.wrong, self.best = wrong or {}, best

    def _may(self, method):
        if method in self.wrong:
            found = self.wrong[method]
            if isinstance(found, BaseException):
                raise found
            return found
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self._may("reset"), {}

    def step(self, action):
        Spaces.told.append(action)
        self.steps += 1
        reward = 0.0 if self.best is None else float(action == self.best)
        return self._may("step"), self.wrong.get("reward", reward), self.steps >= 3, False, {}

    def close(self):
        if "close" in self.wrong:
            raise self.wrong["close"]


@pytest.fixture
def registered():
    """Registers :class:`Spaces`, or another entry point, with arguments."""

    def register(entry_point=Spaces, **kwargs):
        gymnasium.register("EggrollSpaces-v0", entry_point=entry_point, kwargs=kwargs, disable_env_checker=True)
        Spaces.told.clear()
        return "gymnasium/EggrollSpaces-v0"

    yield register
    gymnasium.registry.pop("EggrollSpaces-v0", None)


def same_kind(one, other):
    return type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape


@pytest.mark.parametrize("kind", USABLE)
def test_every_action_is_one_of_the_space(kind):
    space = USABLE[kind]
    known = policy_actions(space, "x")
    outputs = 40.0 * jax.random.normal(jax.random.key(0), (64, known.num_outputs))
    chosen = jax.vmap(lambda row: act(row, known, None))(outputs)
    found = own_actions(space, chosen)
    assert len(found) == 64
    assert all(space.contains(action) for action in found)
    assert all(same_kind(action, space.sample()) for action in found)
    if isinstance(known, Continuous):  # both ends are reached
        tolerance = 1e-6 if np.issubdtype(space.dtype, np.floating) else 0  # policies compute in float32
        for end, bound in ((np.min, space.low), (np.max, space.high)):
            np.testing.assert_allclose(end(found, axis=0), bound, rtol=tolerance)


@pytest.mark.parametrize("kind", CHOICES)
def test_every_choice_can_be_made(kind):
    space = CHOICES[kind]
    known = policy_actions(space, "x")
    nums = [known.num] if isinstance(known, Discrete) else list(known.nums)
    ends = [own_actions(space, [end if isinstance(known, MultiDiscrete) else end[0]])[0]
            for end in ([0] * len(nums), [num - 1 for num in nums])]  # fmt: skip
    first = getattr(space, "start", 0)
    assert (np.asarray(ends[0]) == first).all()
    assert (np.asarray(ends[1]).ravel() == np.ravel(first) + np.array(nums) - 1).all()
    assert all(space.contains(end) for end in ends)


@pytest.mark.parametrize("kind", USABLE)
def test_every_observation_is_a_row_of_numbers(kind):
    space = USABLE[kind]
    space.seed(0)
    samples = [space.sample() for _ in range(50)]
    rows = flatten(space, np.stack(samples))
    assert (rows.shape, rows.dtype) == ((50, check_observations(space, "x")), np.float32)
    expected = np.stack([np.ravel(spaces.flatten(space, sample)) for sample in samples]).astype(np.float32)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("kind", NO_ACTIONS)
def test_actions_that_policies_cannot_give_are_refused_by_name(registered, kind):
    name = registered(actions=NO_ACTIONS[kind])
    with pytest.raises(ConfigError, match=re.escape(f"has actions {kind}")):
        GymnasiumEnvironment.make(name)


@pytest.mark.parametrize("kind", NEITHER)
def test_observations_that_policies_cannot_read_are_refused_by_name(registered, kind):
    name = registered(observations=NEITHER[kind])
    with pytest.raises(ConfigError, match=re.escape(f"has observations {kind}")):
        GymnasiumEnvironment.make(name)


@pytest.mark.parametrize(
    "kind",
    ["scalar", "of shape (2, 3)", "int64 around 0", "bools", "Discrete from 1", "MultiDiscrete of two dimensions",
     "MultiBinary of two dimensions"],
)  # fmt: skip
def test_episodes_with_every_space(registered, kind):
    space = USABLE[kind]
    worker = make_worker(RLConfig(env=registered(actions=space, observations=space), **QUICK))
    assert worker.evaluate(0, 0.3, range(4)).totals["env_steps"] == 4 * 3
    assert len(Spaces.told) >= 12
    assert all(space.contains(action) and same_kind(action, space.sample()) for action in Spaces.told)


def test_the_last_of_three_choices_from_1_is_found(registered):
    name = registered(actions=spaces.Discrete(3, start=1), observations=spaces.Discrete(2, start=5), best=3)
    worker = make_worker(RLConfig(env=name, deterministic=False, **QUICK))
    assert worker.evaluate(0, 0.3, range(4)).fitness.max() > 0


def run(capsys, env, folder, *more):
    """Exit code and the error of a short run."""
    status = main(["rl", "--env", env, "-g", "1", "-p", "4", "--hidden", "8", "--layers", "1", "--eval-episodes", "2",
                   "--report-to", "none", "-o", str(folder / "run"), *more])  # fmt: skip
    return status, " ".join(capsys.readouterr().err.split())


class Needs(Spaces):
    """Cannot be made from its name alone."""

    def __init__(self, size, *, depth):
        raise AssertionError("never called with what it needs")


def ends():
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("env", "entry_point", "text"),
    [
        ("gymnasium/nomodule:Foo-v0", None, "no module named 'nomodule'; 'nomodule' is imported for the id. Install"),
        ("gymnasium/json.no:Foo-v0", None, "no module named 'json.no'"),
        ("gymnasium/json:Foo-v0", None, "cannot make json:Foo-v0: Environment `Foo` doesn't exist."),
        ("gymnasium/a:b:c", None, "at most one colon, between a module and the id that it registers: module:Name-v0"),
        ("gymnasium/CartPole-v1?size=3", None, "environments of gymnasium take no options here; register an id"),
        (None, "nomodule:Foo", "it needs a module that is not installed: no module named 'nomodule'"),
        (None, "json:Foo", "it raised AttributeError: module 'json' has no attribute 'Foo'"),
        (None, Needs, "its constructor needs 'size'. Register an id that gives what it needs: gymnasium.register("),
        (None, dict, "it raised TypeError: The environment must inherit from the gymnasium.Env class"),
        (None, ends, "it raised SystemExit: 0"),
        (None, lambda: Spaces(wrong={"close": OSError("still open")}), "it raised OSError: still open"),
    ],
)
def test_environments_that_cannot_be_made(registered, tmp_path, capsys, env, entry_point, text):
    status, said = run(capsys, env or registered(entry_point), tmp_path)
    assert status == 1
    assert "Traceback" not in said
    assert text in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"step": ValueError("half\nway")}, "step raised ValueError: half way"),
        ({"step": SystemExit(0)}, "step raised SystemExit: 0"),
        ({"reset": KeyError("seed")}, "reset raised KeyError: 'seed'"),
        ({"reward": "much"}, "step raised ValueError: could not convert string to float: 'much'"),
        ({"step": np.zeros(7)}, "step raised ValueError: "),
    ],
)
def test_environments_that_raise(registered, tmp_path, capsys, wrong, text):
    status, said = run(capsys, registered(wrong=wrong), tmp_path)
    assert status == 1
    assert "Traceback" not in said
    assert f"error: gymnasium/EggrollSpaces-v0: {text}" in said
    assert "test_gymnasium.py, line" in said or "reward" in wrong or np.ndim(wrong.get("step")) == 1
    assert "continue it: eggroll rl --resume" in said


@pytest.mark.parametrize("seen", [-1, 3])
def test_an_observation_outside_of_its_space(registered, seen):
    name = registered(observations=spaces.Discrete(3), wrong={"step": seen})
    worker = make_worker(RLConfig(env=name, **QUICK))
    with pytest.raises(RewardError, match=rf"step raised ValueError: the observation {seen} is not in Discrete\(3\)"):
        worker.heldout(0)
