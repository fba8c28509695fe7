"""The task ``guess_number``: find the number that the world thinks of, which says only "higher" or "lower".

    score = 1                                       the number was found within MAX_TURNS guesses
            0.8 * progress + 0.1 * form             if not

    progress  1 - log(numbers that are still possible) / log(numbers that were)
    form      the part of the turns with a guess: one whole number within the range, and no other number

A guess in the middle of what is still possible makes the most progress, 0.15 of a hundred numbers; one that is
known to be wrong makes none. So the score rises with every step on the way: answering with a number, with another one
than before, with one in the right direction, with one in the middle.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.tasks.splits import Splits, fill
from eggroll.llm.tasks.task import CONVERSATION_SETTINGS, CONVERSATION_SIZES
from eggroll.llm.worlds.world import Turn, World

__all__ = ["BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SYSTEM", "GuessNumber", "check", "problems", "splits"]

DESCRIPTION = "Find a number; the world says higher or lower."
MAX_TOKENS = 8
MAX_TURNS = 5
BEST = 1.0
SYSTEM: str | None = "You play a game. Answer with one number and nothing else."
SETTINGS: dict[str, Any] = {**CONVERSATION_SETTINGS, "max_turns": MAX_TURNS}

SEED = 2025
SMALLEST, LARGEST = 40, 160
_PROMPT = "I think of a number from 1 to {high}. Guess it. I say higher or lower."
_NUMBER = re.compile(r"\d{1,6}", re.ASCII)


class GuessNumber(World):
    """A number from 1 to ``high``, which a row gives with ``number``."""

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin with the row's own prompt."""
        self.low, self.high, self.number = 1, int(row["high"]), int(row["number"])
        self.count, self.turns, self.guesses = self.high, 0, 0

    def step(self, completion: str) -> Turn:
        """Say whether the number is higher or lower than the guess."""
        self.turns += 1
        found = {int(digits) for digits in _NUMBER.findall(completion)}
        guess = found.pop() if len(found) == 1 else 0
        if not 1 <= guess <= self.count:
            return self._turn(f"Write one number from 1 to {self.count}.")
        self.guesses += 1
        if guess == self.number:
            return Turn("Right!", done=True, score=1.0)
        if guess < self.number:
            self.low = max(self.low, guess + 1)
            return self._turn(f"Higher than {guess}.")
        self.high = min(self.high, guess - 1)
        return self._turn(f"Lower than {guess}.")

    def _turn(self, said: str) -> Turn:
        progress = 1.0 - math.log(self.high - self.low + 1) / math.log(self.count)
        score = 0.8 * progress + 0.1 * self.guesses / self.turns
        return Turn(said, score=score, done=self.turns >= MAX_TURNS)


WORLD = GuessNumber


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless problems: pairs of a key and a row ``prompt, high, number``."""
    rng = random.Random(seed)
    while True:
        high = SMALLEST + int(rng.random() * (LARGEST - SMALLEST + 1))
        number = 1 + int(rng.random() * high)
        yield f"{number} of {high}", {"prompt": _PROMPT.format(high=high), "high": high, "number": number}


def splits() -> Splits:
    """The task's problems."""
    return fill(problems(SEED), CONVERSATION_SIZES)


def check(columns: Mapping[str, Any]) -> None:
    """Refuse a row that is no game.

    Raises:
        DataError: it has no ``high`` and ``number``, or they do not fit.
    """
    high, number = columns.get("high"), columns.get("number")
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (high, number))
    if not whole or not 2 <= high <= 999_999 or not 1 <= number <= high:  # type: ignore[operator]
        raise DataError(
            f"guess_number needs whole numbers high (from 2) and number (from 1 to high), got high={high!r} and "
            f'number={number!r}; a row is {{"prompt": "...", "high": 100, "number": 42}}'
        )
