"""Weighted mixtures of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import UNSCORED, Need, Prompt, Reward, Unscored, as_score


class MultiReward(Reward):
    """The weighted sum of several rewards, also of different kinds.

    A mixture of text rewards scores like one. In a mixture of kinds, ``needs`` is ``mixed`` and whoever evaluates it
    goes through ``parts``, which lists the simple rewards with their weights (nested mixtures are multiplied out).
    The parts are summed as they are: bring them to one scale by the weights. A NaN of one part makes the sum NaN,
    and what one part leaves unscored (:data:`~eggroll.llm.rewards.UNSCORED`) is unscored.

    Raises:
        RewardError: empty, or not pairs of a reward and a finite number.
    """

    def __init__(self, rewards: Sequence[tuple[Reward, float]], *, name: str | None = None) -> None:
        self._parts: list[tuple[Reward, float]] = []
        for pair in rewards:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], Reward)):
                raise RewardError(
                    f"MultiReward takes pairs of a reward and its weight, such as [(PerplexityReward(tokenizer), 0.3), "
                    f"(TextReward(tokenizer, scorer), 0.7)]; got {pair!r}"
                )
            weight = as_score(pair[1], f"the weight of {pair[0].name!r}")
            if not math.isfinite(weight):
                raise RewardError(f"the weight of {pair[0].name!r} (={weight}) must be finite")
            self._parts += [(part, weight * inner) for part, inner in pair[0].parts]
        if not self._parts:
            raise RewardError("MultiReward needs at least one pair of a reward and its weight")
        kinds: set[Need] = {part.needs for part, _ in self._parts}
        self.needs = kinds.pop() if len(kinds) == 1 else "mixed"
        self.name = name or " + ".join(f"{weight:g} {part.name}" for part, weight in self._parts)

    @property
    def parts(self) -> list[tuple[Reward, float]]:
        """The simple rewards and their weights."""
        return list(self._parts)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """The weighted sum of text rewards; see :meth:`Reward.score`."""
        if self.needs != "text":
            raise self._wrong_use("score")
        tables = [(part.score(prompts, completions, columns), weight) for part, weight in self._parts]
        return [
            UNSCORED
            if any(isinstance(scores[row], Unscored) for scores, _ in tables)
            else sum(weight * scores[row] for scores, weight in tables)
            for row in range(len(completions))
        ]

    def log_likelihood(
        self, model: Any, input_ids: Any, attention_mask: Any = None, labels: Any = None, **inputs: Any
    ) -> Any:
        """The weighted sum of token rewards."""
        if self.needs != "tokens":
            raise self._wrong_use("log_likelihood")
        terms = [
            weight * part.log_likelihood(model, input_ids, attention_mask, labels, **inputs)
            for part, weight in self._parts
        ]
        return sum(terms[1:], terms[0])

    def evaluate(self, model: Any, inputs: Any) -> float:
        """The weighted sum of model rewards."""
        if self.needs != "model":
            raise self._wrong_use("evaluate")
        return sum(weight * part.evaluate(model, inputs) for part, weight in self._parts)
