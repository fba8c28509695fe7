"""A run of ``eggroll rl``: what it needs, what it makes, and what is done with the policy."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from eggroll._command import typed
from eggroll._optional import require
from eggroll.core.reading import NUMBER
from eggroll.core.settings import narrowed
from eggroll.lifecycle import Opened, Plan, RunKind, Saved, Sitting, Trained
from eggroll.lifecycle import train as train_kind
from eggroll.lifecycle.memory import ensure_fits, generation_line
from eggroll.loop import Listener
from eggroll.rl.config import RLConfig
from eggroll.run.run_dir import RunDir

if TYPE_CHECKING:
    from eggroll.rl.envs.base import Environment
    from eggroll.rl.worker import PolicyWorker


def train(
    config: RLConfig,
    *,
    opened: Callable[[Opened], Iterable[Listener] | None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Trained:
    """Evolve a policy; everything that is not given in ``config`` is the environment's preset.

        >>> trained = train(RLConfig(env="CartPole-v1", generations=100))
        >>> trained.result["end_return"], trained.worker.state.params

    Args:
        config: the settings.
        opened: told when the run is set up; returns who is told of each generation.
        notify: told what happens to worker processes; ``None`` warns.

    Raises:
        ConfigError: settings cannot work, or there is no such environment.
        MissingExtraError: the environment's library is not installed.
    """
    return train_kind(KIND, config, opened=opened, notify=notify)


class _Maker:
    """Makes the worker. To other processes only the settings travel, from which they make an environment each."""

    def __init__(self, config: RLConfig, env: Environment | None = None) -> None:
        self.config, self.env = config, env

    def __call__(self) -> PolicyWorker:
        from eggroll.rl.worker import make_worker

        return make_worker(self.config, self.env)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Maker, (self.config,)


def _plan(options: RLConfig) -> Plan:
    from eggroll.rl.memory import parts_of, ways_out
    from eggroll.rl.worker import environment_of, resolved

    env = environment_of(options.env)
    config = resolved(narrowed(options, RLConfig), env)
    size = config.population_size
    ensure_fits(f"a population of {size:,} members in {config.env}", parts_of(config, env), ways_out(config))
    return Plan(
        options=config,
        config=config.es(),
        make_worker=_Maker(config, env),
        finish=partial(_finish, config),
        title=config.env,
        name=config.env.replace("/", "-"),
        eval_every=config.eval_every,
        checkpoint_every=max(1, min(10, config.generations // 10)),
        stop=None if config.env_steps is None else partial(_used_up, config.env_steps),
        describe=lambda worker: _describe(config, env),
        facts=_solved(config, env),
    )


def _solved(config: RLConfig, env: Environment) -> dict[str, float]:
    """The return from which Gymnasium counts an environment as solved, where it says so; gymnax has the same ones."""
    from eggroll.rl.envs import registry

    library, id = registry.resolve(config.env)
    if library not in ("gymnasium", "gymnax") or (config.max_steps or env.max_steps) < env.max_steps:
        return {}
    with suppress(Exception):  # it is not installed, or has no such environment
        threshold = require("gymnasium", extra="rl").spec(id).reward_threshold
        return {} if threshold is None else {"solved_return": float(threshold)}
    return {}


def _used_up(budget: int, history: Sequence[dict[str, Any]]) -> bool:
    return bool(history[-1]["env_steps"] >= budget)


def _describe(config: RLConfig, env: Environment) -> Sequence[str]:
    import jax

    from eggroll.rl.memory import members_at_once, parts_of
    from eggroll.rl.worker import first_policy

    episodes, most = config.episodes or 1, min(config.max_steps or env.max_steps, env.max_steps)
    es, policy = config.es(), jax.eval_shape(partial(first_policy, config, env))
    return (
        f"[bold]{escape(env.name)}[/]  {env.obs_size} observations, {escape(str(env.actions))}, episodes of at most "
        f"{min(config.max_steps or env.max_steps, env.max_steps)} steps",
        f"policy   {sum(leaf.size for leaf in jax.tree.leaves(policy)):,} parameters evolved",
        f"search   population {es.population_size}, rank {es.rank}, sigma {es.sigma:g}, {es.optimizer} lr "
        f"{escape(config.lr_text())}, seed {es.seed}",
        generation_line(
            f"{es.population_size * episodes * most:,} environment steps",
            es.population_size,
            members_at_once(config),
            sum(parts_of(config, env).values()),
        ),
        "[dim]the first generation compiles, which takes some seconds to a minute[/]",
    )


def _finish(config: RLConfig, worker: PolicyWorker, run: RunDir, sitting: Sitting) -> dict[str, Any]:
    """Draw the learning curve; returns the result."""
    from eggroll.rl.curve import write_curve

    lines = run.metrics()
    if lines and lines[-1].get("heldout_reward") is None:  # a budget of steps ended the run between two evaluations
        end, last = worker.heldout(sitting.generation), lines[-1]
        done = {"generation": last["generation"], "event": "end", "heldout_reward": end.reward, **end.metrics}
        run.append_metrics({**done, "env_steps": last["env_steps"]})
        lines = run.metrics()
    scores = [line["heldout_reward"] for line in lines if line.get("heldout_reward") is not None]
    rates = [
        (after["env_steps"] - before["env_steps"]) / after["evaluate_s"]
        for before, after in pairwise(line for line in lines if "evaluate_s" in line)
    ]
    run.write_file("curve.png", write_curve(lines, title=config.env))
    return {
        "env": config.env,
        "start_return": scores[0] if scores else None,
        "end_return": scores[-1] if scores else None,
        "best_return": max(scores) if scores else None,
        "heldout_episodes": config.eval_episodes,
        "generations": sitting.generation,
        "env_steps": worker.env_steps,
        "env_steps_per_s": round(float(np.median(rates))) if rates else None,  # without the first, which compiles
        "seconds": round(sitting.seconds, 1),
    }


def _base(config: RLConfig, run: RunDir) -> PolicyWorker:
    """The first weights, with the statistics of observations of the newest checkpoint: the log does not have them."""
    from eggroll.rl.worker import make_worker

    worker = make_worker(dataclasses.replace(config, devices=1, workers=None))
    newest = run.latest_checkpoint()
    if newest is not None:
        statistics = {name: value for name, value in newest.load().items() if name.startswith("stats/")}
        worker.load_state_tensors({**worker.state_tensors(), **statistics})
    return worker


def _save(worker: PolicyWorker, directory: Path, generation: int) -> Saved:
    from safetensors.numpy import save_file

    path, tensors = directory / "policy.safetensors", worker.state_tensors()
    kept = [name for name in tensors if name.startswith(("state/params/", "stats/"))]
    save_file({name.removeprefix("state/"): tensors[name] for name in kept}, path)
    return Saved("policy", path, ("from safetensors.numpy import load_file", f'policy = load_file("{path}")'))


def _load_line(run: RunDir) -> str | None:
    """The command that writes the policy, and the Python that loads it; ``None`` before the first generation."""
    done = len(run.updates())
    if done == 0:
        return None
    path = run.path / f"replay-{done}" / "policy.safetensors"
    return (
        f"{typed()} replay {shlex.quote(str(run.path))}\n"
        f"# then, in Python:\nfrom safetensors.numpy import load_file\npolicy = load_file({str(path)!r})"
    )


KIND = RunKind(
    name="rl", options=RLConfig, plan=_plan, base=_base, save=_save, load_line=_load_line,
    measured={"env_steps": NUMBER}, retired=("list", "render"), from_checkpoint=True,
)  # fmt: skip
"""What ``eggroll rl`` runs, ``eggroll replay`` rebuilds, and :func:`train` trains."""
