"""TRL's reward functions: a whole batch at once, with the data set's columns."""

from __future__ import annotations

import inspect
import math
from collections import UserList
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.generation.chat import as_conversational, last_answer
from eggroll.llm.rewards.base import (
    UNSCORED,
    Need,
    Prompt,
    Reward,
    Unscored,
    as_scores,
    function_name,
    guarded,
    shown,
)
from eggroll.llm.rewards.event_loop import discard, result, settle
from eggroll.llm.rewards.notes import check_columns, current_notes

RewardFunction = Callable[..., Any]

NOT_PASSED = ("prompt", "completion", "prompts", "completions", "completion_ids", "completions_ids")
"""Columns of these names are not handed on: TRL drops them, or they would hide the function's own arguments."""


class FunctionReward(Reward):
    """``reward(prompts, completions, **columns) -> list[float]``, as TRL's ``GRPOTrainer`` calls it.

    Several functions are summed with weights. A function may return ``None`` for completions that it does not apply
    to; the others decide then, and a completion to which none applies gets NaN. One that returns
    :data:`~eggroll.llm.rewards.UNSCORED` has failed to score it, and so does the sum. Where prompts are conversations,
    completions are ``[{"role": "assistant", "content": ...}]``. A function without ``**`` gets only the columns that
    it names. ``async`` functions run side by side, on one event loop for the whole run. ``reward(outputs, prompts)``
    works as well.

    TRL's own arguments are there, too: ``trainer_state`` (``global_step`` is the number of updates done, ``max_steps``
    that of the run), ``log_metric(name, value)`` (a mean over the generation, in ``metrics.jsonl`` and the trackers as
    ``rewards/NAME``) and ``log_extra(column, values)`` (one value per completion, with the samples in
    ``samples.jsonl``).

    Args:
        functions: one function or several.
        weights: one number per function; 1 for all if not given.
        tokenizer: needed only by functions that ask for ``completion_ids``.
        name: for messages and logs; the functions' names if not given.

    Raises:
        RewardError: something is not callable, or there is not one weight per function.
    """

    needs: Need = "text"

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        tokenizer: Any = None,
        name: str | None = None,
    ) -> None:
        self.functions: list[RewardFunction] = [functions] if callable(functions) else list(functions)
        if not self.functions or not all(callable(function) for function in self.functions):
            raise RewardError(f"FunctionReward needs one or several functions, got {functions!r}")
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise RewardError(f"FunctionReward got {len(self.weights)} weights for {len(self.functions)} functions")
        self.tokenizer = tokenizer
        self.name = name or "+".join(function_name(function) for function in self.functions)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion; see :meth:`Reward.score`."""
        columns = columns or {}
        asked, answers = as_conversational(prompts, completions)
        results: list[Any] = []
        try:
            for function in self.functions:
                call = self._call(function, asked, answers, completions, columns)
                results.append(self._guarded(function, prompts, call))
        except BaseException:
            discard(results)
            raise
        outcomes = zip(self.functions, settle(results), strict=True)
        results = [self._guarded(function, prompts, partial(result, outcome)) for function, outcome in outcomes]
        tables = [
            as_scores(result, len(completions), f"reward function {function_name(function)!r}")
            for function, result in zip(self.functions, results, strict=True)
        ]
        if len(self.functions) > 1:  # with the samples, so that it can be seen why an answer has its score
            names = [function_name(function) for function in self.functions]
            current_notes().extra.update(zip(names, tables, strict=True))
        return [_weighted_sum(row, self.weights) for row in zip(*tables, strict=True)]

    def _call(
        self,
        function: RewardFunction,
        prompts: list[Prompt],
        answers: list[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> Callable[[], Any]:
        """The function with the arguments that it asks for, by name."""
        passed = {name: list(values) for name, values in columns.items() if name not in NOT_PASSED}
        known: dict[str, Any] = {**passed, "prompts": prompts, "completions": answers}
        parameters = inspect.signature(function).parameters
        if "outputs" in parameters and "completions" not in parameters:
            known["outputs"] = answers
        there = list(known)
        known.update(current_notes().arguments(len(completions)))
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for ids in ("completion_ids", "completions_ids"):
            if ids in parameters:
                known[ids] = self._token_ids(function, completions)
        if takes_all and self.tokenizer is not None:
            known.setdefault("completion_ids", _Later(partial(self._token_ids, function, completions)))
        own = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in own if p.default is p.empty and p.name not in known]
        check_columns(f"reward function {function_name(function)!r}", missing, there)
        first = [p.name for p in own if p.kind is p.POSITIONAL_ONLY and p.name in known]
        names = known if takes_all else [p.name for p in own if p.name in known]
        by_name = {name: known[name] for name in names if name not in first}
        return partial(function, *(known[name] for name in first), **by_name)

    def _token_ids(self, function: RewardFunction, completions: Sequence[Any]) -> list[list[int]]:
        if self.tokenizer is None:
            raise RewardError(
                f"reward function {function_name(function)!r} asks for token ids; give FunctionReward the tokenizer: "
                "FunctionReward(functions, tokenizer=tokenizer)"
            )
        return [list(self.tokenizer(last_answer(text), add_special_tokens=False).input_ids) for text in completions]

    def _guarded(self, function: RewardFunction, prompts: Sequence[Prompt], call: Callable[[], Any]) -> Any:
        first = f"; the first prompt is {shown(prompts[0])}" if prompts else ""
        what = f"reward function {function_name(function)!r}"
        with guarded(what, f" (on a batch of {len(prompts)} completions{first})"):
            return call()


class _Later(UserList[Any]):
    """A list that is made when it is first looked at: most functions with a ``**`` do not read the token ids in it."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make = make

    @cached_property
    def data(self) -> list[Any]:  # type: ignore[override]
        """The list."""
        return self._make()


def _weighted_sum(scores: Sequence[float | None], weights: Sequence[float]) -> float:
    if any(isinstance(score, Unscored) for score in scores):
        return UNSCORED
    applicable = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score is not None]
    return sum(score * weight for score, weight in applicable) if applicable else math.nan
