"""PPO from rejax on the same environments, with a network of the same width, to compare with."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll._optional import require
from eggroll.core.settings import flag_of, to_json_values
from eggroll.errors import ConfigError
from eggroll.rl.config import RLConfig
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import Continuous, Discrete, Environment, MultiDiscrete
from eggroll.run.run_dir import RunDir

DEFAULT_STEPS = 1_000_000
PPO_SETTINGS: dict[str, Any] = {
    "num_envs": 64, "num_steps": 128, "num_epochs": 4, "num_minibatches": 16, "learning_rate": 3e-4, "gamma": 0.99,
    "gae_lambda": 0.95, "clip_eps": 0.2, "ent_coef": 0.001, "max_grad_norm": 0.5, "normalize_observations": True,
}  # fmt: skip
"""Within the search ranges that the paper gives PPO: clip .1-.3, gae .9-.98, lr 1e-4 to 1e-3, 64-256 environments."""


OF_EVOLUTION = (
    "preset", "population_size", "rank", "sigma", "lr", "optimizer", "lr_decay", "sigma_decay", "rank_transform",
    "episodes", "noiser", "generations", "devices", "members_per_forward", "workers", "ray_address", "worker_cpus",
    "worker_gpus", "patience",
)  # fmt: skip
"""Options that PPO has no use for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limit:
    """What rejax asks an environment's parameters for."""

    max_steps_in_episode: int = dataclasses.field(metadata={"static": True})


class Restarting:
    """An environment as rejax wants it: Gymnax's call form of five values, and a new episode after the end of one.

    Several choices at once become one choice among all their combinations, which is all that rejax's policies know.
    """

    def __init__(self, env: Environment, max_steps: int) -> None:
        self.env, self.default_params = env, Limit(max_steps)

        def restart(key: Any, done: Any, now: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(done, new, old), env.reset(key), now)

        def restart_some(size: int, batched: Any, key: Any, done: Any, now: Any) -> Any:
            """Nothing is reset in a step in which no episode ends: making a world can cost more than many steps."""
            axes = jax.tree.map(lambda has: 0 if has else None, batched)
            given = jax.tree.map(
                lambda has, value: value if has else jnp.broadcast_to(value, (size, *value.shape)), batched[2], now
            )
            after = jax.lax.cond(
                jnp.any(done),
                lambda: jax.vmap(restart, (axes[0], axes[1], 0), axis_size=size)(key, done, given),
                lambda: given,
            )
            return after, jax.tree.map(lambda _: True, after)

        self._restart = jax.custom_batching.custom_vmap(restart)
        self._restart.def_vmap(restart_some)

    def __deepcopy__(self, memo: Any) -> Restarting:
        """Itself: rejax copies its settings while it is being traced, which Jumanji's specs do not survive."""
        return self

    def reset(self, key: Any, params: Any) -> tuple[Any, Any]:
        """``(observation, state)``."""
        state, observation = self.env.reset(key)
        return observation, (state, jnp.int32(0))

    def step(self, key: Any, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        """``(observation, state, reward, done, info)``."""
        inner, steps = state
        step_key, reset_key = jax.random.split(key)
        inner, observation, reward, done = self.env.step(step_key, inner, self._action(action))
        done = done | (steps + 1 >= params.max_steps_in_episode)
        inner, observation = self._restart(reset_key, done, (inner, observation))
        return observation, (inner, jnp.where(done, 0, steps + 1)), reward, done, {}

    def _action(self, action: Any) -> Any:
        space = self.env.actions
        if isinstance(space, MultiDiscrete):
            return jnp.stack(jnp.unravel_index(action, space.nums)).astype(jnp.int32)
        if isinstance(space, Continuous):
            return jnp.clip(jnp.asarray(action, jnp.float32).reshape(space.size), space.low, space.high)
        return jnp.asarray(action, jnp.int32)

    def action_space(self, params: Any = None) -> Any:
        """A space of Gymnax."""
        from gymnax.environments import spaces

        space = self.env.actions
        if isinstance(space, Continuous):
            return spaces.Box(jnp.asarray(space.low), jnp.asarray(space.high), (space.size,), jnp.float32)
        return spaces.Discrete(space.num if isinstance(space, Discrete) else math.prod(space.nums))

    def observation_space(self, params: Any = None) -> Any:
        """A space of Gymnax."""
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (self.env.obs_size,), jnp.float32)


