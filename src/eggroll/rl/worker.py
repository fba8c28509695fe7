"""What a run of RL updates: the policy, its optimizer, and the statistics of its observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError
from eggroll.jax.noise import Leaf
from eggroll.jax.strategy import State, Strategy
from eggroll.loop import Evaluation
from eggroll.rl.policies import ObsStats
from eggroll.rl.rollouts import Rollouts


class PolicyLearner:
    """A policy under evolution (a :class:`eggroll.loop.Learner`).

    Args:
        rollouts: how members are evaluated.
        params: the first weights.
        config: the algorithm's settings.
        devices: devices to share the pairs among; ``None`` is one.
        low_rank: false perturbs matrices densely.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        params: Any,
        config: ESConfig,
        *,
        devices: Sequence[Any] | None = None,
        low_rank: bool = True,
    ) -> None:
        self.rollouts, self.config = rollouts, config
        self.strategy = Strategy(rollouts.policy.fn, config, devices=devices, low_rank=low_rank)
        self.state: State = self.strategy.init(params)
        self.strategy.leaves(params, rollouts.example)
        self.stats = ObsStats.empty(rollouts.env.obs_size)
        self.env_steps = 0
        # Of the generation that is being evaluated, observations and steps; its update takes them over, so that a
        # generation that is given up half-way leaves nothing behind.
        self._seen: tuple[ObsStats, int] | None = None
        self._population = jax.jit(self.strategy.spread(self._evaluate))
        self._centre = jax.jit(rollouts.centre, static_argnums=2)

    @property
    def leaves(self) -> list[Leaf]:
        """What is evolved."""
        return self.rollouts.leaves(self.state.params)

    @property
    def max_steps(self) -> int:
        """Steps after which an episode is cut off."""
        return self.rollouts.max_steps

    def draw(self, path: Path) -> tuple[Path, float] | None:
        """Write an animation of one held-out episode; its file and return, or ``None`` where nothing can be drawn."""
        states, score = self.rollouts.episode(self.state.params, self.stats)
        written = self.rollouts.env.render(states, path)
        return None if written is None else (written, score)

    def _evaluate(self, state: tuple[Any, ObsStats], generation: Any, sigma: Any, pairs: Any) -> Any:
        return self.rollouts.population(*state, generation, sigma, pairs)

    def evaluate(self, generation: int, sigma: float) -> Evaluation:
        """The members' mean returns; what they saw is kept for the update."""
        played = self._population((self.state.params, self.stats), jnp.int32(generation), jnp.float32(sigma))
        # Summed here, over parts in their order, whatever the number of devices.
        sums = (played.count.sum(), played.total.sum(0), played.squares.sum(0))
        returns = np.asarray(played.returns, np.float64).reshape(self.config.population_size, -1)
        lengths = np.asarray(played.lengths)
        self._seen = ObsStats.of_sums(*sums, self.stats.mean), int(lengths.sum())
        return self.evaluation(returns, float(lengths.mean()))

    def evaluation(self, returns: np.ndarray, length: float) -> Evaluation:
        """A generation's scores from its members' returns ``(members, episodes)``, and what is logged with them."""
        assert self._seen is not None
        steps = self.env_steps + self._seen[1]
        metrics = {"env_steps": float(steps), "episode_length_mean": length}
        return Evaluation(returns.mean(axis=1), metrics=metrics)

    def heldout(self, episodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns and lengths of the centre's held-out episodes, ``(episodes,)`` each."""
        played = self._centre(self.state.params, self.stats, episodes)
        return np.asarray(played.returns, np.float64), np.asarray(played.lengths)

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change of all parameters."""
        before = self.state.params
        self.state = self.strategy.tell(self.state, record.weights, shaped=True, lr=record.lr)
        if self._seen is not None:
            seen, steps = self._seen
            self.stats, self.env_steps, self._seen = self.stats.merge(seen), self.env_steps + steps, None
        changes = jax.tree.map(lambda new, old: jnp.sum((new - old) ** 2), self.state.params, before)
        return float(jnp.sqrt(sum(jax.tree.leaves(changes))))

    def state_tensors(self) -> dict[str, np.ndarray]:
        """Everything that a checkpoint holds, as NumPy arrays by path."""
        tree = {"state": self.state, "stats": self.stats}
        arrays = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(value)
            for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        arrays["env_steps"] = np.array(self.env_steps, np.int64)
        return arrays

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`.

        Raises:
            CheckpointError: an array is missing or has another shape.
        """
        tree = {"state": self.state, "stats": self.stats}
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        values, problems = [], []
        for path, old in flat:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            new = tensors.get(name)
            if new is None or tuple(new.shape) != tuple(old.shape):
                problems.append(f"{name} is {'missing' if new is None else f'{tuple(new.shape)}, not {old.shape}'}")
                continue
            values.append(jnp.asarray(np.asarray(new), old.dtype))
        if "env_steps" not in tensors:
            problems.append("env_steps is missing")
        if problems:
            raise CheckpointError(f"the checkpoint does not fit this policy: {'; '.join(problems[:3])}")
        restored = jax.tree_util.tree_unflatten(structure, values)
        self.state, self.stats = restored["state"], restored["stats"]
        self.env_steps, self._seen = int(np.asarray(tensors["env_steps"])), None
