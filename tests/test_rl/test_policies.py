"""Policies, the statistics of their observations, and the settings: presets and the paper's scale."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from toys import SPACES  # noqa: E402

import eggroll.rl  # noqa: E402
from eggroll.core.settings import may_change  # noqa: E402
from eggroll.errors import ConfigError  # noqa: E402
from eggroll.rl.config import RLConfig  # noqa: E402
from eggroll.rl.envs import registry  # noqa: E402
from eggroll.rl.envs.base import Continuous, Discrete, MultiDiscrete  # noqa: E402
from eggroll.rl.policies import ObsStats, act, forward, init_policy  # noqa: E402
from eggroll.rl.presets import PRESETS  # noqa: E402


def test_public_names():
    assert dir(eggroll.rl) == [
        "Continuous",
        "Discrete",
        "Environment",
        "MultiDiscrete",
        "PolicyWorker",
        "RLConfig",
        "make_worker",
        "train",
    ]
    assert all(getattr(eggroll.rl, name) is not None for name in dir(eggroll.rl))


def test_statistics_merge_like_those_of_all_observations():
    rows = np.random.default_rng(0).normal(3.0, [1.0, 50.0, 0.01], (400, 3)).astype(np.float32)
    merged = ObsStats.empty(3)
    for part in np.split(rows, [1, 100, 250]):
        shift = np.asarray(merged.mean)
        moved = part - shift
        merged = merged.merge(ObsStats.of_sums(jnp.float32(len(part)), moved.sum(0), (moved**2).sum(0), merged.mean))
    assert float(merged.count) == 400
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged.m2 / 400, rows.astype(np.float64).var(0), rtol=1e-3)
    np.testing.assert_allclose(merged.normalize(rows), (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5), atol=2e-2)
    np.testing.assert_array_equal(ObsStats.empty(3).normalize(rows), rows)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("sampling", [False, True])
def test_actions_of_every_kind(kind, sampling):
    space = SPACES[kind]
    params = init_policy(jax.random.key(0), 3, space, hidden=8, layers=2, sampling=sampling)
    outputs = forward(params, jnp.array([[0.1, -2.0, 3.0], [1.0, 1.0, 1.0]]))
    for row in outputs:
        keys = [jax.random.key(i) for i in range(20)] if sampling else [None]
        actions = np.stack([np.asarray(act(row, space, key)) for key in keys])
        if isinstance(space, Continuous):
            assert actions.shape[1:] == (1,)
            assert np.abs(actions).max() <= 1.0
        elif isinstance(space, MultiDiscrete):
            assert set(actions.ravel()) <= {0, 1, 2}
            assert actions.shape[1:] == (2,)
        else:
            assert set(actions.ravel()) <= {0, 1}
        assert sampling == (len(np.unique(actions, axis=0)) > 1)
    if not sampling and isinstance(space, Discrete):
        assert int(act(jnp.array([0.0, 1.0]), space, None)) == 1


def test_continuous_actions_fill_their_range():
    space = Continuous(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
    np.testing.assert_allclose(act(jnp.array([50.0, -50.0]), space, None), [2.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(act(jnp.zeros(2), space, None), [0.0, 0.5], atol=1e-6)


def test_the_papers_scale_of_sgd():
    config = RLConfig(env="CartPole-v1").resolved("CartPole-v1")
    es = config.es()
    assert es.lr == pytest.approx(0.1 * 0.2 * 2048**0.5)
    assert es.lr_decay == pytest.approx(0.9995 * 0.999)
    assert RLConfig(env="Pendulum-v1").resolved("Pendulum-v1").es().lr == 0.01


def test_presets_are_those_of_the_papers_sixteen():
    assert tuple(PRESETS) == registry.PAPER


def test_what_may_change_on_resume():
    assert may_change(RLConfig()) == {
        "generations", "env_steps", "eval_every", "members_per_forward", "devices", "resume", "report_to",
        "workers", "ray_address", "worker_cpus", "worker_gpus", "accept_changes", "patience",
    }  # fmt: skip


def test_presets_depend_on_the_device_unless_one_is_named():
    """What solves CartPole on a CPU in minutes is no use on a GPU, and the other way round."""
    name = "CartPole-v1"
    small = RLConfig(env=name).resolved(name, cpu=True)
    assert (small.population_size, small.rank, small.optimizer, small.lr, small.sigma) == (128, 1, "adam", 0.02, 0.1)
    assert (small.lr_decay, small.sigma_decay, small.episodes, small.rank_transform) == (1.0, 1.0, 1, True)
    assert RLConfig(env=name).resolved(name, cpu=False).population_size == 2048
    assert RLConfig(env=name, preset="paper").resolved(name, cpu=True) == dataclasses.replace(
        RLConfig(env=name).resolved(name), preset="paper"
    )
    assert RLConfig(env=name, preset="small").resolved(name).population_size == 128
    assert RLConfig(env="brax/ant").resolved("brax/ant", cpu=True).lr == 0.005
    assert RLConfig(env=name, optimizer="sgd").resolved(name, cpu=True).lr == 0.2  # Adam's is no other rule's
    assert RLConfig(env=name, optimizer="sgd", lr=0.3).resolved(name, cpu=True).lr == 0.3
    with pytest.raises(ConfigError, match=r"preset \(='large'\) must be one of auto, paper, small"):
        RLConfig(env=name, preset="large").resolved(name)


def test_what_a_run_has_recorded_counts_more_than_the_device():
    """A run from a GPU goes on, and is replayed, on a CPU with its own values."""
    name = "CartPole-v1"
    recorded = RLConfig(env=name).resolved(name, cpu=False)
    assert recorded.resolved(name, cpu=True) == recorded
    assert recorded.preset == "auto"  # as in runs from before there were presets, so that these can be resumed


def test_a_learning_rate_is_shown_as_it_was_given_and_as_it_is_logged():
    name = "CartPole-v1"
    paper = RLConfig(env=name).resolved(name)
    assert paper.lr_text() == f"0.1 in the paper's scale (logged as {paper.es().lr:.4g})"
    assert RLConfig(env=name).resolved(name, cpu=True).lr_text() == "0.02"
