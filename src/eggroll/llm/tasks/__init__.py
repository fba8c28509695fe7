"""Tasks that ship with eggroll: a reward, the prompts to train and to test on, and settings that work.

    task = get_task("countdown")                        or one_sentence, gsm8k, zeros, reasoning-gym:chain_sum, ...
    task = get_task("math500")                          suites to evaluate on, which have a test set only
    task = get_task("countdown", shots=2)               two worked examples before each problem
    task.reward(prompts, completions, **columns)        plain Python, in TRL's form
    task.train, task.validation, task.heldout, task.test    lists of {"prompt": ..., ...}, no problem in two of them

Neither torch nor transformers is needed here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.errors import ConfigError
from eggroll.llm.tasks import (
    calculator,
    countdown,
    gsm8k,
    guess_number,
    math_suites,
    maze,
    one_sentence,
    reasoning,
    zeros,
)
from eggroll.llm.tasks.task import Task, with_shots

__all__ = ["SOLVED", "Task", "check_trainable", "get_task", "is_task", "names", "row_check"]

_DATA = Path(__file__).parent / "data"
_MODULES: dict[str, ModuleType] = {
    "calculator": calculator, "countdown": countdown, "gsm8k": gsm8k, "guess_number": guess_number, "maze": maze,
    "zeros": zeros,
}  # fmt: skip
SOLVED = 1.0
"""An answer with at least this score counts as right, in every task."""


def names() -> list[str]:
    """The names of the tasks that ship with eggroll; ``reasoning-gym:NAME`` comes on top of these."""
    return sorted([*_MODULES, *math_suites.SUITES, "one_sentence"])


def is_task(name: str) -> bool:
    """Whether ``name`` means a task, known or not in the case of ``reasoning-gym:NAME``."""
    return _key(name) in names() or _reasoning_name(name) is not None


def row_check(name: str | None) -> Callable[[dict[str, Any]], None] | None:
    """What raises ``DataError`` about a row of a user's data that the task cannot score; ``None`` if all will do."""
    key = _key(name or "")
    return math_suites.check if key in math_suites.SUITES else getattr(_MODULES.get(key), "check", None)


def check_trainable(name: str | None) -> None:
    """Refuse a task that is there to evaluate on; nothing is read or made.

    Raises:
        ConfigError: it is one; the message says what to do instead.
    """
    if name is not None and _key(name) in math_suites.SUITES:
        math_suites.refuse_training(_key(name))


def get_task(name: str, *, shots: int = 0) -> Task:
    """The task called ``name``; ``-`` and ``_`` are the same. Its problems are made or read at the first call.

    Args:
        name: one of :func:`names`, or ``reasoning-gym:NAME``.
        shots: worked examples that come before each problem, as earlier turns of a conversation. They are training
            problems, which are no longer among those to train on.

    Raises:
        ConfigError: there is no such task (the message lists near matches), or none with worked examples.
        MissingExtraError: the package that the task needs is not installed.
        DataError: the task's data set cannot be found.
    """
    inner = _reasoning_name(name)
    if inner is not None:
        task = _reasoning_task(reasoning.check_name(inner))
    elif _key(name) not in names():
        raise ConfigError(f"there is no task {name!r}; {_hint(name)}")
    else:
        task = _task(_key(name))
    return task if shots == 0 else _shown(task.name, shots)


@cache
def _shown(name: str, shots: int) -> Task:
    return with_shots(get_task(name), _MODULES.get(name), shots)


@cache
def _task(key: str) -> Task:
    if key in math_suites.SUITES:
        return math_suites.task(key)
    if key == "one_sentence":
        module: ModuleType = one_sentence
        found: dict[str, Any] = {
            split: _rows(_DATA / f"{key}_{split}.jsonl") for split in ("train", "validation", "heldout")
        }
    else:
        module = _MODULES[key]
        found = module.splits()
    return Task(
        name=key,
        description=module.DESCRIPTION,
        reward=getattr(module, "reward", world_score),
        max_tokens=module.MAX_TOKENS,
        system=module.SYSTEM,
        settings=dict(module.SETTINGS),
        best=getattr(module, "BEST", 1.0),
        world=getattr(module, "WORLD", None),
        train=found["train"],
        validation=found["validation"],
        heldout=found["heldout"],
        test=found.get("test", []),
    )


def world_score(prompts: Sequence[Any], completions: Sequence[Any], world_score: Sequence[float]) -> list[float]:
    """The reward of a task with a world, in TRL's form: what the world has scored."""
    return list(world_score)


@cache
def _reasoning_task(name: str) -> Task:
    found: dict[str, Any] = reasoning.splits(name)
    return Task(
        name=reasoning.PREFIX + name,
        description=f"The task {name} of reasoning-gym.",
        reward=reasoning.ReasoningReward(name),
        max_tokens=reasoning.MAX_TOKENS,
        system=reasoning.SYSTEM,
        settings=dict(reasoning.SETTINGS),
        best=reasoning.BEST,
        **found,
    )


def _key(name: str) -> str:
    return name.strip().replace("-", "_")


def _reasoning_name(name: str) -> str | None:
    """What follows ``reasoning-gym:``, or ``None``."""
    before, colon, after = name.partition(":")
    return after if colon and before.strip().replace("_", "-") == reasoning.PREFIX[:-1] else None


def _hint(name: str) -> str:
    known = [*names(), f"{reasoning.PREFIX}NAME"]
    near = difflib.get_close_matches(_key(name), known, n=2, cutoff=0.6)
    return (f"did you mean {' or '.join(near)}? The" if near else "the") + f" tasks are {', '.join(known)}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
