"""cartpole: a policy 4-64-2 learns to balance a pole; every member plays its own episode, all of them at once.

    eggroll recipe cartpole [--population 512] [--generations N] [--seed N]

Expected: EXPECTED
The run ends when the centre's mean return over the episodes it is watched with is 500, the most there is, twice in a
row. The result is measured on 100 episodes that the run has not seen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from eggroll.recipes.common import Options, evolve, finish
from numpy.typing import NDArray
from torch import Tensor, nn

from eggroll._optional import require
from eggroll.core.config import ESConfig
from eggroll.torch.es import Replica

LONGEST = 500
SOLVED = 475.0


@dataclass(frozen=True)
class CartPoleOptions(Options):
    """CartPole-v1 with gymnasium's vectorised environment."""

    population: int = 512
    generations: int = 60
    rank: int = 4
    sigma: float = 0.2
    lr: float = 0.1
    episodes: int = 1
    """Episodes of each member in a generation."""


def network() -> nn.Sequential:
    """4-64-2."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))


def returns(policy: nn.Module, count: int, seed: int, device: torch.device) -> NDArray[np.float32]:
    """Play ``count`` episodes at once, row ``i`` of the policy's inputs being episode ``i``; their returns."""
    gymnasium = require("gymnasium", extra="recipes")
    envs = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
    observations, _ = envs.reset(seed=seed)
    total, running = np.zeros(count, np.float32), np.ones(count, bool)
    with torch.no_grad():
        for _ in range(LONGEST):
            x = torch.from_numpy(np.asarray(observations, np.float32)).to(device)
            actions = policy(x).argmax(-1).cpu().numpy()
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            total += rewards * running
            running &= ~(terminated | truncated)
            if not running.any():
                break
    envs.close()
    return total


def replica_for(options: CartPoleOptions) -> Replica:
    """The policy with its first weights, and how it is evolved."""
    torch.manual_seed(options.seed)
    config = ESConfig(
        population_size=options.population, generations=options.generations, rank=options.rank, sigma=options.sigma,
        lr=options.lr, optimizer="adam", fitness_shaping="centered_rank", seed=options.seed,
    )  # fmt: skip
    return Replica(network().eval().to(options.place()), config, kinds=("matrix", "vector"))


def run(options: CartPoleOptions) -> dict[str, Any]:
    """Evolve the policy; returns what is in ``result.json``."""
    device = options.place()
    replica = replica_for(options)
    policy = replica.model
    seeds = np.random.SeedSequence(options.seed).generate_state(options.generations + 2).tolist()
    env_steps = 0.0

    def evaluate(generation: int, sigma: float) -> Tensor:
        nonlocal env_steps

        def fitness(active: Any) -> Tensor:
            # Every member plays the episodes of its own rows: member p has the rows p * episodes and on.
            count = active.members * options.episodes
            played = returns(policy, count, seeds[generation] + active.first, device)
            return torch.from_numpy(played).view(active.members, -1).mean(1)

        scores = replica.population.scores(
            fitness, generation, sigma=sigma, members_per_forward=options.members_per_forward
        )
        env_steps += float(scores.sum()) * options.episodes
        return scores

    watched: list[float] = []

    def heldout() -> float:
        watched.append(float(returns(policy, 32, seeds[-2], device).mean()))
        return watched[-1]

    run_dir, seconds = evolve(
        "cartpole", options, replica, evaluate, heldout, eval_every=1,
        stop=lambda _: watched[-2:] == [LONGEST, LONGEST],
    )  # fmt: skip
    final = returns(policy, 100, seeds[-1], device)
    return finish(
        run_dir,
        seconds,
        {
            "mean_return": float(final.mean()),
            "worst_return": float(final.min()),
            "solved": bool(final.mean() >= SOLVED),
            "generations": len(run_dir.updates()),
            "env_steps": int(env_steps),
            "env_steps_per_s": env_steps / seconds,
        },
    )


if __name__ == "__main__":
    run(tyro.cli(CartPoleOptions, description=__doc__))
    sys.exit(0)
