"""The settings of `eggroll_step`."""

from __future__ import annotations

from dataclasses import dataclass

from eggroll.core.check import numbers, whole
from eggroll.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EggrollConfig:
    """How :func:`eggroll_step` draws, scales and steps.

    Raises:
        ConfigError: one or several settings cannot work; the message lists all of them.
    """

    population_size: int = 2048
    """Members per generation; with antithetic halves, both signs count."""
    rank: int = 4
    """Rank of a weight's perturbation."""
    sigma: float = 0.1
    """Standard deviation of a perturbation's entries in the first generation."""
    lr: float = 0.1
    """Learning rate of the first generation, in the scale of :func:`compute_gradients`."""
    sigma_decay: float = 1.0
    """Factor on sigma per generation."""
    lr_decay: float = 1.0
    """Factor on lr per generation."""
    antithetic: bool = True
    """The second half of the members has the draws of the first with the opposite sign."""
    seed: int = 42
    """Seed of the noise."""
    members_per_forward: int | None = None
    """Members that are evaluated at once; ``None`` takes all. Results do not depend on it, memory and speed do."""

    def __post_init__(self) -> None:
        problems = [
            *whole(self, population_size=2, rank=1),
            *whole(self, most=None, seed=0),
            *numbers(self, sigma=(0.0, False), lr=(0.0, True), sigma_decay=(0.0, False), lr_decay=(0.0, False)),
        ]
        if self.members_per_forward is not None:
            problems += whole(self, members_per_forward=1)
        if not whole(self, population_size=2) and self.antithetic and self.population_size % 2:
            problems.append(
                f"population_size (={self.population_size}) must be even when antithetic=True; use "
                f"{self.population_size + 1} or antithetic=False"
            )
        if problems:
            raise ConfigError.from_problems(type(self).__name__, problems)
