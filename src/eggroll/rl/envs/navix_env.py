"""NAVIX: MiniGrid in JAX (https://github.com/epignatelli/navix)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from eggroll._optional import require
from eggroll.rl.envs._common import flatten, frames_of, observation_size, scalar, write_gif
from eggroll.rl.envs.base import Discrete


def ids() -> list[str]:
    """The ids that NAVIX has registered."""
    return list(require("navix", extra="rl").registry())


class NavixEnvironment:
    """An environment of NAVIX with its default observation: the whole grid, three codes a cell."""

    def __init__(self, id: str, name: str) -> None:
        self.name = name
        self._env = require("navix", extra="rl").make(id)
        self.actions = Discrete(int(self._env.action_space.n))
        self.max_steps = int(self._env.max_steps)
        # The public step begins with a reset in case the state is over; under vmap that reset is computed at every
        # step, which makes it 6 to 12 times slower. _step is the rest of it.
        self._advance = getattr(self._env, "_step", self._env.step)
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``."""
        timestep = self._env.reset(key)
        return timestep, flatten(timestep.observation)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``; what is random has its key in the state."""
        timestep = self._advance(state, action)
        return timestep, flatten(timestep.observation), scalar(timestep.reward), timestep.is_done()

    def render(self, states: list[Any], path: Path) -> Path | None:
        """A GIF of the whole grid."""
        draw = jax.jit(require("navix.observations", extra="rl").rgb)
        return write_gif((draw(state.state) for state in frames_of(states)), path, milliseconds=150)
