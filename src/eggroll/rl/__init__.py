"""Reinforcement learning: policies in JAX, evolved on JAX's and Gymnasium's environments.

    trained = train(RLConfig(env="CartPole-v1", population_size=256))
    print(trained.result["end_return"])

An environment of your own is a class in the form of ``Environment``; ``make_worker(config, env)`` gives what evolves.
Public names are loaded on first use: importing this package does not load JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.rl.config import RLConfig as RLConfig
    from eggroll.rl.envs.base import Continuous as Continuous
    from eggroll.rl.envs.base import Discrete as Discrete
    from eggroll.rl.envs.base import Environment as Environment
    from eggroll.rl.envs.base import MultiDiscrete as MultiDiscrete
    from eggroll.rl.kind import train as train
    from eggroll.rl.worker import PolicyWorker as PolicyWorker
    from eggroll.rl.worker import make_worker as make_worker

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Continuous": "eggroll.rl.envs.base",
        "Discrete": "eggroll.rl.envs.base",
        "Environment": "eggroll.rl.envs.base",
        "MultiDiscrete": "eggroll.rl.envs.base",
        "PolicyWorker": "eggroll.rl.worker",
        "RLConfig": "eggroll.rl.config",
        "make_worker": "eggroll.rl.worker",
        "train": "eggroll.rl.kind",
    },
    extra="rl",
)
