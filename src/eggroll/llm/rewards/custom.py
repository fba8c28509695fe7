"""Any function of the model and a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import Need, Reward, as_score, function_name, guarded
from eggroll.llm.rewards.event_loop import finished


class CustomReward(Reward):
    """``function(model, inputs) -> float``.

    The function may do with the model what it likes, so members are evaluated one at a time. That is far slower than
    a :class:`TextReward` or a :class:`PerplexityReward`, which see the whole population at once.

    Raises:
        RewardError: the function is not callable.
    """

    needs: Need = "model"

    def __init__(self, function: Callable[[Any, Any], Any], *, name: str | None = None) -> None:
        if not callable(function):
            raise RewardError(
                f"CustomReward needs a function of (model, inputs) that returns a number, got {function!r}"
            )
        self.function = function
        self.name = name or function_name(function)

    def evaluate(self, model: torch.nn.Module, inputs: Any) -> float:
        """The function's number for this model.

        Raises:
            RewardError: the function raised, or did not return a number.
        """
        with guarded(f"reward {self.name!r}"):
            value = finished(self.function(model, inputs))
        return as_score(value, f"reward {self.name!r}")
