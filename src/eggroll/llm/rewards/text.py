"""A score of one generated text at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import Need, Prompt, Reward, as_score, function_name, guarded, shown
from eggroll.llm.rewards.event_loop import discard, result, settle
from eggroll.llm.rewards.notes import current_notes


class TextReward(Reward):
    """``scorer(text) -> float`` of every completion.

    A scorer that takes more parameters gets them by name: ``prompt``, or any column of the data set, for example
    ``def scorer(text, prompt, answer)``; with ``**columns`` it gets all of them.

    Args:
        tokenizer: kept for symmetry with the other rewards; a scorer of text does not use it and ``None`` will do.
        scorer: the function.
        name: for messages and logs; the function's name if not given.

    Raises:
        RewardError: no scorer was given.
    """

    needs: Need = "text"

    def __init__(
        self, tokenizer: Any = None, scorer: Callable[..., Any] | None = None, *, name: str | None = None
    ) -> None:
        if scorer is None and callable(tokenizer) and not hasattr(tokenizer, "decode"):
            tokenizer, scorer = None, tokenizer
        if not callable(scorer):
            raise RewardError(
                f"TextReward needs a scorer, a function of the text that returns a number; got {scorer!r}. "
                "Write TextReward(tokenizer, scorer=my_function)"
            )
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.name = name or function_name(scorer)
        self._own, parameters = _extra_parameters(scorer)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._wanted = [p.name for p in named]
        self._required = [p.name for p in named if p.default is p.empty]
        self._wants_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion; see :meth:`Reward.score`."""
        columns = columns or {}
        given = current_notes().arguments(1)
        given = {name: given[name] for name in ("trainer_state", "log_metric") if name in self._wanted}
        results: list[Any] = []
        hints, whats = [], []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            known = {**{name: values[index] for name, values in columns.items()}, "prompt": prompt}
            known.pop(self._own, None)
            extra = known if self._wants_all else {name: known[name] for name in self._wanted if name in known}
            whats.append(f"reward {self.name!r}, prompt {shown(prompt)},")
            hints.append(f". {_hint(self, known, given)}")
            try:
                with guarded(whats[-1], hints[-1]):
                    results.append(self.scorer(completion, **{**extra, **given}))
            except BaseException:
                discard(results)
                raise
        scores = []
        for outcome, what, hint in zip(settle(results), whats, hints, strict=True):
            with guarded(what, hint):
                value = result(outcome)
            scores.append(as_score(value, what))
        return scores


def _extra_parameters(function: Callable[..., Any]) -> tuple[str, list[inspect.Parameter]]:
    """The name that the text takes, and the parameters after it.

    The name is empty if a column may have it, too: ``def score(text, /, **columns)``.
    """
    try:
        first, *parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "", []
    return (first.name if first.kind is first.POSITIONAL_OR_KEYWORD else ""), parameters


def _hint(reward: TextReward, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    missing = [name for name in reward._required if name not in known and name not in given]
    if missing:
        return f"It asks for {', '.join(missing)}; the data set has {', '.join(sorted(known))}"
    return "The text was scored by your function; fix it, or let it return None for texts that it cannot score"
