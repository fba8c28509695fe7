"""Worlds from what a user gives: a file and a class, a class, or a trainer's arguments in TRL's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.errors import ConfigError, EggrollError
from eggroll.llm.rewards.base import Reward
from eggroll.llm.rewards.importing import import_file, import_module
from eggroll.llm.rewards.load import as_reward
from eggroll.llm.rewards.multi import MultiReward
from eggroll.llm.worlds.environments import Environments
from eggroll.llm.worlds.host import Factory
from eggroll.llm.worlds.reward import WorldReward, world_of
from eggroll.llm.worlds.world import World

KINDS = (
    "A world is a class with reset(row) and step(completion), or one for TRL's environment_factory: reset(**row) and "
    "methods that a model may call"
)


@dataclass(frozen=True)
class WorldSpec:
    """A world that a command line names, and what else is scored; workers elsewhere load it by itself.

    Attributes:
        world: ``FILE.py:Class`` or ``package.module:Class``.
        reward: as for :func:`~eggroll.llm.rewards.load.as_reward`; ``None`` for the world's score alone.
    """

    world: str
    reward: Any = None

    def to_reward(self, tokenizer: Any) -> Reward:
        """The reward with its world.

        Raises:
            EggrollError: one of the two cannot be loaded.
        """
        return with_world(self.reward, load_world(self.world), tokenizer=tokenizer)


def load_world(spec: str) -> type[Any]:
    """The class that ``FILE.py:Class`` or ``package.module:Class`` means; ``FILE.py`` where it has only one.

    Raises:
        ConfigError: there is none, or it raises when it is loaded.
    """
    path, _, name = spec.strip().rpartition(":") if not Path(spec.strip()).is_file() else (spec.strip(), "", "")
    path, name = (path, name) if path else (name, "")
    is_file = path.endswith(".py") or "/" in path
    if is_file and not Path(path).expanduser().is_file():
        raise ConfigError(f"--world {spec}: there is no file {path}. Give FILE.py:Class or package.module:Class")
    try:
        module = import_file(Path(path).expanduser()) if is_file else import_module(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"--world {spec}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if module is None:
        raise ConfigError(f"--world {spec}: {path} is not a Python file; its name must end with .py")
    return _class_of(module, name, spec)


def _class_of(module: ModuleType, name: str, spec: str) -> type[Any]:
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and callable(getattr(value, "reset", None))
    }
    if not name and len(own) == 1:
        return next(iter(own.values()))
    if name and inspect.isclass(found := getattr(module, name, None)) and hasattr(found, "reset"):
        return found
    said = f"has no class {name!r} with a method reset" if name else "has not exactly one class with a method reset"
    raise ConfigError(f"--world {spec}: the file {said}; it has {', '.join(sorted(own)) or 'none'}. {KINDS}")


def is_world(factory: Any) -> bool:
    """Whether something makes worlds of ours, and not environments as TRL knows them: ``step(completion)`` tells."""
    if not inspect.isclass(factory):
        return isinstance(factory, Environments)
    if issubclass(factory, World):
        return True
    step = getattr(factory, "step", None)
    return callable(step) and "completion" in inspect.signature(step).parameters


def with_world(
    reward: Any,
    world: Factory | Mapping[str, Factory] | None = None,
    tools: Sequence[Callable[..., Any]] | None = None,
    *,
    tokenizer: Any = None,
) -> Reward:
    """A reward with the world that its conversations are held with.

    Args:
        reward: as for :func:`~eggroll.llm.rewards.load.as_reward`; ``None`` for the world's score alone.
        world: a class of worlds, or TRL's ``environment_factory``.
        tools: functions that a model may call.
        tokenizer: the model's, if there is one yet.

    Raises:
        ConfigError: nothing scores, or there are two worlds.
    """
    other = None if reward is None else as_reward(reward, tokenizer)
    if world is None and not tools:
        if other is None:
            raise ConfigError("there is no reward, and no world that scores")
        return other
    if other is not None and (there := world_of(other)) is not None:
        raise ConfigError(f"the reward brings a world of its own, {there.name}; give one world")
    if is_world(world):
        if tools:
            raise ConfigError("tools go with environment_factory; a world shows functions by its attribute tools")
        factory: Any = world
        scored = other is None or callable(getattr(world, "score", None))
        part = WorldReward(factory, scored=scored)
    else:
        environments = Environments.of(world, tools)
        part = WorldReward(environments, scored=environments.scored)
        if other is None and not environments.scored:
            raise ConfigError(
                f"nothing scores {environments.__name__}: give a reward, or a method get_reward() to the environment"
            )
    return part if other is None else MultiReward([(other, 1.0), (part, 1.0)])


def rows_of(spec: str) -> tuple[list[Any], list[Any] | None]:
    """The rows to train on and the held-out rows that a world brings with its ``rows()``.

    Raises:
        ConfigError: it brings none.
    """
    kind = load_world(spec)
    rows = getattr(kind, "rows", None)
    if rows is None:
        raise ConfigError(
            f"--world {spec} needs rows to begin conversations with: give --prompts with a .jsonl file, or the class a "
            'static method rows() that returns a list of rows, or {"train": [...], "heldout": [...]}'
        )
    try:
        found = rows() if callable(rows) else rows
    except EggrollError:
        raise
    except Exception as error:
        raise ConfigError(f"--world {spec}: rows() raised {type(error).__name__}: {error}") from error
    if isinstance(found, Mapping):
        return list(found.get("train", ())), list(found["heldout"]) if found.get("heldout") else None
    return list(found), None


__all__ = ["WorldSpec", "is_world", "load_world", "rows_of", "with_world"]
