"""TRL's reward functions: a whole batch at once, with the data set's columns."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.generation.chat import as_conversational
from eggroll.llm.rewards.base import Need, Prompt, Reward, as_scores, function_name, guarded, shown

RewardFunction = Callable[..., Any]

NOT_PASSED = ("prompt", "completion", "prompts", "completions", "completion_ids", "completions_ids")
"""Columns of these names are not handed on: TRL drops them, or they would hide the function's own arguments."""


class FunctionReward(Reward):
    """``reward(prompts, completions, **columns) -> list[float]``, as TRL's ``GRPOTrainer`` calls it.

    Several functions are summed with weights. A function may return ``None`` for completions that it does not apply
    to; the others decide then, and a completion to which none applies gets NaN. Where prompts are conversations,
    completions are ``[{"role": "assistant", "content": ...}]``. A function without ``**`` gets only the columns that
    it names. ``async`` functions run side by side. ``reward(outputs, prompts)`` works as well.

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
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion; see :meth:`Reward.score`."""
        columns = columns or {}
        asked, answers = as_conversational(prompts, completions)
        results: list[Any] = []
        for function in self.functions:
            arguments = self._arguments(function, asked, answers, completions, columns)
            results.append(self._guarded(function, prompts, partial(function, **arguments)))
        self._await(results, prompts)
        tables = [
            as_scores(result, len(completions), f"reward function {function_name(function)!r}")
            for function, result in zip(self.functions, results, strict=True)
        ]
        return [_weighted_sum(row, self.weights) for row in zip(*tables, strict=True)]

    def _arguments(
        self,
        function: RewardFunction,
        prompts: list[Prompt],
        answers: list[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[str, Any]:
        passed = {name: list(values) for name, values in columns.items() if name not in NOT_PASSED}
        known: dict[str, Any] = {**passed, "prompts": prompts, "completions": answers}
        parameters = inspect.signature(function).parameters
        if "outputs" in parameters and "completions" not in parameters:
            known["outputs"] = answers
        for ids in ("completion_ids", "completions_ids"):
            if ids in parameters:
                known[ids] = self._token_ids(function, completions)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return known
        wanted = {name: known[name] for name in parameters if name in known}
        missing = [name for name, p in parameters.items() if p.default is p.empty and name not in wanted]
        if missing:
            raise RewardError(
                f"reward function {function_name(function)!r} asks for {', '.join(missing)}; there are "
                f"{', '.join(known)}. Add the column to the data set, or give the parameter a default"
            )
        return wanted

    def _token_ids(self, function: RewardFunction, completions: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise RewardError(
                f"reward function {function_name(function)!r} asks for token ids; give FunctionReward the tokenizer: "
                "FunctionReward(functions, tokenizer=tokenizer)"
            )
        return [list(self.tokenizer(text, add_special_tokens=False).input_ids) for text in completions]

    def _guarded(self, function: RewardFunction, prompts: Sequence[Prompt], call: Callable[[], Any]) -> Any:
        first = f"; the first prompt is {shown(prompts[0])}" if prompts else ""
        what = f"reward function {function_name(function)!r}"
        with guarded(what, f" (on a batch of {len(prompts)} completions{first})"):
            return call()

    def _await(self, results: list[Any], prompts: Sequence[Prompt]) -> None:
        """Replaces the coroutines among the results by what they return, running them side by side."""
        pending = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
        if not pending:
            return
        # a thread of its own, since a notebook's thread has a running event loop already
        with ThreadPoolExecutor(max_workers=1) as pool:
            outcomes = pool.submit(asyncio.run, _gather([results[index] for index in pending])).result()
        for index, outcome in zip(pending, outcomes, strict=True):
            results[index] = self._guarded(self.functions[index], prompts, partial(_result, outcome))


async def _gather(awaitables: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_outcome, awaitables))


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """What an awaitable returns or raises; a ``SystemExit`` that left a task would stop the event loop."""
    try:
        return await awaitable
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _Raised(error)


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def _result(outcome: Any) -> Any:
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


def _weighted_sum(scores: Sequence[float | None], weights: Sequence[float]) -> float:
    applicable = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score is not None]
    return sum(score * weight for score, weight in applicable) if applicable else math.nan
