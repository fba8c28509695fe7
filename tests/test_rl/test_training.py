"""Policies, statistics and runs of ``eggroll rl``, on a toy environment and on Gymnasium."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from toys import SPACES, Chase  # noqa: E402

from eggroll.cli.main import main  # noqa: E402
from eggroll.core.fitness import NonFiniteFitnessWarning  # noqa: E402
from eggroll.core.records import UpdateRecord  # noqa: E402
from eggroll.errors import ConfigError, RunError  # noqa: E402
from eggroll.rl import trainer  # noqa: E402
from eggroll.rl.config import RLConfig  # noqa: E402
from eggroll.rl.envs import registry  # noqa: E402
from eggroll.rl.envs.base import Continuous, Discrete, MultiDiscrete  # noqa: E402
from eggroll.rl.policies import ObsStats, act, forward, init_policy  # noqa: E402
from eggroll.rl.presets import PRESETS  # noqa: E402
from eggroll.run.run_dir import RunDir  # noqa: E402

QUICK = {"pop_size": 16, "hidden": 8, "layers": 1, "lr": 0.1, "sigma": 0.3, "optimizer": "adam", "eval_episodes": 8}


@pytest.fixture
def toy(monkeypatch):
    """The registry knows one more environment."""
    resolve, make = registry.resolve, registry.make
    monkeypatch.setattr(registry, "resolve", lambda n: ("toy", n) if n.startswith("toy") else resolve(n))
    monkeypatch.setattr(registry, "make", lambda n, **k: Chase() if n.startswith("toy") else make(n, **k))


def run(directory, **settings):
    return trainer.train(RLConfig(env="toy/Chase", output=str(directory), **{**QUICK, "generations": 6, **settings}))


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


@pytest.mark.parametrize("kind", SPACES)
def test_members_returns_are_those_of_their_materialised_policies(kind):
    env = Chase(SPACES[kind])
    config = RLConfig(env="toy/Chase", **{**QUICK, "pop_size": 4, "episodes": 3, "members_per_forward": 2}).resolved(
        "toy/Chase"
    )
    learner = trainer.make_learner(config, env)
    first = learner.evaluate(0, 0.3)
    learner.stats = learner.stats.merge(learner._seen[0])
    played = learner._population((learner.state.params, learner.stats), jnp.int32(1), jnp.float32(0.3))
    from eggroll.core import oracle

    for member in range(4):
        twin = {}
        for leaf in learner.leaves:
            noise = oracle.perturbation(leaf.spec, member, rank=learner.config.rank, seed=0, generation=1)
            twin[leaf.name] = 0.3 * noise.reshape(leaf.shape)
        params = {
            name: {part: value + jnp.asarray(twin[f"{name}.{part}"], jnp.float32) for part, value in layer.items()}
            for name, layer in learner.state.params.items()
        }
        key = jax.random.fold_in(learner.rollouts._key(), 1)
        keys = jax.random.split(jax.random.fold_in(key, member // 2), 3)
        alone = learner.rollouts._play(lambda x, p=params: forward(p, x), keys, learner.stats)
        np.testing.assert_allclose(played.returns[member // 2, member % 2], alone.returns, atol=1e-4)
    assert first.metrics["env_steps"] == 4 * 3 * env.max_steps
    assert learner.env_steps == 0  # its update has not been taken


def test_a_run_improves_logs_draws_and_reports(toy, tmp_path, capsys):
    command = "rl --env toy/Chase --pop_size 64 --hidden 16 --layers 1 --lr 0.1 --sigma 0.3 --optimizer adam -g 25"
    status = main([*command.split(), "--eval-every", "5", "--report-to", "none", "-o", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert status == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["end_return"] > result["start_return"] / 2  # returns are negative distances
    assert result["env_steps"] == 25 * 64 * 12
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "episode.txt").exists()
    for piece in ("toy/Chase", "policy   98 parameters evolved", "end return", "episode.txt (return"):
        assert piece in text
    assert "updates.jsonl" in {path.name for path in (tmp_path / "run").iterdir()}


def test_resume_is_bit_for_bit(toy, tmp_path):
    whole = run(tmp_path / "whole", generations=7)
    run(tmp_path / "cut", generations=4)
    resumed = trainer.train(
        RLConfig(**{**_settings(tmp_path / "cut"), "generations": 7, "resume": str(tmp_path / "cut")})
    )
    for one, other in zip(jax.tree.leaves(whole.learner.state), jax.tree.leaves(resumed.learner.state), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(whole.learner.stats.mean, resumed.learner.stats.mean)
    assert whole.run.updates() == resumed.run.updates()
    assert whole.learner.env_steps == resumed.learner.env_steps


@pytest.mark.slow
def test_a_killed_run_plays_the_generations_after_its_checkpoint_again(toy, tmp_path):
    whole = run(tmp_path / "whole", generations=5)
    cut = run(tmp_path / "cut", generations=5)
    newest = sorted(cut.run.checkpoints.iterdir())[-1]
    (newest / "manifest.json").unlink()  # as if it had been killed before its last checkpoint
    resumed = trainer.train(RLConfig(**{**_settings(tmp_path / "cut"), "resume": str(tmp_path / "cut")}))
    for one, other in zip(jax.tree.leaves(whole.learner.state), jax.tree.leaves(resumed.learner.state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_replay_rebuilds_the_weights(toy, tmp_path, capsys):
    trained = run(tmp_path / "run", generations=3)
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert "generation 3 of 3, equal to its checkpoint, bit for bit" in capsys.readouterr().out
    stored = load_file(tmp_path / "run" / "replay-3" / "policy.safetensors")
    np.testing.assert_array_equal(stored["params/head/weight"], trained.learner.state.params["head"]["weight"])
    assert "stats/mean" in stored


def _settings(path):
    config = dict(RunDir.open(path).config)
    config.pop("kind")
    return config


def test_resume_refuses_other_settings(toy, tmp_path):
    run(tmp_path / "run", generations=1)
    settings = {**_settings(tmp_path / "run"), "resume": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"sigma: 0\.3 in the run, 0\.5 now"):
        trainer.train(RLConfig(**{**settings, "sigma": 0.5}))
    with pytest.raises(RunError, match="has 1 finished generations already; give more"):
        trainer.train(RLConfig(**{**settings, "generations": 0}))


def test_returns_that_are_not_a_number_count_as_the_worst(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "resolve", lambda n: ("toy", n))
    monkeypatch.setattr(registry, "make", lambda n, **k: Chase(spoil=True))
    with pytest.warns(NonFiniteFitnessWarning, match="scores were NaN or infinite"):
        trained = run(tmp_path / "run", generations=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.learner.state.params))
    assert sum(line.get("invalid_scores", 0) for line in trained.run.metrics()) > 0


@pytest.mark.parametrize("lost", [float("nan"), 3e38])
def test_observations_that_are_no_numbers_do_not_spoil_the_statistics(lost):
    config = RLConfig(env="toy/Chase", **QUICK).resolved("toy/Chase")
    learner = trainer.make_learner(config, Chase(lost=lost))
    for generation in range(2):
        record = UpdateRecord.make(generation, 0.3, 0.1, learner.evaluate(generation, 0.3).fitness.astype(np.float32))
        learner.apply(record)
        assert 0 < learner.stats.count < learner.env_steps
        assert all(np.isfinite(value).all() for value in jax.tree.leaves(learner.stats))
        assert float(learner.stats.mean[0]) < 0.5


@pytest.mark.parametrize("members_per_forward", [6, pytest.param(10, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_members_at_once(members_per_forward):
    """Eight pairs in parts of three and five: the last part is filled up with pairs that do not play."""
    found = []
    for at_once in (0, members_per_forward):
        config = RLConfig(env="toy/Chase", **QUICK, members_per_forward=at_once).resolved("toy/Chase")
        learner = trainer.make_learner(config, Chase())
        fitness = learner.evaluate(0, 0.3).fitness
        learner.apply(UpdateRecord.make(0, 0.3, 0.1, fitness.astype(np.float32)))
        found.append((fitness, learner.env_steps, learner.stats.count, learner.stats.mean))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert found[0][1] == 16 * 12  # an episode of 12 steps for each member


@pytest.mark.slow
def test_openes_is_the_same_run_with_dense_noise(toy, tmp_path):
    trained = run(tmp_path / "run", noiser="openes", generations=2)
    assert not any(leaf.low_rank for leaf in trained.learner.leaves)


@pytest.mark.slow
def test_a_budget_of_steps_ends_the_run(toy, tmp_path):
    trained = run(tmp_path / "run", generations=50, env_steps=16 * 12 * 3)
    assert trained.generation == 3
    ends = [line for line in trained.run.metrics() if line.get("event") == "end"]
    assert len(ends) == 1
    assert trained.result["end_return"] == ends[0]["heldout_reward"] != trained.result["start_return"]
    assert ends[0]["env_steps"] == trained.learner.env_steps
    settings = {**_settings(tmp_path / "run"), "resume": str(tmp_path / "run")}
    assert trainer.train(RLConfig(**settings)).generation == 3  # the budget is used up
    assert trainer.train(RLConfig(**{**settings, "env_steps": 16 * 12 * 4})).generation == 4


SHARDED = """
import sys, jax, numpy as np
sys.path.insert(0, {folder!r})
from toys import Chase
from eggroll.core.records import UpdateRecord
from eggroll.rl import trainer
from eggroll.rl.config import RLConfig
results = []
for devices in (1, 2):
    config = RLConfig(env="toy/Chase", pop_size=16, hidden=8, layers=1, members_per_forward=4, devices=devices)
    learner = trainer.make_learner(config.resolved("toy/Chase"), Chase())
    for generation in range(2):
        fitness = learner.evaluate(generation, 0.3).fitness
        learner.apply(UpdateRecord.make(generation, 0.3, 0.1, fitness.astype(np.float32)))
    results.append([fitness, *map(np.asarray, jax.tree.leaves((learner.state, learner.stats)))])
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


