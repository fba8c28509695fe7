"""The task ``calculator``: answer a sum that is too large to do in the head, with a tool that computes it.

    score = 0.3 * call + 0.3 * right + 0.4 * answer          from 0 to 1

    call    1 for a turn that asks for the calculator with an expression it can compute, 1/2 for one that it cannot
    right   1 if an expression that was asked for has the value that is sought
    answer  1 if the last turn, which asks for nothing any more, names that value, as its only or its last number

A model asks with ``calc(12 * 34)``, or as its chat template has it, with a function ``calculate`` in ``<tool_call>``
tags; both are read. The world answers with the value, and the next turn is the answer. An answer without any call
scores too if it is right: no small model does these in its head.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.tasks.arithmetic import evaluate
from eggroll.llm.tasks.splits import Splits, fill
from eggroll.llm.tasks.task import CONVERSATION_SETTINGS, CONVERSATION_SIZES
from eggroll.llm.worlds.world import Completion, Turn, World

__all__ = ["BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SYSTEM", "Calculator", "check", "problems", "splits"]

DESCRIPTION = "Compute with a calculator that the model has to call."
MAX_TOKENS = 24
MAX_TURNS = 3
BEST = 1.0
SYSTEM: str | None = "You have a calculator. To use it, write calc(...) and nothing else. Then say what it gave."
SETTINGS: dict[str, Any] = {**CONVERSATION_SETTINGS, "max_turns": MAX_TURNS}

WORKED = (
    {"role": "user", "content": "What is 12 * 34?"},
    {"role": "assistant", "content": "calc(12 * 34)"},
    {"role": "user", "content": "The calculator says 408."},
    {"role": "assistant", "content": "It is 408."},
)
"""How a conversation goes; without it, no answer of a small model is a call, and there is nothing to begin with."""
SEED = 2026
_QUESTIONS = ("What is {}?", "Compute {}.", "How much is {}?")
_CALL = re.compile(r"\bcalc\w{0,8}(?:\(([^()\n]{1,60})\)|: ?(\d[\d ,]{0,12}[*+/×-][^\n]{1,40}))")
_NUMBER = re.compile(r"-?\d[\d,]{0,12}", re.ASCII)


class Calculator(World):
    """Computes what it is asked for; a row gives the sum and its ``answer``."""

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Begin with a worked example, and the row's own prompt."""
        self.answer = int(row["answer"])
        self.called, self.right, self.turns = 0.0, 0.0, 0
        return [*WORKED, {"role": "user", "content": str(row["prompt"])}]

    def step(self, completion: str) -> Turn:
        """Compute, or take the answer."""
        self.turns += 1
        asked = _asked(completion)
        if asked is None:
            numbers = _NUMBER.findall(completion)
            found = bool(numbers) and int(numbers[-1].replace(",", "")) == self.answer
            return Turn(done=True, score=self._score(found))
        computed = evaluate(asked)
        if computed is None:
            self.called = max(self.called, 0.5)
            return Turn("The calculator takes numbers and + - * / only.", self.turns >= MAX_TURNS, self._score(False))
        value = computed[0]
        self.called = 1.0
        self.right = max(self.right, float(value == self.answer))
        return Turn(f"The calculator says {value}.", done=self.turns >= MAX_TURNS, score=self._score(False))

    def _score(self, answered: bool) -> float:
        # an answer that was not computed stands for a call that was not needed
        called, right = (1.0, 1.0) if answered and self.called == 0.0 else (self.called, self.right)
        return round(0.3 * called + 0.3 * right + 0.4 * answered, 6)


WORLD = Calculator


def _asked(completion: str) -> str | None:
    """The expression that a completion asks for."""
    for call in completion.tool_calls if isinstance(completion, Completion) else ():
        if call["name"] in ("calc", "calculate", "calculator"):
            return str(next(iter(call["arguments"].values()), ""))
    found = _CALL.search(completion)
    return None if found is None else (found.group(1) or found.group(2)).replace("×", "*").replace(",", "")


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless problems: pairs of a key and a row ``prompt, answer``."""
    rng = random.Random(seed)
    while True:
        kind = int(rng.random() * 3)
        one, two = 101 + int(rng.random() * 899), (11, 101, 101)[kind] + int(rng.random() * (89, 899, 899)[kind])
        if kind == 2 and two > one:
            one, two = two, one
        expression = f"{one} {'*+-'[kind]} {two}"
        answer = (one * two, one + two, one - two)[kind]
        question = _QUESTIONS[int(rng.random() * len(_QUESTIONS))].format(expression)
        yield expression, {"prompt": question, "answer": answer}


def splits() -> Splits:
    """The task's problems."""
    return fill(problems(SEED), CONVERSATION_SIZES)


def check(columns: Mapping[str, Any]) -> None:
    """Refuse a row that is no problem.

    Raises:
        DataError: it has no whole number ``answer``.
    """
    answer = columns.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(
            f'calculator needs a whole number answer, got {answer!r}; a row is {{"prompt": "What is 12 * 34?", '
            '"answer": 408}'
        )
