"""The task ``zeros``, for finding out whether a set-up learns at all: write nothing but the digit 0.

    reward = zeros / characters that are not white space            in [0, 1]; 0 for an empty answer

Any model can raise it within a few generations, from the smallest step on, and whether it does can be read off the
samples. It says nothing about a model. The prompts name a number of zeros; the reward does not ask for that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eggroll.llm.tasks.answers import text_of
from eggroll.llm.tasks.splits import Splits, fill

__all__ = ["BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SYSTEM", "reward", "splits"]

DESCRIPTION = "Write nothing but zeros (for debugging)."
MAX_TOKENS = 16
BEST = 1.0
SYSTEM: str | None = None
SETTINGS: dict[str, Any] = {}


def splits() -> Splits:
    """The task's prompts."""
    made = ((str(count), {"prompt": f"Write {count} zeros."}) for count in range(2, 514))
    return fill(made, {"train": 128, "validation": 32, "heldout": 32, "test": 64})


def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """The scores of ``completions``, in TRL's form."""
    return [_score(text_of(completion)) for completion in completions]


def _score(text: str) -> float:
    written = "".join(text.split())
    return written.count("0") / len(written) if written else 0.0
