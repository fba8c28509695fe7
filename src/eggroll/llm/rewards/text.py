"""A score of one generated text at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import Need, Prompt, Reward, as_score, function_name, guarded, shown


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
        self._own, self._wanted, self._wants_all = _extra_parameters(scorer)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion; see :meth:`Reward.score`."""
        columns = columns or {}
        scores = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            known = {**{name: values[index] for name, values in columns.items()}, "prompt": prompt}
            known.pop(self._own, None)
            extra = known if self._wants_all else {name: known[name] for name in self._wanted if name in known}
            what = f"reward {self.name!r}, prompt {shown(prompt)},"
            with guarded(what, f". {_hint(self, known)}"):
                value = self.scorer(completion, **extra)
            scores.append(as_score(value, what))
        return scores


def _extra_parameters(function: Callable[..., Any]) -> tuple[str, list[str], bool]:
    """The name that the text takes, names of the parameters after it, and whether there is a ``**``.

    The name is empty if a column may have it, too: ``def score(text, /, **columns)``.
    """
    try:
        first, *parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "", [], False
    own = first.name if first.kind is first.POSITIONAL_OR_KEYWORD else ""
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return own, named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _hint(reward: TextReward, known: Mapping[str, Any]) -> str:
    missing = [name for name in reward._wanted if name not in known]
    if missing:
        return f"It asks for {', '.join(missing)}; the data set has {', '.join(sorted(known))}"
    return "The text was scored by your function; fix it, or let it return None for texts that it cannot score"
