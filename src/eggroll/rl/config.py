"""The settings of ``eggroll rl``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from eggroll.core.check import MOST, numbers, whole
from eggroll.core.config import ESConfig, OptimizerName
from eggroll.core.settings import setting
from eggroll.distributed.options import WorkerOptions
from eggroll.errors import ConfigError
from eggroll.rl.presets import COLUMNS, PresetName, preset
from eggroll.run.options import RunOptions

PresetChoice = Literal["auto", PresetName]


@dataclass(frozen=True, kw_only=True)
class RLConfig(RunOptions, WorkerOptions):
    """Evolve a policy for an environment. What is not given comes from a preset."""

    # "gymnasium/module:Name-v0" imports the module.
    env: str = setting("CartPole-v1", runs_code=lambda env: ":" in env, always_ask=True)
    """Environment, such as navix-DoorKey-8x8, brax/ant, gymnasium/HalfCheetah-v5; --list shows the paper's sixteen."""
    preset: PresetChoice = "auto"
    """Values of the nine settings that are not given: the paper's for the environment (populations of 512 to 4096, for
    accelerators), or small ones (128 members, Adam) that suit a CPU; auto decides by the device."""
    population_size: int | None = setting(None, flags=("-p", "--population", "--pop_size"))
    """Members per generation; both signs of an antithetic pair count. (small: 128)"""
    rank: int | None = None
    """Rank of a matrix's perturbation. (small: 1)"""
    sigma: float | None = None
    """Standard deviation of the perturbations in the first generation. (small: 0.1; brax 0.05)"""
    lr: float | None = None
    """Learning rate of the first generation, in the paper's scale (docs/scale-conventions.md). (small: 0.02; sgd 0.2,
    brax 0.005)"""
    generations: int = setting(200, flags=("-g",), resume=True)
    env_steps: int | None = setting(None, resume=True)
    """End the run after this many environment steps, counted over all members (PPO: 1,000,000 if not given)."""
    optimizer: OptimizerName | None = None
    """Which rule turns the estimate into a step. (small: adam)"""
    lr_decay: float | None = None
    """Factor on lr per generation. (small: 1)"""
    sigma_decay: float | None = None
    """Factor on sigma per generation. (small: 1)"""
    rank_transform: bool | None = None
    """Shape fitness by ranks; otherwise by its z-score. (small: by ranks)"""
    episodes: int | None = setting(None, flags=("--n-parallel-evals",))
    """Episodes of each member in a generation. (small: 1)"""
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
    eval_every: int = setting(10, resume=True)
    """Generations between evaluations of the center on held-out episodes."""
    eval_episodes: int = 64
    """Held-out episodes, the same ones each time."""
    members_per_forward: int = setting(256, resume=True)
    """Members whose episodes are played at once; 0 is all."""
    devices: int = setting(1, resume=True)
    """Devices to share the members among."""
    seed: int = 0

    def problems(self) -> Sequence[str]:
        """Everything that is wrong with these settings."""
        found: Any = whole(
            self, generations=0, hidden=1, layers=0, eval_every=1, eval_episodes=1, members_per_forward=0, devices=1,
        )  # fmt: skip
        found += whole(self, most=2**64 - 1, seed=0)
        for name in ("episodes", "max_steps", "env_steps"):
            if getattr(self, name) is not None:
                found += whole(self, most=2**63 - 1 if name == "env_steps" else MOST, **{name: 1})
        if self.preset not in get_args(PresetChoice):
            found.append(f"preset (={self.preset!r}) must be one of {', '.join(get_args(PresetChoice))}")
        size = self.population_size
        few = [] if size is None else whole(self, population_size=2)
        found += few
        if isinstance(size, int) and size % 2 and not few:
            found.append(f"population_size (={size}) must be even: members come in pairs; use {size + 1}")
        if self.lr is not None:
            found += numbers(self, lr=(0.0, True))
        return found

    def resolved(self, env_name: str, *, cpu: bool = False) -> RLConfig:
        """These settings with the canonical name of the environment and a preset where nothing was given.

        Args:
            env_name: the environment.
            cpu: whether a CPU computes, which ``preset="auto"`` depends on.

        Raises:
            ConfigError: settings cannot work.
        """
        which = self.preset if self.preset != "auto" else "small" if cpu else "paper"
        values = preset(env_name, which, self.optimizer)
        filled = {key: values[key] for key in COLUMNS if getattr(self, key) is None}
        result = dataclasses.replace(
            self, env=env_name, **filled
        )  # preset stays as given: all that it means is filled in
        problems = result.problems()
        if problems:
            raise ConfigError.from_problems("eggroll rl", [*problems])
        result.es()
        return result

    def lr_text(self) -> str:
        """The learning rate as it is shown, of resolved settings: as it was given, and as the log has it."""
        logged = self.es().lr
        return f"{self.lr:.4g}" + ("" if logged == self.lr else f" in the paper's scale (logged as {logged:.4g})")

    def es(self) -> ESConfig:
        """The algorithm's settings, of resolved ones.

        Here the paper's scale of the learning rate ends: ``lr`` and ``lr_decay`` of the result are those of
        :class:`ESConfig`, as everywhere else. The paper's code divides the sum over members by sqrt(N) and leaves sigma
        in it (docs/scale-conventions.md), so its plain SGD step is ``sigma sqrt(N)`` times ours at the same learning
        rate, and the two decays multiply. Adam does not see the scale of a gradient.
        """
        given = {name: getattr(self, name) for name in COLUMNS}
        assert None not in given.values(), "resolved() fills presets in"
        lr, lr_decay = given["lr"], given["lr_decay"]
        if self.optimizer in ("sgd", "momentum"):
            lr = lr * given["sigma"] * math.sqrt(max(given["population_size"], 1))
            lr_decay = lr_decay * given["sigma_decay"]
        return ESConfig(
            population_size=given["population_size"], rank=given["rank"], sigma=given["sigma"], lr=lr,
            generations=self.generations, lr_decay=lr_decay, sigma_decay=given["sigma_decay"],
            optimizer=given["optimizer"], seed=self.seed,
            fitness_shaping="centered_rank" if self.rank_transform else "normalized",
        )  # fmt: skip
