"""The settings of ``eggroll rl``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from eggroll.core.check import numbers, whole
from eggroll.core.config import ESConfig, OptimizerName
from eggroll.errors import ConfigError
from eggroll.rl.presets import COLUMNS, preset

FREE = (
    "generations",
    "output",
    "resume",
    "report_to",
    "members_per_forward",
    "devices",
    "render",
    "list",
    "eval_every",
    "env_steps",
)
"""Options that a resumed run may have other values of: they change no weight."""


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Evolve a policy for an environment. What is not given is the paper's value for that environment."""

    env: str = "CartPole-v1"
    """Environment, such as navix-DoorKey-8x8, brax/ant, gymnasium/HalfCheetah-v5; --list shows the paper's sixteen."""
    pop_size: Annotated[int | None, tyro.conf.arg(aliases=["-p"])] = None
    """Members per generation; both signs of a pair count."""
    rank: int | None = None
    """Rank of the perturbations."""
    sigma: float | None = None
    """Standard deviation of the perturbations in the first generation."""
    lr: float | None = None
    """Learning rate of the first generation, in the paper's scale (docs/scale-conventions.md)."""
    generations: Annotated[int, tyro.conf.arg(aliases=["-g"])] = 200
    """Updates."""
    env_steps: int | None = None
    """End the run after so many environment steps of the members (PPO: 1,000,000 if not given)."""
    optimizer: OptimizerName | None = None
    """sgd, momentum, adam or adamw."""
    lr_decay: float | None = None
    """Factor on the learning rate in each generation."""
    sigma_decay: float | None = None
    """Factor on sigma in each generation."""
    rank_transform: bool | None = None
    """Shape fitness by ranks; otherwise by its z-score."""
    episodes: Annotated[int | None, tyro.conf.arg(aliases=["--n-parallel-evals"])] = None
    """Episodes of each member in a generation."""
    max_steps: int | None = None
    """Steps after which an episode is cut off (default: the environment's own limit)."""
    noiser: Literal["eggroll", "openes"] = "eggroll"
    """Low-rank perturbations, or full-rank ones for comparison."""
    algo: Literal["es", "ppo"] = "es"
    """es, or PPO (of rejax) with the same environment and network, for comparison."""
    hidden: int = 256
    """Width of the policy's layers."""
    layers: int = 3
    """Hidden layers of the policy."""
    deterministic: bool = True
    """Take the best action; otherwise sample it."""
    normalize_obs: bool = True
    """Subtract the running mean of the observations and divide by their running standard deviation."""
    eval_every: int = 10
    """Generations between evaluations of the centre on held-out episodes."""
    eval_episodes: int = 64
    """Held-out episodes, the same ones each time."""
    members_per_forward: int = 256
    """Members whose episodes are played at once; 0 is all."""
    devices: int = 1
    """Devices to share the members among."""
    render: bool = True
    """Draw an episode of the trained policy, where the environment can."""
    seed: int = 0
    """Seed of everything random."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Run directory (default: runs/ENV-TIME)."""
    resume: str | None = None
    """Continue the run in this directory, with the options it has."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, none, or several separated by commas."""
    list: bool = False
    """Show the environments and whether what they need is installed."""

    def problems(self) -> Sequence[str]:
        """Everything that is wrong with these settings."""
        found: Any = whole(
            self, generations=0, hidden=1, layers=0, eval_every=1, eval_episodes=1, members_per_forward=0, devices=1,
            seed=0,
        )  # fmt: skip
        if self.episodes is not None:
            found += whole(self, episodes=1)
        if self.max_steps is not None:
            found += whole(self, max_steps=1)
        if self.env_steps is not None:
            found += whole(self, env_steps=1)
        if self.lr is not None:
            found += numbers(self, lr=(0.0, True))
        return found

    def resolved(self, env_name: str) -> RLConfig:
        """These settings with the canonical name of the environment and its preset where nothing was given.

        Raises:
            ConfigError: settings cannot work.
        """
        values = preset(env_name)
        filled = {key: values[key] for key in COLUMNS if getattr(self, key) is None}
        result = dataclasses.replace(self, env=env_name, **filled)
        problems = result.problems()
        if problems:
            raise ConfigError.from_problems("eggroll rl", [*problems])
        result.es()
        return result

    def es(self) -> ESConfig:
        """The algorithm's settings.

        The paper's code divides the sum over members by sqrt(N) and leaves sigma in it (docs/scale-conventions.md). A
        plain SGD step is therefore ``sigma sqrt(N)`` times ours at the same learning rate, and the two decays multiply;
        Adam does not see the scale of a gradient.
        """
        assert self.pop_size is not None
        assert self.sigma is not None
        assert self.lr is not None
        assert self.lr_decay is not None
        assert self.sigma_decay is not None
        lr, lr_decay = self.lr, self.lr_decay
        if self.optimizer in ("sgd", "momentum"):
            lr, lr_decay = lr * self.sigma * math.sqrt(max(self.pop_size, 1)), lr_decay * self.sigma_decay
        settings: dict[str, Any] = {
            "population_size": self.pop_size, "rank": self.rank, "sigma": self.sigma, "lr": lr,
            "generations": self.generations, "lr_decay": lr_decay, "sigma_decay": self.sigma_decay,
            "optimizer": self.optimizer, "seed": self.seed,
            "fitness_shaping": "centered_rank" if self.rank_transform else "normalized",
        }  # fmt: skip
        return ESConfig(**settings)
