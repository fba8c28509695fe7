"""A run of ``eggroll rl``: set up, evolve, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eggroll.errors import ConfigError, RunError
from eggroll.loop import Heldout, Listener, Loop
from eggroll.rl.config import FREE, RLConfig
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import Environment
from eggroll.run.run_dir import RunDir

if TYPE_CHECKING:
    from eggroll.rl.worker import PolicyLearner


@dataclass(frozen=True)
class Trained:
    """A run that is over.

    Attributes:
        run: its directory.
        learner: the policy, its statistics of observations, and how it plays.
        result: what is in ``result.json``.
        interrupted: whether it ended before its last generation.
        generation: updates done.
    """

    run: RunDir
    learner: PolicyLearner
    result: dict[str, Any]
    interrupted: bool
    generation: int


def make_learner(config: RLConfig, env: Any, kind: Callable[..., Any] | None = None) -> PolicyLearner:
    """The policy as a run begins with it, and how it is evolved.

    Args:
        config: the resolved settings.
        env: the environment.
        kind: the learner's class; ``None`` plays in JAX.

    Raises:
        ConfigError: the population cannot be shared among the devices, or there are not so many.
    """
    import jax

    from eggroll.rl.policies import init_policy
    from eggroll.rl.rollouts import Rollouts
    from eggroll.rl.worker import PolicyLearner

    es = config.es()
    present = jax.devices()
    if config.devices > len(present):
        raise ConfigError(
            f"devices (={config.devices}): this machine has {len(present)} ({present[0].platform}); use at most that. "
            "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N simulates N"
        )
    assert config.episodes is not None
    low_rank = config.noiser == "eggroll"
    rollouts = Rollouts(
        env, rank=es.rank, seed=config.seed, episodes=config.episodes,
        max_steps=min(config.max_steps or env.max_steps, env.max_steps), sampling=not config.deterministic,
        normalize=config.normalize_obs, low_rank=low_rank, members_per_forward=config.members_per_forward,
    )  # fmt: skip
    params = init_policy(
        jax.random.key(config.seed % 2**32), env.obs_size, env.actions, hidden=config.hidden, layers=config.layers,
        sampling=not config.deterministic,
    )  # fmt: skip
    learner = kind or PolicyLearner
    return learner(rollouts, params, es, devices=present[: config.devices], low_rank=low_rank)


def open_run(config: RLConfig) -> RunDir:
    """A new run directory, or the one to resume after a check of its settings.

    Raises:
        RunError: the run was started with other settings.
    """
    settings = {"kind": "rl", **dataclasses.asdict(config)}
    if config.resume is None:
        name = config.env.replace("/", "-")
        path = Path(config.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return RunDir.create(path, settings)
    run = RunDir.open(config.resume)
    done = len(run.updates())
    if done > config.generations:
        raise RunError(
            f"--generations {config.generations}: the run in {run.path} has {done} finished generations already; "
            "give more"
        )
    run.check_config(settings, may_change=FREE)
    run.update_config(settings)
    run.note_resume(done)
    return run


def options_of_run(path: str) -> RLConfig:
    """The settings of a run of ``eggroll rl``.

    Raises:
        RunError: it is a run of something else.
    """
    config = dict(RunDir.open(path).config)
    kind = config.pop("kind", None)
    if kind == "rl-ppo":
        raise RunError(f"{path} is a run of PPO, which cannot be resumed or replayed; start it again")
    if kind != "rl":
        raise RunError(f"{path} is no run of eggroll rl")
    known = {field.name for field in dataclasses.fields(RLConfig)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise RunError(f"{path}/config.json has settings that this version does not know: {', '.join(unknown)}")
    return RLConfig(**config)


def set_up(config: RLConfig) -> tuple[Any, RLConfig, PolicyLearner]:
    """The environment, the resolved settings and the learner of a run.

    Raises:
        ConfigError: settings cannot work, or there is no such environment.
        MissingExtraError: the environment's library is not installed.
    """
    if registry.resolve(config.env)[0] == "gymnasium":
        from eggroll.rl.envs.gymnasium_env import GymEnvironment
        from eggroll.rl.gymnasium_worker import GymLearner

        env = GymEnvironment.make(config.env)
        config = config.resolved(env.name)
        if config.devices != 1:
            raise ConfigError(f"devices (={config.devices}): Gymnasium's environments are stepped on the host; use 1")
        return env, config, make_learner(config, env, GymLearner)
    compiled = registry.make(config.env)
    config = config.resolved(compiled.name)
    return compiled, config, make_learner(config, compiled)


def learner_of_run(run: RunDir) -> PolicyLearner:
    """The policy as a run began with it, for a replay."""
    return set_up(dataclasses.replace(options_of_run(str(run.path)), devices=1))[2]


def train(
    config: RLConfig,
    *,
    listeners: Callable[[RunDir, int], Sequence[Listener]] | None = None,
    opened: Callable[[RunDir, Environment, PolicyLearner], Any] | None = None,
) -> Trained:
    """Evolve a policy; everything that is not given in ``config`` is the environment's preset.

    Args:
        config: the settings.
        listeners: makes those who are told of each generation, from the run and the generations already done.
        opened: told when the run is set up, before its first generation.

    Raises:
        ConfigError: settings cannot work, or there is no such environment.
        MissingExtraError: the environment's library is not installed.
    """
    env, config, learner = set_up(config)
    run = open_run(config)
    loop = Loop(
        config=learner.config,
        learner=learner,
        evaluate=learner.evaluate,
        heldout=lambda: heldout(learner, config.eval_episodes),
        eval_every=config.eval_every,
        run=run,
        checkpoint_every=max(1, min(10, config.generations // 10)),
        stop=None if config.env_steps is None else lambda _: learner.env_steps >= (config.env_steps or 0),
    )
    start = 0
    if config.resume is not None:
        # Records alone do not bring the statistics of observations back: generations after the checkpoint are played
        # again, with the same result.
        checkpoint = run.latest_checkpoint()
        run.rewind(checkpoint.generation if checkpoint else 0)
        start = loop.resume()
    if opened is not None:
        opened(run, env, learner)
    if listeners is not None:
        loop.listeners = list(listeners(run, start))
    began = time.perf_counter()
    loop.go(start)
    result = {} if loop.interrupted else finish(run, learner, config, time.perf_counter() - began)
    return Trained(run, learner, result, loop.interrupted, loop.applied)


def heldout(learner: PolicyLearner, episodes: int) -> Heldout:
    """The centre's mean return over held-out episodes."""
    returns, lengths = learner.heldout(episodes)
    return Heldout(
        float(np.mean(returns)),
        metrics={"heldout_std": float(np.std(returns)), "heldout_length_mean": float(np.mean(lengths))},
    )


