"""What every environment is to eggroll: pure functions over arrays, one episode at a time.

An adapter turns a library's environment into an :class:`Environment`. Rollouts vmap ``reset`` and ``step`` over
episodes; there is no automatic reset, so an episode that is over is masked by its caller, who never looks at what
``step`` gives after ``done``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # names of environments are looked up without loading JAX
    from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray, PyTree


@dataclass(frozen=True)
class Discrete:
    """One choice out of ``num``; actions are int32 scalars."""

    num: int

    @property
    def num_outputs(self) -> int:
        """Numbers that a policy gives for one action: a logit per choice."""
        return self.num


@dataclass(frozen=True)
class MultiDiscrete:
    """Several choices at once, head ``i`` out of ``nums[i]``; actions are ``(len(nums),)`` int32."""

    nums: tuple[int, ...]

    @property
    def num_outputs(self) -> int:
        """Logits of all heads, one after the other."""
        return sum(self.nums)


@dataclass(frozen=True)
class Continuous:
    """Real numbers between ``low`` and ``high``, each ``(size,)`` float32; actions are ``(size,)`` float32."""

    low: NDArray[np.float32] = field(compare=False)
    high: NDArray[np.float32] = field(compare=False)

    @property
    def size(self) -> int:
        """How many numbers an action has."""
        return int(self.low.size)

    @property
    def num_outputs(self) -> int:
        """One number per dimension."""
        return self.size


ActionSpace = Discrete | MultiDiscrete | Continuous


class Environment(Protocol):
    """A JAX environment: everything here can be traced, vmapped and compiled.

    Attributes:
        name: the canonical name, ``library/Id`` or a bare id.
        obs_size: numbers in an observation.
        actions: what an action is.
        max_steps: steps after which an episode of the library ends by itself (its time limit).
    """

    @property
    def name(self) -> str:
        """Canonical name."""
        ...

    @property
    def obs_size(self) -> int:
        """Numbers in an observation."""
        ...

    @property
    def actions(self) -> ActionSpace:
        """What an action is."""
        ...

    @property
    def max_steps(self) -> int:
        """The library's time limit."""
        ...

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Float[Array, " obs"]]:
        """``key -> (state, observation)``; the observation is ``(obs_size,)`` float32, flattened."""
        ...

    def step(
        self, key: PRNGKeyArray, state: PyTree, action: Num[Array, " *action"]
    ) -> tuple[PyTree, Float[Array, " obs"], Float[Array, ""], Bool[Array, ""]]:
        """``(key, state, action) -> (state, observation, reward, done)``.

        The reward is a float32 scalar, ``done`` a bool scalar: the episode is over, by its own end or its time limit.
        """
        ...

    def render(self, states: list[PyTree], path: Path) -> Path | None:
        """Write one episode's states as an animation to ``path`` plus an ending (``.gif``, ``.html``).

        Returns the file, or ``None`` where the library cannot draw (or lacks what it needs for that).
        """
        ...
