"""TRL's environments and tools as worlds: what a ``GRPOTrainer`` takes, as it is.

``environment_factory`` makes an environment without arguments: a class whose public methods are the functions that a
model may call, with type hints and docstrings. Its ``reset(**row)`` gets the row's columns and returns ``None`` or a
text, which is appended to the last message of the prompt; ``get_reward()``, where there is one, scores the
conversation. A dict of factories chooses by the row's column ``environment``. ``tools`` are functions without a state.

A conversation goes on as long as the model calls functions. What one raises, the model is told: ``{'error': ...}``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eggroll.errors import ConfigError, DataError
from eggroll.llm.rewards.base import function_name
from eggroll.llm.worlds.host import Factory, name_of
from eggroll.llm.worlds.toolcalls import schema_of
from eggroll.llm.worlds.world import Completion, Message, Turn, World

NOT_TOOLS = ("reset", "get_reward")
COLUMN = "environment"
"""Says which of several environments a row is for."""


@dataclass(frozen=True)
class Environments:
    """Makes worlds of TRL's environments and tools.

    Attributes:
        factories: by name; a single one has the name ``None``.
        tools: functions that every row has.
    """

    factories: Mapping[str | None, Factory] = field(default_factory=dict)
    tools: Sequence[Callable[..., Any]] = ()

    @classmethod
    def of(cls, environment_factory: Any, tools: Sequence[Callable[..., Any]] | None) -> Environments:
        """From a trainer's arguments.

        Raises:
            ConfigError: something cannot be called, or an environment has no ``reset``.
            DataError: a tool cannot be described.
        """
        factories: dict[str | None, Factory] = {}
        if isinstance(environment_factory, Mapping):
            factories.update(environment_factory)
        elif environment_factory is not None:
            factories[None] = environment_factory
        for function in (*factories.values(), *(tools or ())):
            if not callable(function):
                raise ConfigError(f"environment_factory and tools are functions or classes, got {function!r}")
        made = cls(factories, tuple(tools or ()))
        for tool in made.tools:
            schema_of(tool)
        for factory in factories.values():
            kind = _kind(factory)
            if not callable(getattr(kind, "reset", None)):
                raise ConfigError(f"the environment {kind.__name__} has no reset(**row), which begins a conversation")
            for method in methods_of(kind):
                schema_of(getattr(kind, method))
        return made

    @property
    def __name__(self) -> str:
        """A name for messages and logs."""
        names = [name_of(factory) for factory in self.factories.values()] or list(map(function_name, self.tools))
        return "+".join(names)

    @property
    def scored(self) -> bool:
        """Whether all environments score conversations themselves."""
        kinds = [_kind(factory) for factory in self.factories.values()]
        return bool(kinds) and all(hasattr(kind, "get_reward") for kind in kinds)

    def __call__(self) -> EnvironmentWorld:
        """A world for one row after the other."""
        return EnvironmentWorld(self.factories, self.tools)


class EnvironmentWorld(World):
    """An environment and stateless tools, as a world.

    Args:
        factories, tools: see :class:`Environments`.
    """

    reusable = True
    """As with TRL, an environment is made once and reset for each conversation."""

    def __init__(self, factories: Mapping[str | None, Factory], tools: Sequence[Callable[..., Any]]) -> None:
        self.factories, self.own = factories, tools
        self.made: dict[str | None, Any] = {}
        self.environment: Any = None
        self.functions: dict[str, Callable[..., Any]] = {}

    def reset(self, row: Mapping[str, Any]) -> Any:
        """Reset the row's environment; the prompt with what it says."""
        row = dict(row)
        self.environment = self._choose(row)
        methods = [] if self.environment is None else methods_of(type(self.environment))
        functions = [*self.own, *(getattr(self.environment, name) for name in methods)]
        self.functions = {function_name(function): function for function in functions}
        self.tools = [_schema(function) for function in functions]
        if self.environment is None:
            return None
        observation = self.environment.reset(**row)
        if inspect.isawaitable(observation):
            return self._awaited_opening(row, observation)
        return _opening(row, observation)

    def _choose(self, row: dict[str, Any]) -> Any:
        if not self.factories:
            return None
        name = None if None in self.factories else row.pop(COLUMN, None)
        if name not in self.factories:
            known = ", ".join(map(repr, self.factories))
            raise DataError(f"the row's column {COLUMN!r} (={name!r}) must name one of the environments: {known}")
        if name not in self.made:
            self.made[name] = self.factories[name]()
        return self.made[name]

    async def _awaited_opening(self, row: Mapping[str, Any], observation: Any) -> Any:
        return _opening(row, await observation)

    def step(self, completion: Completion) -> Any:
        """Call what the model asks for; without that, the conversation is over."""
        calls = completion.tool_calls
        if not calls:
            return Turn(done=True)
        results = [self._result(call) for call in calls]
        if any(map(inspect.isawaitable, results)):
            return self._awaited_turn(calls, results)
        return _turn(calls, results)

    def _result(self, call: Mapping[str, Any]) -> Any:
        function = self.functions.get(call["name"])
        if function is None:
            return {"error": f"Tool {call['name']} not found."}
        try:
            return function(**call["arguments"])
        except Exception as error:
            return {"error": str(error)}

    async def _awaited_turn(self, calls: Sequence[Mapping[str, Any]], results: Sequence[Any]) -> Turn:
        found = []
        for result in results:
            try:
                found.append(await result if inspect.isawaitable(result) else result)
            except Exception as error:
                found.append({"error": str(error)})
        return _turn(calls, found)

    def score(self) -> Any:
        """What ``get_reward`` says, where there is one; it may be ``async``."""
        reward = getattr(self.environment, "get_reward", None)
        return None if reward is None else reward()


def methods_of(kind: type[Any]) -> list[str]:
    """The names of a class's public methods that a model may call."""
    return [
        name
        for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)
        if not name.startswith("_") and name not in NOT_TOOLS
    ]


def _kind(factory: Factory) -> type[Any]:
    return factory if isinstance(factory, type) else type(factory())


def _schema(function: Any) -> dict[str, Any]:
    return _known_schema(getattr(function, "__func__", function))


@functools.lru_cache(maxsize=512)
def _known_schema(function: Any) -> dict[str, Any]:
    return schema_of(function)


def _opening(row: Mapping[str, Any], observation: Any) -> list[Message]:
    prompt = row.get("prompt") or ""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if observation is not None:
        last = messages[-1]
        messages[-1] = {**last, "content": f"{last['content']}{observation}"}
    return messages


def _turn(calls: Sequence[Mapping[str, Any]], results: Sequence[Any]) -> Turn:
    pairs = zip(calls, results, strict=True)
    return Turn([{"role": "tool", "name": call["name"], "content": str(result)} for call, result in pairs])


__all__ = ["EnvironmentWorld", "Environments", "methods_of"]
