"""Whether a data set has the columns that a reward's functions ask for, found out before anything is generated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.data.examples import Example
from eggroll.llm.rewards.base import Reward, function_name
from eggroll.llm.rewards.functions import NOT_PASSED
from eggroll.llm.rewards.judge import JudgeReward

SUPPLIED = frozenset(
    {"outputs", "completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric"}
    | {"environments", "world_score"}
)
"""What a function may ask for besides columns, prompts and completions."""


def check_columns(reward: Reward, examples: Sequence[Example], what: str = "the data set") -> None:
    """Refuse a data set that lacks a column which a function of the reward asks for and has no default for.

    Args:
        reward: one, or a sum of several.
        examples: the rows.
        what: the data set's name, for the message.

    Raises:
        RewardError: a column is missing; the message lists the columns there are.
    """
    columns = dict.fromkeys(name for example in examples for name in example.columns)
    for part, _ in reward.parts:
        for function in getattr(part, "functions", ()):
            passed = [name for name in columns if name not in NOT_PASSED]
            _check(function, _parameters(function), [*passed, "prompts", "completions"], what)
        scorer = getattr(part, "scorer", None)
        if scorer is not None:
            _check(scorer, _parameters(scorer)[1:], sorted({*columns, "prompt"}), what)
        if isinstance(part, JudgeReward) and part.reference is not None and part.reference not in columns:
            there = ", ".join(columns) or "no columns"
            raise RewardError(f"the judge's reference is the column {part.reference!r}, and {what} has {there}")


def _check(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter], there: Sequence[str], what: str
) -> None:
    asked = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in asked if name not in there and name not in SUPPLIED]
    if missing:
        raise RewardError(
            f"reward function {function_name(function)!r} asks for {', '.join(missing)}; there are "
            f"{', '.join(there)}. Add the column to {what}, or give the parameter a default"
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
