"""Settings of conversations with worlds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eggroll.core.check import is_number, whole


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """How long conversations are, and what becomes of a world that fails."""

    max_turns: int = 8
    """Most completions in a conversation with a world."""
    world_timeout: float = 10.0
    """Seconds that a call of a world may take."""
    world_failure_score: float = 0.0
    """What a conversation scores whose world raises, hangs, floods, or scores with no number."""
    world_workers: int = 0
    """Processes that worlds live in; 0 lets them live in threads of this one."""


def world_problems(options: Any) -> list[str]:
    """Everything that is wrong with these settings, one sentence each."""
    found = whole(options, max_turns=1, world_workers=0)
    if not (is_number(options.world_timeout) and options.world_timeout > 0.0):
        found.append(f"world_timeout (={options.world_timeout!r}) must be a number of seconds above 0")
    if not is_number(options.world_failure_score):
        found.append(f"world_failure_score (={options.world_failure_score!r}) must be a finite number")
    return found
