"""Craftax and Craftax-Classic: Crafter and NetHack in JAX (https://github.com/MichaelTMatthews/Craftax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from eggroll._optional import require
from eggroll.rl.envs._common import action_space, flatten, frames_of, observation_size, scalar, write_gif


def ids() -> list[str]:
    """Craftax's four environments, by the names that its papers use."""
    return [f"Craftax-{kind}-AutoReset-v1" for kind in ("Symbolic", "Classic-Symbolic", "Pixels", "Classic-Pixels")]


class CraftaxEnvironment:
    """An environment of Craftax.

    The name says ``AutoReset``, but underneath runs the variant without: the same dynamics within an episode, and
    stepping is 9 to 16 times faster, because the other one generates a whole world at every step in case it is needed.
    """

    def __init__(self, id: str, name: str) -> None:
        self.name = name
        module = require("craftax.craftax_env", extra="rl")
        self._env = module.make_craftax_env_from_name(id.replace("-AutoReset", ""), auto_reset=False)
        self._folder = "craftax.craftax_classic" if "Classic" in id else "craftax.craftax"
        self._params = self._env.default_params
        self.actions = action_space(self._env.action_space(self._params))
        self.max_steps = int(self._params.max_timesteps)
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``."""
        observation, state = self._env.reset(key, self._params)
        return state, flatten(observation)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``."""
        observation, state, reward, done, _ = self._env.step(key, state, action, self._params)
        return state, flatten(observation), scalar(reward), done

    def render(self, states: list[Any], path: Path) -> Path | None:
        """A GIF of what the player sees. The first picture ever takes Craftax half a minute: it prepares textures."""
        size = require(f"{self._folder}.constants", extra="rl").BLOCK_PIXEL_SIZE_IMG
        draw = jax.jit(require(f"{self._folder}.renderer", extra="rl").make_craftax_pixel_renderer(size))
        return write_gif((draw(state) for state in frames_of(states)), path, milliseconds=100)
