"""What ``eggroll rl`` is about to take of a machine's memory."""

from __future__ import annotations

from functools import partial

import jax

from eggroll.rl.config import RLConfig
from eggroll.rl.envs.base import Environment
from eggroll.rl.envs.gymnasium_env import GymnasiumEnvironment

GYMNASIUM_BYTES = 30_000
"""A small environment of Gymnasium with its wrappers, bytes; those with a physics engine take more."""
COMPILED_BYTES = 200_000_000
"""What compiling the first generation leaves, bytes (170 MB measured with 256 members of CartPole on a CPU)."""
FLOAT = 4
DRAWN = 2
"""Noise is there as bits and as numbers (20 kB a member measured for CartPole's policy of 3 x 256, 13 kB with one)."""


def members_at_once(config: RLConfig) -> int:
    """Members whose episodes are played together, of resolved settings."""
    assert config.population_size is not None
    return min(config.members_per_forward or config.population_size, config.population_size)


def parts_of(config: RLConfig, env: Environment) -> dict[str, int]:
    """Bytes by what they are for, of resolved settings; the environments' own states in JAX are left out."""
    from eggroll.rl.worker import first_policy

    assert config.population_size is not None
    assert config.episodes is not None
    assert config.rank is not None
    policy = jax.tree.leaves(jax.eval_shape(partial(first_policy, config, env)))
    size, members = sum(leaf.size for leaf in policy), members_at_once(config)
    low_rank = config.noiser == "eggroll"
    drawn = sum(config.rank * sum(x.shape) if low_rank and x.ndim == 2 else x.size for x in policy)
    copies = {"sgd": 2, "momentum": 3}.get(str(config.optimizer), 4)  # weights, gradient, the optimizer's own
    widest = max([config.hidden, env.obs_size, *(max(x.shape, default=1) for x in policy)])
    playing = members * config.episodes
    return {
        "weights and optimizer": copies * size * FLOAT,
        "noise of the members that play together": members * drawn * FLOAT * DRAWN,
        "their episodes": playing * (4 * widest * FLOAT + GYMNASIUM_BYTES * isinstance(env, GymnasiumEnvironment)),
        "compiled programs": COMPILED_BYTES,
        "returns of all members": config.population_size * (8 * config.episodes + 16),
    }


def ways_out(config: RLConfig) -> list[str]:
    """What would make a run smaller, the strongest first."""
    found = []
    if members_at_once(config) > 256:
        found.append("fewer members at once (--members-per-forward 256)")
    return [*found, "a smaller population (-p)", "a smaller policy (--hidden, --layers)", "fewer --episodes"]
