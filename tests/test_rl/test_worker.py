"""What evolves: any range of members on any replica, statistics that travel with updates, pools of workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from toys import SPACES, Chase  # noqa: E402

from eggroll.core import oracle  # noqa: E402
from eggroll.core.records import UpdateRecord  # noqa: E402
from eggroll.distributed import LocalPool  # noqa: E402
from eggroll.distributed.crew import WorkerWarning  # noqa: E402
from eggroll.errors import CheckpointError, ConfigError  # noqa: E402
from eggroll.loop import Loop  # noqa: E402
from eggroll.rl import PolicyWorker, RLConfig, make_worker  # noqa: E402
from eggroll.rl.policies import forward  # noqa: E402

SIZE = 16
QUICK = {"population_size": SIZE, "hidden": 8, "layers": 1, "lr": 0.1, "sigma": 0.3, "optimizer": "adam"}
ALL = range(SIZE)


def toy_worker(env=None, **settings):
    return make_worker(RLConfig(env="toy/Chase", **{**QUICK, **settings}), env or Chase())


def generation(worker, number, sigma=0.3):
    """Evaluate all members and take the update; the record."""
    found = worker.evaluate(number, sigma, ALL)
    record = UpdateRecord.make(number, sigma, 0.1, worker.strategy.config.shape(found.fitness), found.totals)
    worker.apply(record)
    return record


def assert_equal(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


@pytest.fixture(scope="module", params=["jax", "gymnasium"])
def fresh(request):
    """Makes workers that share what is compiled, as replicas in other processes would have it."""
    if request.param == "jax":
        # Parts of three pairs: a range of all has a last part that is filled up with pairs that do not play.
        first = toy_worker(members_per_forward=6)
    else:
        pytest.importorskip("gymnasium")
        first = make_worker(RLConfig(env="gymnasium/CartPole-v1", max_steps=25, **QUICK, members_per_forward=6))
    params = first.state.params
    return lambda kind=PolicyWorker: kind(first.strategy, first.rollouts, params, eval_episodes=4)


def test_ranges_add_up_to_the_whole(fresh):
    worker = fresh()
    generation(worker, 0)  # with statistics to be relative to
    ranges = (range(4), range(4, 6), range(6, SIZE))
    whole, parts = worker.evaluate(1, 0.3, ALL), [worker.evaluate(1, 0.3, members) for members in ranges]
    np.testing.assert_allclose(np.concatenate([part.fitness for part in parts]), whole.fitness, rtol=1e-5)
    assert whole.totals["env_steps"] == sum(part.totals["env_steps"] for part in parts) > 0
    for name in set(whole.totals) - {"env_steps"}:
        added = sum(part.totals[name] for part in parts)
        assert added.shape == whole.totals[name].shape != ()
        np.testing.assert_allclose(added, whole.totals[name], rtol=1e-4, atol=1e-3)
    again = worker.evaluate(1, 0.3, ranges[0])
    np.testing.assert_array_equal(again.fitness, parts[0].fitness)
    assert_equal(again.totals, parts[0].totals)


def test_apply_from_a_state_equals_apply_in_sequence(fresh):
    one, other = fresh(), fresh()
    generation(one, 0)
    state = {name: np.array(value) for name, value in one.state_tensors().items()}
    record = generation(one, 1)
    other.load_state_tensors(state)
    assert_equal(other.state_tensors(), state)
    other.apply(record)
    assert_equal(one.state_tensors(), other.state_tensors())
    assert one.heldout(2) == other.heldout(2)
    assert 0 < float(one.stats.count) <= one.env_steps


def test_an_evaluation_leaves_nothing_behind(fresh):
    worker = fresh()
    before = worker.state_tensors()
    worker.evaluate(0, 0.3, range(2))
    assert_equal(worker.state_tensors(), before)


def test_a_state_that_does_not_fit(fresh):
    worker = fresh()
    state = worker.state_tensors()
    del state["stats/mean"], state["env_steps"]
    with pytest.raises(CheckpointError, match="stats/mean is missing; env_steps is missing"):
        worker.load_state_tensors(state)
    assert worker.env_steps == 0


def test_the_number_of_workers_and_a_death_change_nothing(fresh):
    config, ends = fresh().strategy.config, []
    pools = []

    class Fatal(PolicyWorker):
        """In the middle of the second generation, another worker dies."""

        def evaluate(self, generation, sigma, members):
            if generation == 1 and len(pools[-1].workers()) == 3 and members.start == 6:
                pools[-1].kill(pools[-1].workers()[-1]["number"])
            return super().evaluate(generation, sigma, members)

    for workers in (1, 2):
        with LocalPool(fresh, workers=workers, population_size=SIZE) as pool:
            history = Loop(type(config)(**{**config.to_dict(), "generations": 3}), pool).go()
            ends.append(pool.state_tensors())
            assert history[-1]["env_steps"] == int(ends[-1]["env_steps"]) > 0
    with LocalPool(lambda: fresh(Fatal), workers=3, population_size=SIZE) as pool:
        pools.append(pool)
        with pytest.warns(WorkerWarning, match="is gone"):
            Loop(type(config)(**{**config.to_dict(), "generations": 3}), pool).go()
        ends.append(pool.state_tensors())
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


@pytest.mark.parametrize("kind", SPACES)
def test_members_returns_are_those_of_their_materialized_policies(kind):
    env = Chase(SPACES[kind])
    worker = toy_worker(env, population_size=4, episodes=3, members_per_forward=2)
    params, rollouts = worker.state.params, worker.rollouts
    totals = worker.evaluate(0, 0.3, range(4)).totals
    worker.apply(UpdateRecord.make(0, 0.3, 0.0, np.zeros(4, np.float32), totals))
    fitness = worker.evaluate(1, 0.3, range(4)).fitness
    for member in range(4):
        twin = {}
        for leaf in rollouts.leaves(params):
            noise = oracle.perturbation(leaf.spec, member, rank=worker.strategy.config.rank, seed=0, generation=1)
            twin[leaf.name] = 0.3 * noise.reshape(leaf.shape)
        own = {
            name: {part: value + jnp.asarray(twin[f"{name}.{part}"], jnp.float32) for part, value in layer.items()}
            for name, layer in params.items()
        }
        alone = rollouts.play(lambda x, own=own: forward(own, x), rollouts.keys(1, member // 2), worker.stats)
        np.testing.assert_allclose(fitness[member], alone.returns.mean(), atol=1e-4)
    assert totals["env_steps"] == worker.env_steps == 4 * 3 * env.max_steps


@pytest.mark.parametrize("lost", [float("nan"), 3e38])
def test_observations_that_are_no_numbers_do_not_spoil_the_statistics(lost):
    worker = toy_worker(Chase(lost=lost))
    for number in range(2):
        generation(worker, number)
        assert 0 < worker.stats.count < worker.env_steps
        assert all(np.isfinite(value).all() for value in jax.tree.leaves(worker.stats))
        assert float(worker.stats.mean[0]) < 0.5


@pytest.mark.parametrize("members_per_forward", [6, pytest.param(10, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_members_at_once(members_per_forward):
    """Eight pairs in parts of three and five: the last part is filled up with pairs that do not play."""
    found = []
    for at_once in (0, members_per_forward):
        worker = toy_worker(members_per_forward=at_once)
        weights = generation(worker, 0).weights
        found.append((weights, worker.env_steps, worker.stats.count, worker.stats.mean))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert found[0][1] == 16 * 12  # an episode of 12 steps for each member


def test_devices_and_workers_exclude_each_other():
    with pytest.raises(ConfigError, match=r"devices \(=2\) and workers \(=3\) both share the members; use one of them"):
        toy_worker(devices=2, workers=3)


SHARDED = """
import sys, jax, numpy as np
sys.path.insert(0, {folder!r})
from toys import Chase
from eggroll.core.records import UpdateRecord
from eggroll.rl import RLConfig, make_worker
results = []
for devices in (1, 2):
    config = RLConfig(env="toy/Chase", population_size=16, hidden=8, layers=1, members_per_forward=4, devices=devices)
    worker = make_worker(config, Chase())
    for generation in range(2):
        found = worker.evaluate(generation, 0.3, range(16))
        worker.apply(UpdateRecord.make(generation, 0.3, 0.1, found.fitness.astype(np.float32), found.totals))
    results.append([found.fitness, *worker.state_tensors().values()])
