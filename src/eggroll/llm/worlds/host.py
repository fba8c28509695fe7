"""Where worlds live: a host opens, steps and ends many of them, whatever they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from eggroll.llm.rewards.event_loop import Raised
from eggroll.llm.worlds.calls import Late, run_calls
from eggroll.llm.worlds.world import (
    Completion,
    Failure,
    Opening,
    Turn,
    WorldError,
    as_messages,
    as_number,
    as_turn,
)

Factory = Callable[[], Any]


class Hosting(Protocol):
    """Worlds by their row's number, in this process or in others."""

    def open(self, rows: Mapping[int, dict[str, Any]]) -> dict[int, Opening | Failure]:
        """Begin a conversation for each row."""

    def step(self, said: Mapping[int, Completion]) -> dict[int, Turn | Failure]:
        """Tell worlds what their model has said."""

    def end(self, rows: Sequence[int], *, show: bool) -> dict[int, Any]:
        """End conversations: of each its score, ``None`` or a :class:`Failure`, and the world itself if it is shown."""

    def close(self) -> None:
        """End what still runs."""


class Host:
    """Worlds in threads of this process.

    Args:
        factory: makes a world.
        timeout: seconds that a call may take.
        name: of the world, for messages.
    """

    def __init__(self, factory: Factory, timeout: float, name: str) -> None:
        self.factory, self.timeout, self.name = factory, timeout, name
        self._worlds: dict[int, Any] = {}
        self._idle: list[Any] = []

    def open(self, rows: Mapping[int, dict[str, Any]]) -> dict[int, Opening | Failure]:
        """See :class:`Hosting`."""
        found = self._call("reset", {row: partial(self._begin, row, values) for row, values in rows.items()}, _raw)
        return {row: self._opening(row, value) for row, value in found.items()}

    def _begin(self, row: int, values: dict[str, Any]) -> Any:
        with suppress(IndexError):
            self._worlds[row] = self._idle.pop()
            return self._worlds[row].reset(values)
        self._worlds[row] = self.factory()
        return self._worlds[row].reset(values)

    def _opening(self, row: int, value: Any) -> Opening | Failure:
        if isinstance(value, Failure):
            return value
        what = f"world {self.name}: reset()"
        try:
            messages = None if value is None else as_messages(value, what)
        except WorldError as error:
            return Failure(error.kind, str(error))
        return Opening(messages, list(getattr(self._worlds[row], "tools", ())))

    def step(self, said: Mapping[int, Completion]) -> dict[int, Turn | Failure]:
        """See :class:`Hosting`."""
        calls = {row: partial(self._worlds[row].step, text) for row, text in said.items()}
        return self._call("step", calls, as_turn)

    def end(self, rows: Sequence[int], *, show: bool) -> dict[int, Any]:
        """See :class:`Hosting`."""
        there = {row: self._worlds.pop(row) for row in rows if row in self._worlds}
        asked = {row: world.score for row, world in there.items() if callable(getattr(world, "score", None))}
        scores = self._call("score", asked, as_number)
        closing = {row: world.close for row, world in there.items() if callable(getattr(world, "close", None))}
        closed = self._call("close", closing, _raw)
        found = {}
        for row, world in there.items():
            score = scores.get(row)
            if getattr(world, "reusable", False) and not isinstance(score or closed.get(row), Failure):
                self._idle.append(world)
            found[row] = (score, getattr(world, "environment", world) if show else None)
        return found

    def drop(self, rows: Sequence[int]) -> None:
        """Forget worlds that have failed; they are not used again."""
        for row in rows:
            self._worlds.pop(row, None)

    def close(self) -> None:
        """See :class:`Hosting`."""
        self._worlds.clear()
        self._idle.clear()

    def _call(self, method: str, calls: Mapping[int, Callable[[], Any]], check: Callable[[Any, str], Any]) -> Any:
        what = f"world {self.name}: {method}()"
        found = {}
        for row, value in zip(calls, run_calls(list(calls.values()), self.timeout), strict=True):
            if isinstance(value, Raised):
                found[row] = self._failure(value.error, what)
            else:
                try:
                    found[row] = check(value, what)
                except WorldError as error:
                    found[row] = Failure(error.kind, str(error))
        return found

    def _failure(self, error: BaseException, what: str) -> Failure:
        if isinstance(error, Late):
            return Failure("late", f"{what} did not return within {self.timeout:g} s")
        return Failure("raised", f"{what} raised {type(error).__name__}: {str(error)[:500]}")


def _raw(value: Any, what: str) -> Any:
    return value


def name_of(factory: Factory) -> str:
    """A name for what a factory makes."""
    inner = factory.func if isinstance(factory, partial) else factory
    return str(getattr(inner, "__name__", "") or type(inner).__name__) if not inspect.ismodule(inner) else "world"


__all__ = ["Factory", "Host", "Hosting", "name_of"]
