"""A reward whose scores come from worlds: it says what these are, and reads what they have scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import Need, Prompt, Reward
from eggroll.llm.worlds.host import Factory, name_of

SCORE, ENVIRONMENTS = "world_score", "environments"
"""Columns that rewards of text get where worlds are: their scores, and the worlds themselves (TRL's name)."""


class WorldReward(Reward):
    """The score that a world has given to a conversation.

    A reward with a ``world`` makes an evaluator hold conversations in the place of asking for one completion; other
    rewards beside it read them.

    Args:
        world: makes a world for a row: a class, or any function without arguments.
        scored: whether worlds score at all; if not, another reward has to, and this one adds nothing.
        name: for messages and logs; the world's name if not given.

    Raises:
        RewardError: it cannot be called.
    """

    needs: Need = "text"

    def __init__(self, world: Factory, *, scored: bool = True, name: str | None = None) -> None:
        if not callable(world):
            raise RewardError(f"WorldReward needs a class of worlds (or a function that makes one), got {world!r}")
        self.world, self.scored = world, scored
        self.name = name or name_of(world)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """The worlds' own scores, which stand in the column ``world_score``."""
        found = (columns or {}).get(SCORE)
        if found is None:
            raise RewardError(f"the world {self.name} scores conversations, and none was held with it")
        return [0.0 if value is None else float(value) for value in found]


def world_of(reward: Reward) -> WorldReward | None:
    """The part of a reward that has a world.

    Raises:
        RewardError: several have.
    """
    found = [part for part, _ in reward.parts if isinstance(part, WorldReward)]
    if len(found) > 1:
        raise RewardError(f"one world at a time: the reward has {', '.join(part.name for part in found)}")
    return found[0] if found else None


__all__ = ["ENVIRONMENTS", "SCORE", "WorldReward", "world_of"]
