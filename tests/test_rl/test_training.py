"""Runs of ``eggroll rl``, on a toy environment and on Gymnasium."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
from safetensors.numpy import load_file  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from toys import Chase  # noqa: E402

from eggroll.cli.main import main  # noqa: E402
from eggroll.core.fitness import NonFiniteFitnessWarning  # noqa: E402
from eggroll.core.settings import to_json_values  # noqa: E402
from eggroll.errors import ConfigError, RunError  # noqa: E402
from eggroll.lifecycle import options_of_run  # noqa: E402
from eggroll.rl import RLConfig, train  # noqa: E402
from eggroll.rl.envs import registry  # noqa: E402
from eggroll.rl.kind import KIND, _solved  # noqa: E402
from eggroll.rl.worker import environment_of  # noqa: E402
from eggroll.run.run_dir import RunDir  # noqa: E402

QUICK = {
    "population_size": 16, "hidden": 8, "layers": 1, "lr": 0.1, "sigma": 0.3, "optimizer": "adam", "eval_episodes": 8,
}  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    """The registry knows one more environment."""
    resolve, make = registry.resolve, registry.make
    monkeypatch.setattr(registry, "resolve", lambda n: ("toy", n) if n.startswith("toy") else resolve(n))
    monkeypatch.setattr(registry, "make", lambda n, **k: Chase() if n.startswith("toy") else make(n, **k))


def run(directory, **settings):
    return train(RLConfig(env="toy/Chase", output=str(directory), **{**QUICK, "generations": 6, **settings}))


def test_a_run_improves_logs_draws_and_reports(toy, tmp_path, capsys):
    command = "rl --env toy/Chase --pop_size 64 --hidden 16 --layers 1 --lr 0.1 --sigma 0.3 --optimizer adam -g 25"
    status = main([*command.split(), "--eval-every", "5", "--report-to", "none", "-o", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert status == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["end_return"] > result["start_return"] / 2  # returns are negative distances
    assert result["env_steps"] == 25 * 64 * 12
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "return of held-out episodes" in page
    assert f"eggroll replay {tmp_path / 'run'}" in page
    assert f"policy = load_file(&#x27;{tmp_path / 'run'}/replay-25/policy.safetensors&#x27;)" in page
    assert (tmp_path / "run" / "episode.txt").exists()
    cosines = [line.get("update_cosine") for line in RunDir.open(tmp_path / "run").metrics() if "lr" in line]
    assert cosines[0] is None
    assert all(-1 <= value <= 1 for value in cosines[1:])
    assert len(set(cosines)) == 25
    for piece in ("toy/Chase", "policy   98 parameters evolved", "end return", "episode.txt (return"):
        assert piece in text
    assert "updates.jsonl" in {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"env": "CartPole-v1"}, {"solved_return": 475.0}),
        ({"env": "gymnasium/CartPole-v1"}, {"solved_return": 475.0}),
        ({"env": "CartPole-v1", "max_steps": 100}, {}),
        ({"env": "gymnasium/Pendulum-v1"}, {}),
        ({"env": "jumanji/Snake-v1"}, {}),
    ],
)
def test_the_return_from_which_an_environment_counts_as_solved(settings, expected):
    pytest.importorskip("gymnasium")
    config = RLConfig(**settings)
    assert dict(_solved(config, environment_of(config.env))) == expected


def test_resume_is_bit_for_bit(toy, tmp_path):
    whole = run(tmp_path / "whole", generations=7)
    run(tmp_path / "cut", generations=4)
    resumed = train(RLConfig(**{**_settings(tmp_path / "cut"), "generations": 7, "resume": str(tmp_path / "cut")}))
    for one, other in zip(jax.tree.leaves(whole.worker.state), jax.tree.leaves(resumed.worker.state), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(whole.worker.stats.mean, resumed.worker.stats.mean)
    assert whole.run.updates() == resumed.run.updates()
    assert whole.worker.env_steps == resumed.worker.env_steps


@pytest.mark.slow
def test_a_killed_run_plays_the_generations_after_its_checkpoint_again(toy, tmp_path):
    whole = run(tmp_path / "whole", generations=5)
    cut = run(tmp_path / "cut", generations=5)
    newest = sorted(cut.run.checkpoints.iterdir())[-1]
    (newest / "manifest.json").unlink()  # as if it had been killed before its last checkpoint
    resumed = train(RLConfig(**{**_settings(tmp_path / "cut"), "resume": str(tmp_path / "cut")}))
    for one, other in zip(jax.tree.leaves(whole.worker.state), jax.tree.leaves(resumed.worker.state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_replay_rebuilds_the_weights(toy, tmp_path, capsys):
    trained = run(tmp_path / "run", generations=3)
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert "generation 3 of 3, equal to its checkpoint, bit for bit" in capsys.readouterr().out
    stored = load_file(tmp_path / "run" / "replay-3" / "policy.safetensors")
    np.testing.assert_array_equal(stored["params/head/weight"], trained.worker.state.params["head"]["weight"])
    assert "stats/mean" in stored


def _settings(path):
    return to_json_values(options_of_run(KIND, path))


def test_resume_refuses_other_settings(toy, tmp_path):
    run(tmp_path / "run", generations=1)
    settings = {**_settings(tmp_path / "run"), "resume": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"sigma: 0\.3 in the run, 0\.5 now"):
        train(RLConfig(**{**settings, "sigma": 0.5}))
    with pytest.raises(ConfigError, match="has 1 finished generations already; give more"):
        train(RLConfig(**{**settings, "generations": 0}))


def test_returns_that_are_not_a_number_count_as_the_worst(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "resolve", lambda n: ("toy", n))
    monkeypatch.setattr(registry, "make", lambda n, **k: Chase(spoil=True))
    with pytest.warns(NonFiniteFitnessWarning, match="scores were NaN or infinite"):
        trained = run(tmp_path / "run", generations=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.worker.state.params))
    assert sum(line.get("invalid_scores", 0) for line in trained.run.metrics()) > 0


@pytest.mark.slow
def test_openes_is_the_same_run_with_dense_noise(toy, tmp_path):
    trained = run(tmp_path / "run", noiser="openes", generations=2)
    assert not any(leaf.low_rank for leaf in trained.worker.rollouts.leaves(trained.worker.state.params))


@pytest.mark.slow
def test_a_budget_of_steps_ends_the_run(toy, tmp_path):
    trained = run(tmp_path / "run", generations=50, env_steps=16 * 12 * 3)
    assert trained.generation == 3
    ends = [line for line in trained.run.metrics() if line.get("event") == "end"]
    assert len(ends) == 1
    assert trained.result["end_return"] == ends[0]["heldout_reward"] != trained.result["start_return"]
    assert ends[0]["env_steps"] == trained.worker.env_steps
    settings = {**_settings(tmp_path / "run"), "resume": str(tmp_path / "run")}
    assert train(RLConfig(**settings)).generation == 3  # the budget is used up
    assert train(RLConfig(**{**settings, "env_steps": 16 * 12 * 4})).generation == 4


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"population_size": 7}, "population_size (=7) must be even: members come in pairs; use 8"),
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
    one = train(RLConfig(**settings, output=str(tmp_path / "one"), members_per_forward=0))
    parts = train(RLConfig(**settings, output=str(tmp_path / "parts"), members_per_forward=4))
    assert one.run.metrics()[1]["fitness_mean"] == parts.run.metrics()[1]["fitness_mean"]
    assert one.result["start_return"] > 5
    assert one.worker.env_steps == parts.worker.env_steps > 0


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
        train(RLConfig(env=env, output=str(tmp_path / "run"), **QUICK))


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
