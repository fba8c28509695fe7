"""Gymnasium's environments: the same policies and updates, episodes stepped on the host through its vectorised API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll._optional import require
from eggroll.jax.noise import draw_pairs, seed_key
from eggroll.jax.transform import MemberNoise
from eggroll.loop import Evaluation
from eggroll.rl.envs.gymnasium_env import GymEnvironment
from eggroll.rl.policies import LARGEST, ObsStats, act, forward
from eggroll.rl.worker import PolicyLearner


class GymLearner(PolicyLearner):
    """A policy under evolution whose episodes are stepped on the host, all members of a part at once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.env: GymEnvironment = self.rollouts.env  # type: ignore[assignment]
        self._act_pairs = jax.jit(self._pairs_actions)
        self._act_centre = jax.jit(self._centre_actions)
        self._draw_pairs = jax.jit(self._draws)

    def _draws(self, generation: Any, pairs: Any) -> Any:
        return draw_pairs(seed_key(self.config.seed), self.leaves, self.config.rank, generation, pairs)

    def _actions(self, raw: Any, key: Any) -> Any:
        flat = raw.reshape(-1, raw.shape[-1])
        if not self.rollouts.sampling:
            return jax.vmap(lambda row: act(row, self.env.actions, None))(flat)
        keys = jax.random.split(key, flat.shape[0])
        return jax.vmap(lambda row, own: act(row, self.env.actions, own))(flat, keys)

    def _pairs_actions(self, params: Any, stats: ObsStats, draws: Any, sigma: Any, x: Any, key: Any) -> Any:
        seen = stats.normalize(x) if self.rollouts.normalize else x

        def member(noise: Any, scale: Any, rows: Any) -> Any:
            return self.rollouts.policy(params, rows, MemberNoise(noise, scale))

        both = jax.vmap(member, in_axes=(None, 0, 0))
        raw = jax.vmap(both, in_axes=(0, None, 0))(draws, jnp.array([sigma, -sigma]), seen)
        return self._actions(raw, key)

    def _centre_actions(self, params: Any, stats: ObsStats, x: Any, key: Any) -> Any:
        return self._actions(forward(params, stats.normalize(x) if self.rollouts.normalize else x), key)

    def evaluate(self, generation: int, sigma: float) -> Evaluation:
        """The members' mean returns; both members of a pair start from the same seeds."""
        pairs, episodes = self.config.population_size // 2, self.rollouts.episodes
        at_once = min(self.rollouts.pairs_at_once or pairs, pairs)
        returns = np.zeros((pairs, 2, episodes))
        sums = [np.zeros(()), np.zeros(self.env.obs_size), np.zeros(self.env.obs_size)]
        lengths = 0
        for start in range(0, pairs, at_once):
            numbers = np.arange(start, min(start + at_once, pairs), dtype=np.int32)
            draws = self._draw_pairs(jnp.int32(generation), numbers)
            own = _seeds(self.config.seed, generation, numbers, episodes)
            seeds = np.repeat(own[:, None], 2, axis=1).ravel()
            shape = (len(numbers), 2, episodes, self.env.obs_size)

            def actions(x: np.ndarray, key: Any, draws: Any = draws, shape: tuple[int, ...] = shape) -> np.ndarray:
                rows = jnp.asarray(x).reshape(shape)
                return np.asarray(self._act_pairs(self.state.params, self.stats, draws, jnp.float32(sigma), rows, key))

            played, steps, seen = self._play(seeds, actions, collect=True)
            returns[numbers] = played.reshape(len(numbers), 2, episodes)
            sums = [total + part for total, part in zip(sums, seen, strict=True)]
            lengths += int(steps.sum())
        count, total, squares = (jnp.asarray(value, jnp.float32) for value in sums)
        self._seen = ObsStats.of_sums(count, total, squares, self.stats.mean), lengths
        return self.evaluation(returns.reshape(2 * pairs, episodes), lengths / returns.size)

    def heldout(self, episodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns and lengths of the centre's held-out episodes."""
        seeds = _seeds(self.config.seed, 2**31, np.arange(1), episodes).ravel()

        def actions(x: np.ndarray, key: Any) -> np.ndarray:
            return np.asarray(self._act_centre(self.state.params, self.stats, jnp.asarray(x), key))

        returns, lengths, _ = self._play(seeds, actions)
        return returns, lengths

    def draw(self, path: Path) -> tuple[Path, float] | None:
        """An animated GIF of one held-out episode, where the environment renders to arrays."""
        gymnasium = require("gymnasium", extra="rl")
        try:
            from PIL import Image

            env = gymnasium.make(self.env.id, render_mode="rgb_array")
        except Exception:  # whatever a renderer lacks, a run is not lost for want of a picture
            return None
        seed = int(_seeds(self.config.seed, 2**31, np.arange(1), 1).ravel()[0])
        try:
            x, _ = env.reset(seed=seed)
            frames, total = [env.render()], 0.0
            for step in range(self.max_steps):
                rows = jnp.asarray(self._flatten(np.asarray(x)[None]))
                action = self._act_centre(self.state.params, self.stats, rows, jax.random.key(step))
                x, reward, terminated, truncated, _ = env.step(np.asarray(action)[0])
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

    def _play(
        self, seeds: np.ndarray, actions: Callable[[np.ndarray, Any], np.ndarray], *, collect: bool = False
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        gymnasium = require("gymnasium", extra="rl")
        count = len(seeds)
        envs = gymnasium.make_vec(self.env.id, num_envs=count, vectorization_mode="sync")
        mean = np.asarray(self.stats.mean)
        sums = [np.zeros(()), np.zeros(self.env.obs_size), np.zeros(self.env.obs_size)]
        x, _ = envs.reset(seed=[int(seed) for seed in seeds])
        returns, lengths, alive = np.zeros(count), np.zeros(count, int), np.ones(count, bool)
        key = jax.random.key(int(seeds[0]))
        try:
            for step in range(self.max_steps):
                rows = self._flatten(x)
                if collect:
                    shifted = rows[alive & (np.abs(rows) <= LARGEST).all(axis=1)] - mean
                    sums = [sums[0] + len(shifted), sums[1] + shifted.sum(0), sums[2] + (shifted**2).sum(0)]
                chosen = actions(rows, jax.random.fold_in(key, step))
                x, rewards, terminated, truncated, _ = envs.step(chosen)
                returns += np.where(alive, rewards, 0.0)
                lengths += alive
                alive &= ~(terminated | truncated)
                if not alive.any():
                    break
        finally:
            envs.close()
        return returns, lengths, sums

    def _flatten(self, x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:  # Discrete: one of obs_size
            return np.eye(self.env.obs_size, dtype=np.float32)[x]
        return np.asarray(x, np.float32).reshape(len(x), -1)


def _seeds(seed: int, generation: int, pairs: np.ndarray, episodes: int) -> np.ndarray:
    """``(pairs, episodes)`` seeds, a function of their address."""
    rows = [np.random.SeedSequence([seed, generation, int(pair)]).generate_state(episodes) for pair in pairs]
    return np.array(rows, np.uint32) % (2**31 - 1)
