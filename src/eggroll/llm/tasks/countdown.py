"""The task ``countdown``: make a target out of three or four numbers, each used exactly once, with + - * /.

    reward = 0.1 * format + answer                  from 0 to 1.1

    format   1 for <think>...</think> <answer>...</answer> and nothing else, less for parts of it (answers.py)
    answer   1 if the last <answer> holds an expression whose numbers are exactly the given ones and whose value is
             exactly the target, else 0

The sizes are those of the literature (Countdown-Tasks-3to4 of TinyZero; Qiu et al. 2025, arXiv:2509.24372): numbers
from 1 to 99, targets from 1 to 100. Each problem is made from a random solution, in which every intermediate value is
a positive whole number, so all of them can be solved; answers may use fractions on the way. Two problems are the same
if they have the same numbers, in whatever order, and the same target. None comes twice, in one split or in two.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.tasks.answers import FORMAT_WEIGHT, column, format_score, last_block, text_of
from eggroll.llm.tasks.arithmetic import evaluate, steps
from eggroll.llm.tasks.splits import Splits, fill

__all__ = [
    "BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SHOTS_MAX_TOKENS", "SHOTS_SYSTEM", "SYSTEM",
    "check", "is_solution", "problems", "reward", "splits", "worked",
]  # fmt: skip

DESCRIPTION = "Make the target out of the numbers, each used exactly once, with + - * /."
MAX_TOKENS = 256
BEST = 1.0 + FORMAT_WEIGHT
SYSTEM: str | None = None
SETTINGS: dict[str, Any] = {
    "population_size": 16,
    "rank": 1,
    "sigma": 0.01,
    "lr": 0.05,
    "optimizer": "sgd",
    "vectors": True,
    "prompts_per_generation": 4,
}
"""Chosen of four on the validation problems, with SmolLM2-135M and two worked examples (benchmarks/grpo)."""
SHOTS_SYSTEM = (
    "Make the target out of the numbers, using each number exactly once, with + - * /. Answer in the form "
    "<think> steps </think> <answer> expression </answer>."
)
"""The system prompt with worked examples, which then need not say it again with each problem."""
SHOTS_MAX_TOKENS = 80
"""Worked answers have 41 to 68 tokens of SmolLM2's."""

SEED = 2024
SIZES = {"train": 4096, "validation": 64, "heldout": 64, "test": 1024}
LARGEST_NUMBER = 99
LARGEST_TARGET = 100
_PROMPT = (
    "Using the numbers {numbers}, write an expression that equals {target}. Use only + - * / and brackets, and use "
    "every number exactly once. Think inside <think> </think>, then give the expression alone inside "
    "<answer> </answer>, for example <think> 6 * 7 is 42, and 42 - 2 is 40. </think> <answer> 6 * 7 - 2 </answer>."
)
_WHOLE = re.compile(r"[+-]?\d{1,30}(?:\.0*)?", re.ASCII)
_EXAMPLE = '{"prompt": "...", "numbers": [6, 7, 2], "target": 40}'


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless problems: pairs of a key and a row ``prompt, numbers, target, solution``."""
    rng = random.Random(seed)
    while True:
        numbers = [1 + _below(rng, LARGEST_NUMBER) for _ in range(3 + _below(rng, 2))]
        made = _combine(rng, numbers)
        if made is None or not 1 <= made[0] <= LARGEST_TARGET:
            continue
        target, solution = made
        listed = ", ".join(map(str, numbers))
        row = {
            "prompt": _PROMPT.format(numbers=listed, target=target),
            "numbers": numbers,
            "target": target,
            "solution": solution,
        }
        yield f"{sorted(numbers)} -> {target}", row


def splits() -> Splits:
    """The task's problems."""
    return fill(problems(SEED), SIZES)


def worked(row: dict[str, Any]) -> tuple[str, str]:
    """A problem as it is put after ``SHOTS_SYSTEM``, and a full answer to it."""
    question = f"Numbers: {', '.join(map(str, row['numbers']))}. Target: {row['target']}."
    thought = ", ".join(steps(row["solution"]))
    return question, f"<think> {thought} </think> <answer> {row['solution']} </answer>"


def is_solution(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression uses exactly these numbers and has exactly this value."""
    found = evaluate(answer)
    return found is not None and sorted(found[1]) == sorted(numbers) and found[0] == target


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int]] | None = None,
    target: Sequence[int] | None = None,
    nums: Sequence[Sequence[int]] | None = None,
    **_: Any,
) -> list[float]:
    """The scores of ``completions``, in TRL's form; ``nums`` is what TinyZero's data set calls ``numbers``.

    Raises:
        RewardError: the data set has no column ``numbers`` (or ``nums``) or no column ``target``.
        DataError: what they hold are no whole numbers.
    """
    given = column("countdown", numbers if numbers is not None else nums, "numbers", _EXAMPLE)
    wanted = column("countdown", target, "target", _EXAMPLE)
    rows = zip(completions, given, wanted, strict=True)
    return [_score(text_of(completion), *_read(each, value)) for completion, each, value in rows]


def check(columns: Mapping[str, Any]) -> None:
    """Find out that a row of a data set cannot be scored, before anything is scored.

    Raises:
        DataError: it has both columns, and what they hold are no whole numbers.
    """
    numbers = columns.get("numbers", columns.get("nums"))
    if numbers is not None and columns.get("target") is not None:
        _read(numbers, columns["target"])


def _read(numbers: Any, target: Any) -> tuple[list[int], int]:
    """Numbers and target as whole numbers; files of CSV or of other programs hold them as text ("24", "[6, 7, 2]")."""
    listed = numbers.strip(" []()").replace(",", " ").split() if isinstance(numbers, str) else numbers
    found = [_whole(number) for number in listed] if isinstance(listed, Iterable) else []
    value = _whole(target)
    if not found or None in found:
        raise DataError(f"numbers (={numbers!r}) must be a list of whole numbers, as in {_EXAMPLE}")
    if value is None:
        raise DataError(f"target (={target!r}) must be a whole number, as in {_EXAMPLE}")
    return [number for number in found if number is not None], value


def _whole(value: Any) -> int | None:
    """A whole number, given as such, as 24.0 or as text; ``None`` for anything else."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value.strip()) else None
    if isinstance(value, Integral):
        return None if isinstance(value, bool) else int(value)
    return int(float(value)) if isinstance(value, Real) and float(value).is_integer() else None


def _score(text: str, numbers: Sequence[int], target: int) -> float:
    answer = last_block(text)
    right = answer is not None and is_solution(answer, numbers, target)
    return FORMAT_WEIGHT * format_score(text) + (1.0 if right else 0.0)


def _combine(rng: random.Random, numbers: Sequence[int]) -> tuple[int, str] | None:
    """A random expression in all numbers and its value; ``None`` if a value on the way is not positive and whole."""
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        left, right = parts.pop(_below(rng, len(parts))), parts.pop(_below(rng, len(parts)))
        sign = "+-*/"[_below(rng, 4)]
        if sign == "-" and left[0] <= right[0]:
            return None
        if sign == "/" and left[0] % right[0]:
            return None
        value = {
            "+": left[0] + right[0],
            "-": left[0] - right[0],
            "*": left[0] * right[0],
            "/": left[0] // right[0],
        }[sign]
        parts.append((value, f"({left[1]} {sign} {right[1]})"))
    value, text = parts[0]
    return value, text[1:-1]


def _below(rng: random.Random, limit: int) -> int:
    # Only random() is promised to give the same numbers in every version of Python.
    return int(rng.random() * limit)
