"""What evolves: a policy, its optimizer, and the statistics of its observations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.typing import NDArray

from eggroll.core.records import UpdateRecord
from eggroll.core.turning import Turning
from eggroll.errors import CheckpointError, ConfigError
from eggroll.jax.strategy import State, Strategy
from eggroll.loop import Evaluation, Heldout
from eggroll.rl.config import RLConfig
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import Environment
from eggroll.rl.envs.gymnasium_env import GymnasiumEnvironment
from eggroll.rl.gymnasium_rollouts import GymnasiumRollouts
from eggroll.rl.policies import ObsStats, forward, init_policy
from eggroll.rl.rollouts import Rollouts

SUMS = ("observations/count", "observations/total", "observations/squares")
"""Totals of an evaluation, of ``x - mean`` with the present mean: ``(1,)``, ``(obs_size,)``, ``(obs_size,)``."""


class PolicyWorker:
    """A policy under evolution (a :class:`eggroll.loop.Worker`).

    Statistics of observations are sums over the members: each evaluation returns its part as ``totals``, and an update
    merges those of its record. So all replicas of a run have the same statistics, whoever played which episodes.

    Args:
        strategy: the estimate and the optimizer.
        rollouts: how episodes are played.
        params: the first weights.
        eval_episodes: held-out episodes, the same ones each time.
    """

    def __init__(self, strategy: Strategy, rollouts: Rollouts, params: PyTree, *, eval_episodes: int = 64) -> None:
        self.strategy, self.rollouts, self.eval_episodes = strategy, rollouts, eval_episodes
        self.state: State = strategy.init(params)
        strategy.leaves(params, rollouts.example)
        self.stats = ObsStats.empty(rollouts.env.obs_size)
        self.env_steps = 0
        self._turning = Turning()

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """The members' mean returns, and the sums of what they saw."""
        pairs = np.arange(members.start // 2, members.stop // 2)
        played = self.rollouts.population(self.state.params, self.stats, generation, sigma, pairs)
        # Parts are summed here, in their order, whatever the number of devices. Sums are arrays, so that the log leaves
        # them out, and float64, so that those of several ranges lose nothing when they are added.
        sums = (played.count.sum(keepdims=True), played.total.sum(0), played.squares.sum(0))
        lengths = np.asarray(played.lengths)
        returns = np.asarray(played.returns, np.float64).reshape(len(members), -1)
        return Evaluation(
            returns.mean(axis=1),
            metrics={"episode_length_mean": float(lengths.mean())},
            totals={
                "env_steps": int(lengths.sum()),
                **{name: np.asarray(value, np.float64) for name, value in zip(SUMS, sums, strict=True)},
            },
        )

    def heldout(self, generation: int) -> Heldout:
        """The center's mean return over held-out episodes."""
        played = self.rollouts.center(self.state.params, self.stats, self.eval_episodes)
        returns, lengths = np.asarray(played.returns, np.float64), np.asarray(played.lengths)
        metrics = {"heldout_std": float(np.std(returns)), "heldout_length_mean": float(np.mean(lengths))}
        return Heldout(float(np.mean(returns)), metrics=metrics)

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change of all parameters.

        A record from a log has no totals, so it brings back the weights, but not the statistics.
        """
        before = self.state.params
        self.state = self.strategy.tell(self.state, record.weights, shaped=True, lr=record.lr)
        if record.totals:
            count, total, squares = (jnp.asarray(record.totals[name], jnp.float32) for name in SUMS)
            self.stats = self.stats.merge(ObsStats.of_sums(count[0], total, squares, self.stats.mean))
            self.env_steps += int(record.totals["env_steps"])
        pairs = zip(jax.tree.leaves(self.state.params), jax.tree.leaves(before), strict=True)
        changes = [np.asarray(new - old) for new, old in pairs]
        for number, change in enumerate(changes):
            self._turning.add(str(number), change)
        self._turning.finish()
        return float(np.sqrt(sum(np.sum(np.square(change)) for change in changes)))

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`."""
        return self._turning.cosine

    def draw(self, path: Path) -> tuple[Path, float] | None:
        """Write an animation of one held-out episode; its file and return, or ``None`` where nothing can be drawn."""
        return self.rollouts.draw(self.state.params, self.stats, path)

    def state_tensors(self) -> dict[str, NDArray[Any]]:
        """Everything that a checkpoint holds, as NumPy arrays by path."""
        arrays = {name: np.asarray(value) for name, value in self._flat()}
        return {**arrays, "env_steps": np.array(self.env_steps, np.int64)}

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`.

        Raises:
            CheckpointError: an array is missing or has another shape.
        """
        values, problems = [], []
        for name, old in self._flat():
            new = tensors.get(name)
            if new is None or tuple(new.shape) != tuple(old.shape):
                problems.append(f"{name} is {'missing' if new is None else f'{tuple(new.shape)}, not {old.shape}'}")
                continue
            values.append(jnp.array(np.asarray(new), old.dtype))
        if "env_steps" not in tensors:
            problems.append("env_steps is missing")
        if problems:
            raise CheckpointError(f"the checkpoint does not fit this policy: {'; '.join(problems[:3])}")
        restored = jax.tree.unflatten(jax.tree.structure(self._tree()), values)
        self.state, self.stats = restored["state"], restored["stats"]
        self.env_steps = int(np.asarray(tensors["env_steps"]))

    def _tree(self) -> dict[str, Any]:
        return {"state": self.state, "stats": self.stats}

    def _flat(self) -> list[tuple[str, Any]]:
        paths = jax.tree_util.tree_flatten_with_path(self._tree())[0]
        return [(jax.tree_util.keystr(path, simple=True, separator="/"), value) for path, value in paths]


def environment_of(name: str) -> Environment:
    """The environment of a name, in JAX or Gymnasium's.

    Raises:
        ConfigError: there is no such environment.
        MissingExtraError: its library is not installed.
    """
    if registry.resolve(name)[0] == "gymnasium":
        return GymnasiumEnvironment.make(name)
    return registry.make(name)


def resolved(config: RLConfig, env: Environment) -> RLConfig:
    """The settings of a run: those given, and the environment's preset for what is not.

    Raises:
        ConfigError: settings cannot work, here or at all.
    """
    config = config.resolved(env.name, cpu=jax.default_backend() == "cpu")
    if config.devices == 1:
        return config
    given = f"devices (={config.devices})"
    if isinstance(env, GymnasiumEnvironment):
        raise ConfigError(f"{given}: Gymnasium's environments are stepped on the host; use 1")
    if config.workers is not None:
        raise ConfigError(
            f"{given} and workers (={config.workers}) both share the members; use one of them. A worker computes on "
            "one device, for example on a GPU each with --worker-gpus 1"
        )
    present = jax.devices()
    if config.devices > len(present):
        raise ConfigError(
            f"{given}: this machine has {len(present)} ({present[0].platform}); use at most that. "
            "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N simulates N"
        )
    return config


def make_worker(config: RLConfig, env: Environment | None = None) -> PolicyWorker:
    """The policy as a run begins with it.

    Args:
        config: the settings; what is not given is the environment's preset.
        env: the environment; ``None`` is the one that ``config.env`` names.

    Raises:
        ConfigError: settings cannot work, or there is no such environment.
        MissingExtraError: the environment's library is not installed.
    """
    env = environment_of(config.env) if env is None else env
    config = resolved(config, env)
    assert config.episodes is not None
    devices = jax.devices()[: config.devices]
    strategy = Strategy(forward, config.es(), devices=devices, low_rank=config.noiser == "eggroll")
    play = GymnasiumRollouts if isinstance(env, GymnasiumEnvironment) else Rollouts
    rollouts = play(
        env, strategy, episodes=config.episodes, max_steps=min(config.max_steps or env.max_steps, env.max_steps),
        sampling=not config.deterministic, normalize=config.normalize_obs,
        members_per_forward=config.members_per_forward,
    )  # fmt: skip
    return PolicyWorker(strategy, rollouts, first_policy(config, env), eval_episodes=config.eval_episodes)


def first_policy(config: RLConfig, env: Environment) -> PyTree:
    """The weights that a run begins with."""
    return init_policy(
        jax.random.key(config.seed % 2**32), env.obs_size, env.actions, hidden=config.hidden, layers=config.layers,
        sampling=not config.deterministic,
    )  # fmt: skip
