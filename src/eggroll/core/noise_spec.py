"""Which noise a population has: all that a draw depends on besides a parameter's name, a generation and a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eggroll.core.check import whole


@dataclass(frozen=True)
class NoiseSpec:
    """The settings of the noise (docs/noise-spec.md).

    Attributes:
        seed: of the noise, at least 0 and below 2**64.
        rank: of the factors of a matrix's perturbation.
        antithetic: members ``2k`` and ``2k + 1`` have the draw ``k`` with the signs +1 and -1; otherwise every member
            has a draw of its own.
        noise_reuse: generations that share their draws; 1 draws afresh each time.
    """

    seed: int = 0
    rank: int = 1
    antithetic: bool = True
    noise_reuse: int = 1

    def problems(self) -> list[str]:
        """What is wrong with these settings, one sentence each."""
        found = [*whole(self, most=None, seed=0), *whole(self, rank=1, noise_reuse=1)]
        return found or ([f"seed (={self.seed}) must be below 2**64"] if self.seed >= 2**64 else [])

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs with which each draw is used."""
        return (1, -1) if self.antithetic else (1,)

    def num_draws(self, population_size: int) -> int:
        """Draws of a population."""
        return population_size // len(self.signs)

    def epoch(self, generation: Any) -> Any:
        """The number that draws of a generation are addressed with; ``generation`` may be an array or traced."""
        return generation // self.noise_reuse

    def draw_of(self, member: Any) -> tuple[Any, Any]:
        """A member's draw and its sign; ``member`` may be an array or traced."""
        return (member // 2, 1 - 2 * (member % 2)) if self.antithetic else (member, 1)

    def draw_weights(self, shaped_fitness: Any) -> Any:
        """The weight of each draw in the estimate: ``s_2k - s_2k+1`` for pairs, ``s_k`` for members of their own."""
        return shaped_fitness[0::2] - shaped_fitness[1::2] if self.antithetic else shaped_fitness