def test_the_papers_scale_of_sgd():
    config = RLConfig(env="CartPole-v1").resolved("CartPole-v1")
    es = config.es()
    assert es.lr == pytest.approx(0.1 * 0.2 * 2048**0.5)
    assert es.lr_decay == pytest.approx(0.9995 * 0.999)
    assert RLConfig(env="Pendulum-v1").resolved("Pendulum-v1").es().lr == 0.01


def test_presets_are_those_of_the_papers_sixteen():
    assert tuple(PRESETS) == registry.PAPER


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pop_size": 7}, r"population_size (=7) must be even"),
        ({"hidden": 0, "episodes": 0}, "eggroll rl has 2 problems"),
        ({"devices": 64}, "devices (=64): this machine has"),
    ],
)
def test_settings_that_cannot_work(toy, tmp_path, settings, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_gymnasium_by_its_vectorised_interface(tmp_path):
    pytest.importorskip("gymnasium")
    settings = {**QUICK, "env": "gymnasium/CartPole-v1", "max_steps": 60, "generations": 2, "rank": 1}
    one = trainer.train(RLConfig(**settings, output=str(tmp_path / "one"), members_per_forward=0))
    parts = trainer.train(RLConfig(**settings, output=str(tmp_path / "parts"), members_per_forward=4))
    assert one.run.metrics()[1]["fitness_mean"] == parts.run.metrics()[1]["fitness_mean"]
    assert one.result["start_return"] > 5
    assert one.learner.env_steps == parts.learner.env_steps > 0


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ("gymnasium/CartPole-v9", "gymnasium cannot make CartPole-v9"),
        ("gymnasium/Blackjack-v1", "has observations Tuple"),
    ],
)
def test_gymnasium_environments_that_cannot_be_used(tmp_path, env, text):
    pytest.importorskip("gymnasium")
    with pytest.raises(ConfigError, match=re.escape(text)):
        trainer.train(RLConfig(env=env, output=str(tmp_path / "run"), **QUICK))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--env_steps", "-5"), "env_steps (=-5) must be a whole number of at least 1"),
        (("--eval-episodes", "0"), "eval_episodes (=0) must be a whole number of at least 1"),
        (("--lr", "5", "--noiser", "openes"), "--lr, --noiser would do nothing with --algo ppo"),
        (("--resume", "RUN"), "is a run of PPO, which cannot be resumed or replayed"),
    ],
)
def test_what_ppo_cannot_do(toy, tmp_path, capsys, options, text):
    RunDir.create(tmp_path / "ppo", {"kind": "rl-ppo"})
    given = [str(tmp_path / "ppo") if option == "RUN" else option for option in options]
    assert main(["rl", "--env", "toy/Chase", "--algo", "ppo", "-o", str(tmp_path / "run"), *given]) == 1
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ppo_on_the_same_environment(toy, tmp_path, capsys):
    pytest.importorskip("rejax")
    status = main(["rl", "--env", "toy/Chase", "--algo", "ppo", "--env_steps", "16384", "--hidden", "16",
                   "--eval-episodes", "8", "-o", str(tmp_path / "run")])  # fmt: skip
    assert status == 0
    assert "iteration     2/2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["env_steps"] == 16384
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_list_shows_the_sixteen(capsys):
    assert main(["rl", "--list"]) == 0
    text = capsys.readouterr().out
    for name in registry.PAPER:
        assert name in text
