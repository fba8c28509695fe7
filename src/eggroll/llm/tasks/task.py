"""What a task is, and the same task with worked examples before each problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from eggroll.errors import ConfigError

__all__ = ["CONVERSATION_SETTINGS", "CONVERSATION_SIZES", "MAX_SHOTS", "Task", "with_shots"]

MAX_SHOTS = 16
CONVERSATION_SETTINGS: Mapping[str, Any] = {
    "population_size": 32,
    "rank": 1,
    "sigma": 0.01,
    "lr": 0.05,
    "optimizer": "sgd",
    "vectors": True,
    "prompts_per_generation": 4,
    "generations": 40,
    "eval_every": 10,
}
"""What tasks with a world have in common, beside how many turns a conversation has."""
CONVERSATION_SIZES: Mapping[str, int] = {"train": 1024, "validation": 64, "heldout": 64, "test": 256}
"""How many conversations the splits of such a task have."""


@dataclass(frozen=True)
class Task:
    """What a model is to become better at.

    ``reward(prompts, completions, **columns) -> list[float]`` is higher for better answers, from 0 to ``best``; from
    ``SOLVED`` on an answer is right. ``train`` is for training, ``validation`` for choosing settings, ``heldout`` is
    what a run watches, and ``test`` is what figures are reported on: no run looks at it (empty if the task has too
    few problems for that; ``heldout`` serves then). ``system`` is the system prompt (``None``: what the model's chat
    template has by default), ``max_tokens`` the length at which answers are cut, ``settings`` the fields of the
    configuration that were found to work. ``world`` makes the world that a conversation is held with, where a task has
    one; ``reward`` then reads what it has scored.
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
    test: list[dict[str, Any]] = field(default_factory=list)
    best: float = 1.0
    world: Callable[[], Any] | None = None

    def __repr__(self) -> str:
        """Name, purpose and sizes; a notebook would show thousands of rows otherwise."""
        sizes = ", ".join(f"{name}={len(getattr(self, name))}" for name in ("train", "validation", "heldout", "test"))
        return f"Task({self.name!r}, {self.description!r}, rows: {sizes})"


def with_shots(task: Task, module: ModuleType | None, shots: int) -> Task:
    """``task`` with ``shots`` worked examples in front of each problem: conversations of user and assistant turns.

    The examples are the last of the training problems, the same ones everywhere, so that their tokens are computed
    once per member and not once per problem.

    Args:
        task: the task without examples.
        module: what it comes from: ``worked(row)`` gives a question and an answer to it, ``SHOTS_SYSTEM`` the system
            prompt that goes with them (``None``: the task's), and ``SHOTS_MAX_TOKENS`` how long answers like those get.
        shots: how many, at least 1.

    Raises:
        ConfigError: so many are not allowed, or this task has no worked answers.
    """
    if not 1 <= shots <= MAX_SHOTS:
        raise ConfigError(f"shots (={shots}) must be from 0 to {MAX_SHOTS} worked examples")
    if not hasattr(module, "worked"):
        raise ConfigError(
            f"shots (={shots}): the task {task.name} has no worked answers to show; countdown and gsm8k have. "
            "Conversations in a .jsonl file (--prompts) can show any example"
        )
    assert module is not None
    examples: list[dict[str, str]] = []
    for row in task.train[-shots:]:
        question, answer = module.worked(row)
        examples += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "prompt": [*examples, {"role": "user", "content": module.worked(row)[0]}]} for row in rows]

    return dataclasses.replace(
        task,
        train=shown(task.train[:-shots]),
        validation=shown(task.validation),
        heldout=shown(task.heldout),
        test=shown(task.test),
        system=module.SHOTS_SYSTEM or task.system,
        max_tokens=module.SHOTS_MAX_TOKENS,
        # room for the examples: eight of gsm8k's take 1,761 tokens, problem included, with SmolLM2's tokenizer
        settings={**task.settings, "max_length": task.settings.get("max_length", 512) + 320 * shots},
    )
