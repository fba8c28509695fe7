"""Episodes in Gymnasium's environments, stepped on the host through its vectorized interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, PyTree
from numpy.typing import NDArray

from eggroll._optional import require
from eggroll.rl.envs.gymnasium_env import GymnasiumEnvironment, calling
from eggroll.rl.envs.gymnasium_spaces import flatten, own_actions
from eggroll.rl.policies import LARGEST, ObsStats, act, forward
from eggroll.rl.rollouts import HELDOUT, Played, Rollouts

Actions = Callable[[NDArray[np.float32], PRNGKeyArray], NDArray[Any]]
"""Observations ``(episodes, obs_size)`` and a key to actions, one for each episode."""


class GymnasiumRollouts(Rollouts):
    """Episodes in a Gymnasium environment; the policies of all members of a part act in one compiled call a step."""

    env: GymnasiumEnvironment

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._act_pairs = jax.jit(self._pairs_actions)
        self._act_center = jax.jit(self._center_actions)
        self._draws = jax.jit(self.draws)

    def population(
        self, params: PyTree, stats: ObsStats, generation: int, sigma: float, pairs: Int[Array, " pairs"]
    ) -> Played:
        """All episodes of some pairs: arrays ``(pairs, 2, episodes)``; both members of a pair have the same seeds."""
        at_once = min(self.pairs_at_once or len(pairs), len(pairs))
        parts = [
            self._part(params, stats, generation, sigma, np.asarray(pairs[start : start + at_once], np.int32))
            for start in range(0, len(pairs), at_once)
        ]
        count, total, squares = (
            sum((getattr(part, name) for part in parts), np.zeros(1)) for name in ("count", "total", "squares")
        )
        returns, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("returns", "lengths"))
        return Played(returns, lengths, count, total, squares)

    def center(self, params: PyTree, stats: ObsStats, count: int) -> Played:
        """Held-out episodes of the unperturbed policy, the same ones each time: arrays ``(count,)``."""

        def actions(x: NDArray[np.float32], key: PRNGKeyArray) -> NDArray[Any]:
            return np.asarray(self._act_center(params, stats, jnp.asarray(x), key))

        return self._play(self._seeds(HELDOUT, np.arange(1), count).ravel(), actions, np.asarray(stats.mean))

    def draw(self, params: PyTree, stats: ObsStats, path: Path) -> tuple[Path, float] | None:
        """An animated GIF of one held-out episode, where the environment renders to arrays."""
        gymnasium = require("gymnasium", extra="rl")
        try:
            from PIL import Image

            env = gymnasium.make(self.env.id, render_mode="rgb_array")
        except Exception:  # whatever a renderer lacks, a run is not lost for want of a picture
            return None
        seed = int(self._seeds(HELDOUT, np.arange(1), 1).ravel()[0])
        try:
            x, _ = env.reset(seed=seed)
            frames, total = [env.render()], 0.0
            for step in range(self.max_steps):
                rows = jnp.asarray(self._flatten(np.asarray(x)[None]))
                action = self._act_center(params, stats, rows, jax.random.key(step))
                x, reward, terminated, truncated, _ = env.step(own_actions(self.env.action_space, action)[0])
                total += float(reward)
                frames.append(env.render())
                if terminated or truncated:
                    break
        except Exception:
            return None
        finally:
            env.close()
        images = [Image.fromarray(np.asarray(frame)) for frame in frames[:: max(1, len(frames) // 200)]]
        file = path.with_suffix(".gif")
        images[0].save(file, save_all=True, append_images=images[1:], duration=40, loop=0)
        return file, total

    def _part(self, params: PyTree, stats: ObsStats, generation: int, sigma: float, pairs: NDArray[np.int32]) -> Played:
        draws = self._draws(params, jnp.int32(generation), pairs)
        seeds = np.repeat(self._seeds(generation, pairs, self.episodes)[:, None], 2, axis=1)
        shape = (*seeds.shape, self.env.obs_size)

        def actions(x: NDArray[np.float32], key: PRNGKeyArray) -> NDArray[Any]:
            rows = jnp.asarray(x).reshape(shape)
            return np.asarray(self._act_pairs(params, stats, draws, jnp.float32(sigma), rows, key))

        played = self._play(seeds.ravel(), actions, np.asarray(stats.mean))
        return Played(
            played.returns.reshape(seeds.shape), played.lengths.reshape(seeds.shape),
            played.count, played.total, played.squares,
        )  # fmt: skip

    def _pairs_actions(
        self,
        params: PyTree,
        stats: ObsStats,
        draws: dict[str, Any],
        sigma: Float[Array, ""],
        x: Float[Array, "pairs 2 episodes obs"],
        key: PRNGKeyArray,
    ) -> Num[Array, "flat *action"]:
        seen = stats.normalize(x) if self.normalize else x
        return self._actions(self.outputs(params, draws, sigma, seen), key)

    def _center_actions(
        self, params: PyTree, stats: ObsStats, x: Float[Array, "episodes obs"], key: PRNGKeyArray
    ) -> Num[Array, "episodes *action"]:
        return self._actions(forward(params, stats.normalize(x) if self.normalize else x), key)

    def _actions(self, raw: Float[Array, "... outputs"], key: PRNGKeyArray) -> Num[Array, "flat *action"]:
        flat = raw.reshape(-1, raw.shape[-1])
        if not self.sampling:
            return jax.vmap(lambda row: act(row, self.env.actions, None))(flat)
        keys = jax.random.split(key, flat.shape[0])
        return jax.vmap(lambda row, own: act(row, self.env.actions, own))(flat, keys)

    def _play(self, seeds: NDArray[np.uint32], actions: Actions, mean: NDArray[np.float32]) -> Played:
        """One episode for each seed; sums of observations are of ``x - mean``."""
        gymnasium = require("gymnasium", extra="rl")
        count = len(seeds)
        sums = [np.zeros(()), np.zeros(self.env.obs_size), np.zeros(self.env.obs_size)]
        returns, lengths, alive = np.zeros(count), np.zeros(count, int), np.ones(count, bool)
        key = jax.random.key(int(seeds[0]))
        with calling(self.env, "its constructor"):
            envs = gymnasium.make_vec(self.env.id, num_envs=count, vectorization_mode="sync")
        try:
            with calling(self.env, "reset"):
                x, _ = envs.reset(seed=[int(seed) for seed in seeds])
            for step in range(self.max_steps):
                with calling(self.env, "step" if step else "reset"):
                    rows = self._flatten(x)
                shifted = rows[alive & (np.abs(rows) <= LARGEST).all(axis=1)] - mean
                sums = [sums[0] + len(shifted), sums[1] + shifted.sum(0), sums[2] + (shifted**2).sum(0)]
                chosen = own_actions(self.env.action_space, actions(rows, jax.random.fold_in(key, step)))
                with calling(self.env, "step"):
                    x, rewards, terminated, truncated, _ = envs.step(chosen)
                returns += np.where(alive, rewards, 0.0)
                lengths += alive
                alive &= ~(terminated | truncated)
                if not alive.any():
                    break
        finally:
            with calling(self.env, "close"):
                envs.close()
        return Played(returns, lengths, *(value[None] for value in sums))

    def _seeds(self, generation: int, pairs: NDArray[Any], episodes: int) -> NDArray[np.uint32]:
        """``(pairs, episodes)`` seeds, a function of their address."""
        rows = [np.random.SeedSequence([self.seed, generation, int(pair)]).generate_state(episodes) for pair in pairs]
        return np.array(rows, np.uint32) % (2**31 - 1)

    def _flatten(self, x: Any) -> NDArray[np.float32]:
        return flatten(self.env.observation_space, x)
