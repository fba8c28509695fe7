"""gymnax: classic control, bsuite, MinAtar (https://github.com/RobertTLange/gymnax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from eggroll._optional import require
from eggroll.rl.envs._classic import CLASSIC, draw
from eggroll.rl.envs._common import (
    SLOW_FRAMES,
    action_space,
    flatten,
    frames_of,
    observation_size,
    scalar,
    with_ending,
    write_gif,
)
from eggroll.rl.envs.base import Continuous

DRAWN_BY_GYMNAX = ("-MinAtar", "Catch-bsuite", "Pong-misc", "PointRobot-misc", "MetaMaze-misc", "FourRooms-misc")


def ids() -> list[str]:
    """The ids that gymnax has registered."""
    return list(require("gymnax", extra="rl").registered_envs)


class GymnaxEnvironment:
    """An environment of gymnax with its default parameters."""

    def __init__(self, id: str, name: str) -> None:
        self.name = name
        self.id = id
        self._env, self._params = require("gymnax", extra="rl").make(id)
        self._space = self._env.action_space(self._params)
        self.actions = action_space(self._space)
        self.max_steps = int(self._params.max_steps_in_episode)
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``."""
        observation, state = self._env.reset_env(key, self._params)
        return state, flatten(observation)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``.

        gymnax's own ``step`` resets at the end, hence computes a reset at every step; this is what it does before.
        """
        if isinstance(self.actions, Continuous):
            action = action.reshape(self._space.shape)
        observation, state, reward, terminated, _ = self._env.step_env(key, state, action, self._params)
        done = jnp.logical_or(terminated, self._env.is_truncated(state, self._params))
        return state, flatten(observation), scalar(reward), done

    def render(self, states: list[Any], path: Path) -> Path | None:
        """A GIF of classic control, MinAtar and some others; None for those of which gymnax has no picture."""
        if self.id in CLASSIC:
            return write_gif((draw(self.id, state) for state in frames_of(states)), path, milliseconds=40)
        if not self.id.endswith(DRAWN_BY_GYMNAX):
            return None
        path = with_ending(path, ".gif")
        visualizer = require("gymnax.visualize", extra="rl").Visualizer
        visualizer(self._env, self._params, frames_of(states, most=SLOW_FRAMES)).animate(str(path))
        return path
