"""Gymnasium (https://gymnasium.farama.org): what a policy needs to know of an environment of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from eggroll._optional import require
from eggroll.errors import ConfigError
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import ActionSpace, Continuous, Discrete, MultiDiscrete

DEFAULT_LIMIT = 1000
"""Steps of an episode where the environment has no limit of its own."""


@dataclasses.dataclass(frozen=True)
class GymnasiumEnvironment:
    """What the trainer asks of an environment; :mod:`eggroll.rl.gymnasium_rollouts` steps it, in batches."""

    name: str
    id: str
    obs_size: int
    actions: ActionSpace
    max_steps: int

    @classmethod
    def make(cls, name: str) -> GymnasiumEnvironment:
        """The environment of an id.

        Raises:
            ConfigError: no such id, or observations or actions of a kind that policies cannot have.
        """
        gymnasium = require("gymnasium", extra="rl")
        _, id = registry.resolve(name)
        try:
            env = gymnasium.make(id)
        except gymnasium.error.Error as error:
            raise ConfigError(f"env {name!r}: gymnasium cannot make {id}: {error}") from None
        space, limit = env.observation_space, env.spec.max_episode_steps or DEFAULT_LIMIT
        if not isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
            raise ConfigError(
                f"env {name!r} has observations {space}; policies need numbers (Box or Discrete). A wrapper such as "
                "gymnasium.wrappers.FlattenObservation in a registered id gives them"
            )
        actions = _action_space(env.action_space, name)
        size = int(np.prod(space.shape)) if isinstance(space, gymnasium.spaces.Box) else int(space.n)
        env.close()
        return cls(f"gymnasium/{id}", id, size, actions, int(limit))

    def reset(self, key: Any) -> tuple[Any, Any]:
        """Not in JAX."""
        raise TypeError(f"{self.name} is stepped on the host")

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """Not in JAX."""
        raise TypeError(f"{self.name} is stepped on the host")

    def render(self, states: list[Any], path: Path) -> Path | None:
        """Nothing: frames come from the environment itself."""
        return None


def _action_space(space: Any, name: str) -> ActionSpace:
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return MultiDiscrete(tuple(int(number) for number in space.nvec))
    if isinstance(space, spaces.Box) and np.isfinite([space.low, space.high]).all():
        return Continuous(space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel())
    raise ConfigError(f"env {name!r} has actions {space}; policies know Discrete, MultiDiscrete and bounded Box")
