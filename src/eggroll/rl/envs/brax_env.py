"""brax: rigid bodies, continuous control (https://github.com/google/brax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from eggroll._optional import require
from eggroll.errors import ConfigError
from eggroll.rl.envs._common import (
    DEFAULT_MAX_STEPS,
    Counted,
    box,
    flatten,
    observation_size,
    scalar,
    with_ending,
)


def ids() -> list[str]:
    """The names that brax knows; it has no public list."""
    return list(require("brax.envs", extra="rl")._envs)


class BraxEnvironment:
    """An environment of brax that ends after 1000 steps (brax itself leaves the limit to a wrapper).

    Args:
        id: brax's name, such as ``ant``.
        name: the canonical name.
        backend: which physics. ``generalized`` is brax's default, ``spring`` the fastest on a CPU; they are different
            dynamics, so returns compare only within one.
    """

    def __init__(self, id: str, name: str, *, backend: str = "generalized") -> None:
        self.name = name
        self.max_steps = DEFAULT_MAX_STEPS
        try:
            self._env = require("brax.envs", extra="rl").get_environment(id, backend=backend)
        except ValueError as error:  # swimmer has the generalized backend only
            raise ConfigError(f"{id} of brax cannot run with backend={backend!r}: {error}") from error
        self.actions = box(-1, 1, (self._env.action_size,))
        # not env.observation_size, which runs a reset without compiling it: many seconds
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``."""
        state = self._env.reset(key)
        return Counted(state, jnp.int32(0)), flatten(state.obs)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``; brax's steps draw nothing from the key."""
        inner, steps = self._env.step(state.inner, action), state.steps + 1
        done = jnp.logical_or(inner.done > 0, steps >= self.max_steps)
        return Counted(inner, steps), flatten(inner.obs), scalar(inner.reward), done

    def render(self, states: list[Any], path: Path) -> Path | None:
        """An HTML page with brax's viewer, which the page loads from the network when it is opened."""
        html = require("brax.io.html", extra="rl")
        path = with_ending(path, ".html")
        system = self._env.sys.tree_replace({"opt.timestep": self._env.dt})
        html.save(str(path), system, [state.inner.pipeline_state for state in states])
        return path