def _strong(state: Any) -> Any:
    """Without weak types, of which an iteration returns others than it is given: it would be compiled twice."""

    def strong(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, leaf.dtype)

    return jax.tree.map(strong, state)


def ppo(config: RLConfig, say: Callable[[str], Any]) -> dict[str, Any]:
    """Train PPO for ``config.env_steps`` steps; returns what is in ``result.json``.

    Args:
        config: the settings; those of evolution are refused.
        say: prints a line.

    Raises:
        MissingExtraError: rejax is not installed.
        ConfigError: the environment is Gymnasium's, a resume is asked for, or a setting cannot work here.
    """
    require("rejax", extra="rl")
    from rejax import PPO
    from rejax.evaluate import evaluate

    from eggroll.rl.curve import write_curve

    if registry.resolve(config.env)[0] == "gymnasium":
        raise ConfigError(f"--algo ppo: rejax needs an environment in JAX, and {config.env} is Gymnasium's")
    if config.resume is not None:
        raise ConfigError("--algo ppo cannot be resumed; start it again with another directory (-o)")
    problems = [*config.problems()]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [flag_of(name) for name in OF_EVOLUTION if getattr(config, name) != defaults[name]]
    if given:
        problems.append(
            f"{', '.join(given)} would do nothing with --algo ppo, whose settings are fixed; leave them out"
        )
    if problems:
        raise ConfigError.from_problems("eggroll rl --algo ppo", problems)
    env = registry.make(config.env)
    max_steps = min(config.max_steps or env.max_steps, env.max_steps)
    steps = DEFAULT_STEPS if config.env_steps is None else config.env_steps
    settings = {**PPO_SETTINGS, "normalize_observations": config.normalize_obs}
    view = Restarting(env, max_steps)
    agent = {"activation": "relu", "hidden_layer_sizes": (config.hidden,) * config.layers}
    algorithm = PPO.create(env=view, agent_kwargs=agent, total_timesteps=steps, **settings)
    path = Path(config.output or f"runs/ppo-{env.name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")
    run = RunDir.create(path, {"kind": "rl-ppo", **to_json_values(config, RLConfig), "env": env.name, **settings})
    per_iteration = PPO_SETTINGS["num_envs"] * PPO_SETTINGS["num_steps"]
    iterations = max(1, steps // per_iteration)
    say(f"{env.name}: PPO, {iterations} iterations of {per_iteration:,} steps; run directory {path}")
    state = jax.jit(lambda key: _strong(algorithm.init_state(key)))(jax.random.key(config.seed % 2**32))
    iterate = jax.jit(lambda state: _strong(algorithm.train_iteration(state)))
    heldout_key = jax.random.key((config.seed + 1_000_003) % 2**32)

    def heldout_returns(state: Any) -> Any:
        act = algorithm.make_act(state)
        return evaluate(act, heldout_key, view, view.default_params, config.eval_episodes, max_steps)[1]

    # rejax takes the policy as a static argument: without a compiled call around it, each evaluation would be compiled.
    evaluation = jax.jit(heldout_returns)
    every = max(1, iterations // 20)
    best, score, first, spent = -math.inf, math.nan, math.nan, 0.0
    for number in range(iterations + 1):
        if number:
            began = time.perf_counter()
            state = jax.block_until_ready(iterate(state))
            spent += time.perf_counter() - began
        if number % every == 0 or number == iterations:
            score = float(np.mean(evaluation(state)))
            first = score if number == 0 else first
            best = max(best, score)
            run.append_metrics(
                {"generation": number, "heldout_reward": score, "env_steps": number * per_iteration, "elapsed_s": spent}
            )
            say(f"iteration {number:>5}/{iterations}  steps {number * per_iteration:>11,}  held-out return {score:.4g}")
    result = {
        "env": env.name, "algo": "ppo", "start_return": first, "end_return": score, "best_return": best,
        "heldout_episodes": config.eval_episodes, "env_steps": iterations * per_iteration, "seconds": round(spent, 1),
    }  # fmt: skip
    run.write_file("result.json", (json.dumps(result, indent=1) + "\n").encode())
    run.write_file("curve.png", write_curve(run.metrics(), title=f"{env.name}, PPO"))
    return result
