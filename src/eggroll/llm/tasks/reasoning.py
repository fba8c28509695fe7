"""Every task of the package reasoning-gym (arXiv:2505.24760), as ``reasoning-gym:NAME``, scored by its own scorer.

    reward = what the task's ``score_answer`` gives for the answer, in [0, 1]; 1 is a right answer

The answer is what stands in the last ``<answer>...</answer>``, and the whole completion if there is none. Problems are
those that the package makes by default, from a fixed seed; which split one belongs to is decided by the hash of its
question, and a question that comes up again is left out. Answers are screened before a scorer sees them (screening.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from eggroll.errors import ConfigError, DataError
from eggroll.llm.tasks.answers import column, last_block, text_of
from eggroll.llm.tasks.reasoning_problems import DRAWS, SLOW, SLOWEST, dataset_of, entry_of, names
from eggroll.llm.tasks.screening import SECONDS, is_harmless, time_limit
from eggroll.llm.tasks.splits import Row, Splits, fill, normal

__all__ = ["BEST", "MAX_TOKENS", "PREFIX", "SETTINGS", "SYSTEM", "ReasoningReward", "check_name", "names", "splits"]

PREFIX = "reasoning-gym:"
MAX_TOKENS = 256
BEST = 1.0
SYSTEM: str | None = None
SETTINGS: dict[str, Any] = {"max_length": 2048}  # some questions are long, and a prompt loses its beginning

SIZES = {"train": 1024, "validation": 64, "heldout": 64, "test": 256}
SLOW_SIZES = {"train": 256, "validation": 32, "heldout": 32, "test": 128}
SLOWEST_SIZES = {"train": 64, "validation": 16, "heldout": 16, "test": 32}
EXACT = frozenset({"game_of_life_halting"})
"""Tasks whose scorer is not used: it takes every answer but an empty one for right. Equal to the answer is right."""
_PROMPT = "{question}\n\nGive the final answer alone inside <answer> </answer>."


def check_name(name: str) -> str:
    """``name``, if there is such a task; ``-`` and ``_`` are the same.

    Raises:
        MissingExtraError: the package is not installed.
        ConfigError: there is none; the message lists near matches.
    """
    known, wanted = names(), name.strip().replace("-", "_").lower()
    if wanted in known:
        return wanted
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    near += [other for other in known if wanted and wanted in other and other not in near][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
    raise ConfigError(f"reasoning-gym has no task {name!r}; {hint}")


def splits(name: str) -> Splits:
    """The problems of a task: rows of ``prompt``, ``answer`` (empty if there are many) and ``index``.

    Raises:
        DataError: the task has so few different problems that a split stays empty.
    """
    sizes = SLOWEST_SIZES if name in SLOWEST else SLOW_SIZES if name in SLOW else SIZES
    found = fill(_problems(name), sizes)
    empty = [split for split, rows in found.items() if not rows]
    if empty:
        raise DataError(
            f"the task {PREFIX}{name} has too few different problems: {', '.join(empty)} would be empty "
            f"({sum(map(len, found.values()))} different ones in {DRAWS})"
        )
    return found


class ReasoningReward:
    """The reward of one task, in TRL's form: ``reward(prompts, completions, index=...)``.

    Args:
        name: the task's name in reasoning-gym.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], index: Sequence[int] | None = None, **_: Any
    ) -> list[float]:
        """One score per completion, in [0, 1].

        Raises:
            RewardError: the rows are not those of :func:`splits`: they have no column ``index``.
        """
        example = '{"prompt": "...", "index": 7}, where index counts the problems of the task'
        indices = column(PREFIX + self.name, index, "index", example)
        return [self._score(text_of(text), int(each)) for text, each in zip(completions, indices, strict=True)]

    def _score(self, text: str, index: int) -> float:
        answer = last_block(text)
        answer = text.strip() if answer is None else answer
        entry = entry_of(self.name, index)
        if self.name in EXACT:
            return 1.0 if answer == entry["answer"] else 0.0
        if not is_harmless(self.name, answer, str(entry["answer"] or "")):
            return 0.0
        return _scored(self.name, index, answer)


@lru_cache(maxsize=4096)
def _scored(name: str, index: int, answer: str) -> float:
    """What the task's scorer gives, which depends on nothing else: members often give the same answer.

    One that runs into the time limit does so once, and not once for each member.
    """
    try:
        with time_limit(SECONDS):
            return float(dataset_of(name).score_answer(answer, entry_of(name, index)))
    except Exception:  # scorers raise on answers that are not of the form that they expect
        return 0.0


def _problems(name: str) -> Iterator[tuple[str, Row]]:
    for index in range(DRAWS):
        entry = entry_of(name, index)
        question = str(entry["question"]).strip()
        answer = "" if entry["answer"] is None else str(entry["answer"])
        yield normal(question), {"prompt": _PROMPT.format(question=question), "answer": answer, "index": index}
