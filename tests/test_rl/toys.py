"""Environments small enough for tests, in the form of the library's protocol."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.rl.envs.base import ActionSpace, Continuous, Discrete, MultiDiscrete


class Chase:
    """A point on a line is pulled to a goal: one step left or right, reward the negative distance, ``limit`` steps."""

    def __init__(
        self, actions: ActionSpace | None = None, limit: int = 12, spoil: bool = False, lost: float | None = None
    ) -> None:
        self.name, self.obs_size, self.max_steps = "toy/Chase", 3, limit
        self.actions = actions or Discrete(2)
        self.spoil, self.lost = spoil, lost  # NaN rewards, or what is observed, beyond 0.5

    def reset(self, key: Any) -> tuple[Any, Any]:
        ends = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        state = (ends[0], ends[1], jnp.int32(0))
        return state, self._observe(state)

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        place, goal, time = state
        if isinstance(self.actions, Discrete):
            move = jnp.where(action == 1, 0.2, -0.2)
        elif isinstance(self.actions, MultiDiscrete):
            move = 0.1 * (action[0].astype(jnp.float32) - action[1].astype(jnp.float32))
        else:
            move = 0.3 * action[0]
        state = (place + move, goal, time + 1)
        distance = jnp.abs(state[0] - goal)
        reward = jnp.where(jnp.isnan(distance) | (self.spoil & (place > 0.5)), jnp.nan, -distance)
        return state, self._observe(state), reward.astype(jnp.float32), time + 1 >= self.max_steps

    def render(self, states: list[Any], path: Any) -> Any:
        file = path.with_suffix(".txt")
        file.write_text("\n".join(str(float(state[0])) for state in states))
        return file

    def _observe(self, state: Any) -> Any:
        place, goal, time = state
        seen = place if self.lost is None else jnp.where(place > 0.5, self.lost, place)
        return jnp.stack([seen, goal, time.astype(jnp.float32) * 10.0])


SPACES: dict[str, ActionSpace] = {
    "discrete": Discrete(2),
    "several": MultiDiscrete((3, 3)),
    "continuous": Continuous(np.array([-1.0], np.float32), np.array([1.0], np.float32)),
}
