"""What the adapters share: flat observations, action spaces in the style of gymnax, counted steps, GIFs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eggroll._optional import require
from eggroll.errors import MissingExtraError
from eggroll.rl.envs.base import ActionSpace, Continuous, Discrete

DEFAULT_MAX_STEPS = 1000
"""Time limit of environments whose library has none."""

MAX_FRAMES = 300
"""Longer episodes are drawn with fewer frames: a GIF of 10000 would take minutes and hundreds of megabytes."""

SLOW_FRAMES = 100
"""The same for what matplotlib draws, at a tenth of a second each and more."""


class Counted(NamedTuple):
    """A library's state and the steps so far, for libraries that have no time limit of their own."""

    inner: Any
    steps: Any


def flatten(observation: Any) -> Any:
    """All arrays of an observation in one ``(obs_size,)`` float32 vector, in the order of ``jax.tree.leaves``.

    Values are cast, never scaled: masks become 0 and 1, codes of grid cells stay codes. Bringing observations to a
    common scale is the business of the policy, which sees their statistics.
    """
    leaves = jax.tree.leaves(observation)
    return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)).astype(jnp.float32) for leaf in leaves])


def scalar(reward: Any) -> Any:
    """A float32 scalar, not weakly typed (a weak type changes inside ``lax.scan``); several agents are summed."""
    return jnp.sum(jnp.asarray(reward, jnp.float32))


def observation_size(reset: Callable[[Any], tuple[Any, Any]]) -> int:
    """Numbers in the observation that ``reset(key) -> (state, observation)`` gives, without computing one."""
    shape: tuple[int, ...] = jax.eval_shape(reset, jax.random.key(0))[1].shape
    return shape[0]


def box(low: Any, high: Any, shape: tuple[int, ...]) -> Continuous:
    """Bounds, scalars or arrays, as flat arrays for an action of ``shape``."""
    return Continuous(*(np.broadcast_to(np.asarray(bound, np.float32), shape).reshape(-1) for bound in (low, high)))


def action_space(space: Any) -> ActionSpace:
    """A ``Discrete`` or ``Box`` of gymnax or of a library that copies its spaces."""
    return Discrete(int(space.n)) if hasattr(space, "n") else box(space.low, space.high, tuple(space.shape))


def frames_of(states: list[Any], *, most: int = MAX_FRAMES) -> list[Any]:
    """At most ``most`` of the states, evenly spaced, the first and the last among them."""
    picked = np.linspace(0, len(states) - 1, min(len(states), most)).round().astype(int)
    return [states[i] for i in picked]


def with_ending(path: Path, ending: str) -> Path:
    """``path`` plus an ending (nothing is cut off: ``step-1.5`` becomes ``step-1.5.gif``); makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path if path.suffix == ending else path.with_name(path.name + ending)


def write_gif(frames: Iterable[Any], path: Path, *, milliseconds: int) -> Path | None:
    """Write images ``(height, width, 3)`` with values in [0, 255], small ones enlarged; None without Pillow."""
    try:
        convert = require("PIL.Image", extra="rl").fromarray
    except MissingExtraError:
        return None
    arrays = [np.asarray(frame).clip(0, 255).astype(np.uint8) for frame in frames]
    zoom = max(1, 400 // max(arrays[0].shape))
    pictures = [convert(array.repeat(zoom, axis=0).repeat(zoom, axis=1)) for array in arrays]
    path = with_ending(path, ".gif")
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return path
