"""What a completion says: its text, the answer in it, and whether it has the asked-for form.

Nothing here searches with a pattern that could backtrack: a megabyte of brackets costs what reading it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError

__all__ = ["FORMAT_WEIGHT", "column", "format_score", "last_block", "text_of"]

FORMAT_WEIGHT = 0.1
"""What the right form is worth beside a right answer's 1, the usual ratio (TinyZero, GRPO-Zero, Qiu et al. 2025)."""
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def text_of(message: str | Sequence[Mapping[str, str]]) -> str:
    """A string as it is; of a conversation the last message."""
    return message if isinstance(message, str) else message[-1]["content"]


def column(task: str, values: Sequence[Any] | None, name: str, example: str) -> Sequence[Any]:
    """The column ``name`` of the data set.

    Raises:
        RewardError: the data set has none; the message shows a row that would do.
    """
    if values is None:
        raise RewardError(f'the reward "{task}" needs a column "{name}" in the data set, as in {example}')
    return values


def last_block(text: str, tag: str = "answer") -> str | None:
    """What stands in the last complete ``<tag>...</tag>``, without white space around it; ``None`` without one."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(opening) : end].strip()


def format_score(text: str) -> float:
    """How far a completion has the form ``<think>...</think> <answer>...</answer>``, in [0, 1].

    1 for exactly that, with nothing before, between or after. Otherwise 0.1 for a ``<think>`` block and 0.5 for an
    ``<answer>`` block, so that a model which knows neither is led there step by step (the rule of GRPO-Zero).
    """
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in _TAGS)
    if once and text.startswith("<think>") and text.endswith("</answer>"):
        between = text[text.find("</think>") + len("</think>") : text.find("<answer>")]
        if text.find("</think>") < text.find("<answer>") and not between.strip():
            return 1.0
    return (0.1 if last_block(text, "think") is not None else 0.0) + (0.5 if last_block(text) is not None else 0.0)
