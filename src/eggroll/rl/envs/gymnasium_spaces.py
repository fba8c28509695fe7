"""Spaces of Gymnasium: how observations become rows of numbers, and a policy's actions the space's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll._optional import require
from eggroll.errors import ConfigError
from eggroll.rl.envs.base import ActionSpace, Continuous, Discrete, MultiDiscrete

OBSERVATIONS = "Box, Discrete, MultiDiscrete or MultiBinary"
ACTIONS = "Discrete, MultiDiscrete, MultiBinary or a Box with bounds"


def check_observations(space: Any, name: str) -> int:
    """Numbers in an observation.

    Raises:
        ConfigError: policies cannot read observations of this kind.
    """
    spaces = require("gymnasium", extra="rl").spaces
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        size = int(np.prod(space.shape))
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        size = int(_choices(space)[0].sum())
    else:
        raise ConfigError(
            f"env {name!r} has observations {space}; policies need numbers ({OBSERVATIONS}). A wrapper such as "
            "gymnasium.wrappers.FlattenObservation in a registered id gives them"
        )
    if size == 0:
        raise ConfigError(f"env {name!r} has observations {space} without a number in them; policies need at least one")
    return size


def flatten(space: Any, observations: Any) -> NDArray[np.float32]:
    """A batch of observations as ``(episodes, obs_size)``: numbers as they are, choices as zeros and a one.

    Raises:
        ValueError: a choice is outside of the space.
    """
    spaces = require("gymnasium", extra="rl").spaces
    rows = np.asarray(observations)
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return np.asarray(rows, np.float32).reshape(len(rows), -1)
    nums, start = _choices(space)
    chosen = rows.reshape(len(rows), -1).astype(np.int64) - start
    if ((chosen < 0) | (chosen >= nums)).any():
        bad = rows[((chosen < 0) | (chosen >= nums)).any(axis=1)][0]
        raise ValueError(f"the observation {bad} is not in {space}")
    flat = np.zeros((len(rows), int(nums.sum())), np.float32)
    np.put_along_axis(flat, chosen + np.cumsum(nums) - nums, 1.0, axis=1)
    return flat


def policy_actions(space: Any, name: str) -> ActionSpace:
    """What a policy chooses for actions of this space; :func:`own_actions` gives them to the environment.

    Raises:
        ConfigError: policies cannot give actions of this kind.
    """
    spaces = require("gymnasium", extra="rl").spaces
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        if nums := tuple(int(number) for number in _choices(space)[0]):
            return MultiDiscrete(nums)
    elif isinstance(space, spaces.Box) and np.prod(space.shape):
        # Policies compute in float32, in which the widest bounds are infinitely far apart.
        with np.errstate(over="ignore"):
            low, high = (bound.astype(np.float32).ravel() for bound in (space.low, space.high))
            wide = not np.isfinite(high - low).all()
        if space.is_bounded() and not wide:
            return Continuous(low, high)
    raise ConfigError(
        f"env {name!r} has actions {space}; policies know {ACTIONS}, at least one number each. A wrapper such as "
        "gymnasium.wrappers.RescaleAction or TransformAction in a registered id gives them"
    )


def own_actions(space: Any, chosen: Any) -> list[Any]:
    """The actions of a policy, ``(episodes, *action)``, as elements of the space in its shape and dtype."""
    spaces = require("gymnasium", extra="rl").spaces
    rows = np.asarray(chosen)
    if isinstance(space, spaces.Box):
        rows = _within(rows.reshape(len(rows), *space.shape), space)
    else:
        start = _choices(space)[1].reshape(space.shape)
        rows = (rows.reshape(len(rows), *space.shape).astype(np.int64) + start).astype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return list(rows)  # scalars of NumPy, as the space's samples are
    return [np.asarray(row) for row in rows]


def _choices(space: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many values each number of a discrete space has, and the first of them, both flat."""
    spaces = require("gymnasium", extra="rl").spaces
    if isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
        return np.full(size, 2), np.zeros(size, np.int64)
    nums = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return np.atleast_1d(nums).astype(np.int64).ravel(), np.atleast_1d(space.start).astype(np.int64).ravel()


def _within(rows: NDArray[Any], space: Any) -> NDArray[Any]:
    """Numbers in the dtype of a Box, the nearest whole ones where it has those, and never beyond its bounds."""
    if np.issubdtype(space.dtype, np.floating):
        return np.clip(rows.astype(space.dtype), space.low, space.high)
    # Float64 does not have all whole numbers of 64 bits: the bounds are taken as they are, not by way of a float.
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    rounded = np.rint(rows.astype(np.float64))
    inside = (rounded > low) & (rounded < high)
    whole = np.where(inside, rounded, 0.0).astype(space.dtype)
    return np.where(inside, whole, np.where(rounded >= high, space.high, space.low)).astype(space.dtype)
