"""Schedules of sigma and the learning rate: a value as a pure function of the generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "exponential", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """``schedule(generation)`` gives the value in that generation (0 is the first).

    With ``t`` the generation, ``T`` the number of generations and ``f`` the final fraction:

        constant      start
        exponential   start * decay ** t
        linear        start * (1 - (1 - f) * min(t, T) / T)
        cosine        start * (f + (1 - f) * (1 + cos(pi * min(t, T) / T)) / 2)
    """

    name: ScheduleName
    start: float
    decay: float = 1.0
    generations: int = 1
    final_fraction: float = 0.0

    def __call__(self, generation: int) -> float:
        """The value in a generation."""
        if self.name == "constant":
            return self.start
        if self.name == "exponential":
            return float(self.start * self.decay**generation)
        progress = min(generation, self.generations) / max(self.generations, 1)
        if self.name == "linear":
            return self.start * (1.0 - (1.0 - self.final_fraction) * progress)
        wave = (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.start * (self.final_fraction + (1.0 - self.final_fraction) * wave)