for one, two in zip(*results, strict=True):
    np.testing.assert_array_equal(one, two)
print("equal")
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    code = SHARDED.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


class Mortal(Chase):
    """Ends at once for most episodes, after many steps for some, and never for a few: decided by the start."""

    def step(self, key, state, action):
        state, observation, reward, done = super().step(key, state, action)
        life = jnp.where(state[1] < 0.6, 2, jnp.where(state[1] < 0.9, 9, self.max_steps))
        return state, observation, reward, done | (state[2] >= life)


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [("discrete", 256), *(pytest.param(kind, 64, marks=pytest.mark.slow) for kind in SPACES)],
)
def test_episodes_that_last_longer_go_on_in_smaller_batches(kind, pairs, monkeypatch):
    """Returns, lengths and statistics are those of one batch that goes on until its last episode is over."""
    settings = {"population_size": 2 * pairs, "members_per_forward": 2 * pairs, "episodes": 1}
    worker = toy_worker(Mortal(SPACES[kind], limit=40), **settings)
    rollouts, given = worker.rollouts, (worker.state.params, worker.stats, 0, 0.3, np.arange(pairs))
    widths = []
    play_on = type(rollouts)._play_on

    def watched(self, network, own, stats, carry, enough):
        widths.append((len(own), enough))
        return play_on(self, network, own, stats, carry, enough)

    monkeypatch.setattr(type(rollouts), "_play_on", watched)
    narrowed = rollouts.population(*given)
    assert widths == {64: [(128, 32), (32, 0)], 256: [(512, 128), (128, 32), (32, 0)]}[pairs]
    lengths = np.asarray(narrowed.lengths)
    assert (lengths.min(), lengths.max()) == (2, 40)
    assert 0 < (lengths > 9).sum() < 2 * pairs // 4
    monkeypatch.setattr("eggroll.rl.rollouts._widths", lambda count: [count])
    whole = toy_worker(Mortal(SPACES[kind], limit=40), **settings).rollouts.population(*given)
    for name in ("lengths", "count"):
        np.testing.assert_array_equal(getattr(narrowed, name), getattr(whole, name))
    for name in ("returns", "total", "squares"):
        np.testing.assert_allclose(getattr(narrowed, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_however_many_go_on_none_is_lost(share):
    """Also when more go on than the smaller batch holds until the limit of steps, or none at all."""

    class Either(Chase):
        def step(self, key, state, action):
            state, observation, reward, done = super().step(key, state, action)
            return state, observation, reward, done | (state[1] > 2 * share - 1)

    worker = toy_worker(Either(limit=7), population_size=128, episodes=1)
    played = worker.rollouts.population(worker.state.params, worker.stats, 0, 0.3, np.arange(64))
    goals = [
        float(worker.rollouts.env.reset(jax.random.split(key)[0])[0][1])
        for pair in range(64)
        for key in worker.rollouts.keys(0, pair)[:1]
    ]
    expected = np.where(np.array(goals) > 2 * share - 1, 1, 7)
    np.testing.assert_array_equal(np.asarray(played.lengths)[:, 0, 0], expected)
    np.testing.assert_array_equal(np.asarray(played.lengths)[:, 1, 0], expected)


@pytest.mark.parametrize(("noiser", "expected"), [("eggroll", [(128, 32), (32, 0)]), ("openes", [(128, 0)])])
def test_dense_noise_is_not_copied_for_many_episodes(noiser, expected, monkeypatch):
    worker = toy_worker(Mortal(limit=9), population_size=32, episodes=4, noiser=noiser)
    widths = []

    def watched(self, network, own, stats, carry, enough):
        widths.append((len(own), enough))
        return carry

    monkeypatch.setattr(type(worker.rollouts), "_play_on", watched)
    worker.rollouts.population(worker.state.params, worker.stats, 0, 0.3, np.arange(16))
    assert widths == expected
