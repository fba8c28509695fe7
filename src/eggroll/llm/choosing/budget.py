"""How many generations, members and prompts fit into a given time."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace

OVERHEAD = 1.15
"""Times the evaluation of its members: what a generation takes with its update, and some time in hand."""
FEW, MANY = 20, 60
"""Generations: with fewer, each is made cheaper; with more, each is made larger."""
LEAST_PROMPTS, LEAST_MEMBERS, MOST_MEMBERS = 4, 16, 256
HELDOUT_SCORES = 3
"""Evaluations of the held-out data that time is kept for."""


@dataclass(frozen=True)
class Amount:
    """How much a run does."""

    generations: int
    members: int
    prompts: int


def fit(
    wanted: Amount, free: Set[str], *, seconds: float, cell_seconds: float, prompts: int, heldout: int = 0
) -> Amount:
    """The amount that fits into a time; what is not ``free`` stays as it is.

    More steps of a less certain direction are worth more than a few of a certain one, down to a point: where there
    would be fewer than ``FEW`` generations, there are fewer prompts in each, and if need be fewer members. Beyond
    ``MANY`` more members are better: they and the generations grow alike.

    Args:
        wanted: what is done without a limit.
        free: names of the settings that may change: ``generations``, ``population_size``, ``prompts_per_generation``.
        seconds: how long all generations may take.
        cell_seconds: for one member on one prompt.
        prompts: how many there are.
        heldout: how many are held out.
    """
    amount = replace(
        wanted, prompts=min(wanted.prompts, prompts) if "prompts_per_generation" in free else wanted.prompts
    )
    left = max(0.0, seconds - HELDOUT_SCORES * heldout * cell_seconds)

    def generations(members: int, each: int) -> float:
        return left / max(OVERHEAD * members * min(each, prompts) * cell_seconds, 1e-9)

    if "generations" not in free:
        if "population_size" in free:  # as many members as fit
            members = amount.members * generations(amount.members, amount.prompts) / max(1, amount.generations)
            amount = replace(amount, members=_even(members, LEAST_MEMBERS))
        return amount
    if generations(amount.members, amount.prompts) < FEW and "prompts_per_generation" in free:
        amount = replace(amount, prompts=min(amount.prompts, LEAST_PROMPTS))
    share = generations(amount.members, amount.prompts) / FEW
    if share < 1 and "population_size" in free:
        amount = replace(amount, members=_even(amount.members * share, min(LEAST_MEMBERS, amount.members)))
    surplus = generations(amount.members, amount.prompts) / MANY
    if surplus > 1 and "population_size" in free:
        amount = replace(amount, members=_even(amount.members * math.sqrt(surplus), amount.members))
    return replace(amount, generations=max(1, int(generations(amount.members, amount.prompts))))


def _even(members: float, least: int) -> int:
    return max(least, min(MOST_MEMBERS, 2 * int(members / 2)))
