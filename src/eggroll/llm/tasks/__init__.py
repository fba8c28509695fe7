"""Tasks that ship with eggroll: a reward, the prompts to train and to test on, and settings that work.

    task = get_task("one_sentence")
    task.reward(prompts, completions, answer=...)       plain Python, in TRL's form
    task.train, task.validation, task.heldout           lists of {"prompt": ..., "answer": [...], ...}

Neither torch nor transformers is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.errors import ConfigError
from eggroll.llm.tasks import one_sentence

__all__ = ["Task", "get_task", "names"]

_DATA = Path(__file__).parent / "data"
_MODULES: dict[str, ModuleType] = {"one_sentence": one_sentence}


@dataclass(frozen=True)
class Task:
    """What a model is to become better at.

    ``reward(prompts, completions, **columns) -> list[float]`` is higher for better answers; its best is 1. ``train``
    is for training, ``validation`` for choosing settings, and ``heldout`` for the figures that are reported: nothing
    is chosen by it. ``system`` is the system prompt (``None``: what the model's chat template has by default),
    ``max_tokens`` the length at which answers are cut, ``settings`` the fields of the configuration that were found to
    work.
    """

    name: str
    description: str
    reward: Callable[..., list[float]]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    max_tokens: int
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The names of the tasks that ship with eggroll."""
    return sorted(_MODULES)


@cache
def get_task(name: str) -> Task:
    """The task called ``name``; ``-`` and ``_`` are the same.

    Raises:
        ConfigError: there is no such task.
    """
    key = name.replace("-", "_")
    if key not in _MODULES:
        raise ConfigError(f"there is no task {name!r}; the tasks that ship with eggroll are {', '.join(names())}")
    module = _MODULES[key]
    train, validation, heldout = (_rows(_DATA / f"{key}_{split}.jsonl") for split in ("train", "validation", "heldout"))
    return Task(
        name=key,
        description=module.DESCRIPTION,
        reward=module.reward,
        train=train,
        validation=validation,
        heldout=heldout,
        max_tokens=module.MAX_TOKENS,
        system=module.SYSTEM,
        settings=dict(module.SETTINGS),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
