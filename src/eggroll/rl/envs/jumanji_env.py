"""Jumanji: puzzles, packing, routing (https://github.com/instadeepai/jumanji)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eggroll._optional import require
from eggroll.rl.envs._common import (
    DEFAULT_MAX_STEPS,
    SLOW_FRAMES,
    Counted,
    box,
    flatten,
    frames_of,
    observation_size,
    scalar,
    with_ending,
)
from eggroll.rl.envs.base import ActionSpace, Discrete, MultiDiscrete

LIMITS = ("time_limit", "num_items", "num_cities", "num_blocks")
"""Attributes that bound an episode: a limit, or things of which every step uses up one (a bad step ends it)."""


def ids() -> list[str]:
    """The ids that Jumanji has registered."""
    return sorted(require("jumanji", extra="rl").registered_environments())


class JumanjiEnvironment:
    """An environment of Jumanji with its default generator.

    The observation holds all fields in their order, the mask of legal actions among them; nothing else keeps the
    policy from an illegal one. Where Jumanji sets no time limit, as in Game2048 (an illegal move changes nothing,
    for ever), the episode ends after 1000 steps.
    """

    def __init__(self, id: str, name: str) -> None:
        self.name = name
        self._env = require("jumanji", extra="rl").make(id)
        spec = self._env.action_spec
        self._shape = tuple(spec.shape)
        self.actions = _actions(spec)
        limits = [getattr(self._env, limit, None) for limit in LIMITS]
        self.max_steps = int(next((limit for limit in limits if limit), DEFAULT_MAX_STEPS))
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``."""
        state, timestep = self._env.reset(key)
        return Counted(state, jnp.int32(0)), flatten(timestep.observation)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``; what is random has its key in the state."""
        inner, timestep = self._env.step(state.inner, action.reshape(self._shape))
        steps = state.steps + 1
        done = jnp.logical_or(timestep.last(), steps >= self.max_steps)
        return Counted(inner, steps), flatten(timestep.observation), scalar(timestep.reward), done

    def render(self, states: list[Any], path: Path) -> Path | None:
        """A GIF by Jumanji's viewer (matplotlib); None where there is none."""
        if not hasattr(self._env, "animate"):
            return None
        path = with_ending(path, ".gif")
        frames = [state.inner for state in frames_of(states, most=SLOW_FRAMES)]
        with require("matplotlib", extra="rl").rc_context({"animation.writer": "pillow", "savefig.dpi": 50}):
            self._env.animate(frames, interval=100, save_path=str(path))
        self._env.close()
        return path


def _actions(spec: Any) -> ActionSpace:
    if not np.issubdtype(spec.dtype, np.integer):
        return box(spec.minimum, spec.maximum, tuple(spec.shape))
    if spec.shape == ():
        return Discrete(int(spec.num_values))
    # MultiCVRP gives bounds, inclusive as everywhere in Jumanji, instead of how many values there are
    nums = spec.num_values if hasattr(spec, "num_values") else np.broadcast_to(spec.maximum, spec.shape) + 1
    return MultiDiscrete(tuple(int(num) for num in np.ravel(nums)))
