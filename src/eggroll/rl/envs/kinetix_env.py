"""Kinetix: hand-made levels of a 2D physics puzzle (https://github.com/FlairOx/Kinetix)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eggroll._optional import require
from eggroll.rl.envs._common import box, flatten, frames_of, observation_size, scalar, write_gif
from eggroll.rl.envs.base import ActionSpace, Discrete, MultiDiscrete


def ids() -> list[str]:
    """The levels that come with Kinetix, ``size/name`` with a size of s, m or l."""
    spec = importlib.util.find_spec("kinetix")
    if spec is None:
        require("kinetix", extra="kinetix")
    folders = [] if spec is None else [Path(place) / "levels" for place in spec.submodule_search_locations or ()]
    files = (file for folder in folders for file in sorted(folder.glob("*/*.json")))
    return [f"{file.parent.name}/{file.stem}" for file in files]


class KinetixEnvironment:
    """A level of Kinetix with flat symbolic observations.

    Every level of a size has the same observations and actions: four groups of motors and two of thrusters.

    Args:
        id: the level, such as ``l/hard_pinball``.
        name: the canonical name.
        actions: ``multi_discrete``, one of three choices for each group of motors, of two for each of thrusters;
            ``discrete``, one group at a time; or ``continuous``, a number for each.
    """

    def __init__(self, id: str, name: str, *, actions: str = "multi_discrete") -> None:
        self.name = name
        kinetix = require("kinetix.environment", extra="kinetix")
        load = require("kinetix.util.saving", extra="kinetix").load_from_json_file
        level, self._static, self._params = load(f"{id}.json")
        self._env = kinetix.make_kinetix_env(
            kinetix.ActionType.from_string(actions),
            kinetix.ObservationType.SYMBOLIC_FLAT,
            reset_fn=lambda key: level,
            env_params=self._params,
            static_env_params=self._static,
            auto_reset=False,
        )
        self.actions = self._actions(actions)
        self.max_steps = int(self._params.max_timesteps)
        self.obs_size = observation_size(self.reset)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """``key -> (state, observation)``; a level starts the same every time."""
        observation, state = self._env.reset(key, self._params)
        return state, flatten(observation)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """``(key, state, action) -> (state, observation, reward, done)``."""
        observation, state, reward, done, _ = self._env.step(key, state, action, self._params)
        return state, flatten(observation), scalar(reward), done

    def render(self, states: list[Any], path: Path) -> Path | None:
        """A GIF of the whole level."""
        pixels = require("kinetix.render.renderer_pixels", extra="kinetix")
        # the renderer's x axis comes first and its y axis points upwards
        draw = jax.jit(pixels.make_render_pixels(self._params, self._static.replace(downscale=2)))
        frames = (np.asarray(draw(state)).transpose(1, 0, 2)[::-1] for state in frames_of(states))
        return write_gif(frames, path, milliseconds=50)

    def _actions(self, kind: str) -> ActionSpace:
        motors, thrusters = self._static.num_motor_bindings, self._static.num_thruster_bindings
        if kind == "multi_discrete":
            return MultiDiscrete((3,) * motors + (2,) * thrusters)
        if kind == "discrete":
            return Discrete(int(self._env.action_space(self._params).n))
        # Kinetix says [-1, 1] for all, but cuts the thrusters' at 0: a policy would lose half of its range
        low = np.array([-1.0] * motors + [0.0] * thrusters)
        return box(low, np.ones_like(low), low.shape)