def finish(run: RunDir, learner: PolicyLearner, config: RLConfig, seconds: float) -> dict[str, Any]:
    """Write ``result.json`` and the learning curve; returns the result."""
    from eggroll.rl.curve import write_curve

    lines = run.metrics()
    if lines and lines[-1].get("heldout_reward") is None:  # a budget of steps ended the run between two evaluations
        end = heldout(learner, config.eval_episodes)
        done = {"generation": lines[-1]["generation"], "event": "end", "heldout_reward": end.reward, **end.metrics}
        done["env_steps"] = float(learner.env_steps)
        run.append_metrics(done)
        lines = run.metrics()
    scores = [line["heldout_reward"] for line in lines if line.get("heldout_reward") is not None]
    rates = [
        (after["env_steps"] - before["env_steps"]) / after["evaluate_s"]
        for before, after in pairwise(line for line in lines if "evaluate_s" in line)
    ]
    result = {
        "env": config.env,
        "start_return": scores[0] if scores else None,
        "end_return": scores[-1] if scores else None,
        "best_return": max(scores) if scores else None,
        "heldout_episodes": config.eval_episodes,
        "generations": len(run.updates()),
        "env_steps": learner.env_steps,
        "env_steps_per_s": round(float(np.median(rates))) if rates else None,  # without the first, which compiles
        "seconds": round(seconds, 1),
    }
    run.write_file("result.json", (json.dumps(result, indent=1) + "\n").encode())
    run.write_file("curve.png", write_curve(lines, title=config.env))
    return result
