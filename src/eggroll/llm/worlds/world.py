"""What a world is: it opens a conversation, answers what a model says, and scores the whole of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eggroll.llm.data.characters import check_characters

Message = dict[str, Any]
Messages = str | list[Message] | None

MAX_CHARACTERS = 20_000
"""Longest message of a world. One that says more is a mistake: no model would read it."""


@dataclass(frozen=True)
class Turn:
    """What a world says to a completion.

    Attributes:
        messages: what comes next: a string (a user's message), a list of messages with ``role`` and ``content``, or
            nothing.
        done: whether the conversation is over.
        score: of the conversation so far, higher is better; the last one that is given counts.
    """

    messages: Messages = None
    done: bool = False
    score: float | None = None


class Completion(str):
    """What a model has said in a turn, without its end token.

    ``tool_calls`` are the functions that it asks for, each ``{"name": ..., "arguments": {...}}``; see
    :mod:`eggroll.llm.worlds.calls`.
    """

    tool_calls: list[dict[str, Any]]

    def __new__(cls, text: str, tool_calls: Sequence[Mapping[str, Any]] = ()) -> Completion:
        """A text, with the functions that it asks for."""
        made = super().__new__(cls, text)
        made.tool_calls = [dict(call) for call in tool_calls]
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Completion, (str(self), self.tool_calls)


class World(ABC):
    """One conversation: of one member about one prompt. Every row of a batch has a world of its own.

    ::

        class Parrot(World):
            def reset(self, row):
                self.word = row["word"]
                return f"Say {self.word}."

            def step(self, completion):
                return Turn("Once more!", score=float(self.word in completion))

    ``reset`` and ``step`` may be ``async``. Any class with these two methods will do; it need not be derived from this
    one, which has the defaults of the others.
    """

    tools: Sequence[Any] = ()
    """Functions (or JSON schemas) that the chat template shows to the model; set by the class, or by ``reset``."""

    @abstractmethod
    def reset(self, row: dict[str, Any]) -> Any:
        """Begin a conversation.

        Args:
            row: of the data set, ``prompt`` among its columns.

        Returns:
            What the model reads first: a string, a list of messages, or ``None`` for the row's prompt.
        """

    @abstractmethod
    def step(self, completion: Completion) -> Any:
        """Answer what the model has said; returns a :class:`Turn`."""

    def score(self) -> Any:
        """The score of a conversation that has ended, where no turn had one; ``None`` if there is none."""
        return None

    def close(self) -> Any:
        """Free what the world holds; called once, when the conversation has ended."""
        return None


FailureKind = Literal["raised", "late", "score", "flood", "wrong", "lost"]


@dataclass(frozen=True)
class Failure:
    """Why a conversation could not be held or scored.

    Attributes:
        kind: it raised, was too late, scored with something that is no finite number, said too much, returned something
            of another form, or was lost with its process.
        text: in words, for a message.
    """

    kind: FailureKind
    text: str


class WorldError(ValueError):
    """A world returned what it may not; caught, and counted as a failure of its row."""

    def __init__(self, text: str, kind: FailureKind = "wrong") -> None:
        super().__init__(text)
        self.kind: FailureKind = kind


@dataclass(frozen=True)
class Opening:
    """How a conversation begins: its messages (``None``: the row's own prompt) and the tools that it shows."""

    messages: list[Message] | None
    tools: list[Any] = field(default_factory=list)


def as_messages(value: Any, what: str) -> list[Message]:
    """Messages from what a world returned.

    Raises:
        WorldError: it is neither a string nor a list of messages, or there is too much of it.
    """
    if value is None:
        return []
    found = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in found
    ):
        raise WorldError(f"{what} returned {shortened(value)}; messages are a string, or a list of "
                         '{"role": ..., "content": text}')  # fmt: skip
    said = sum(len(message["content"]) for message in found)
    if said > MAX_CHARACTERS:
        raise WorldError(f"{what} said {said:,} characters; at most {MAX_CHARACTERS:,} are allowed", "flood")
    try:
        check_characters(list(found), what)
    except ValueError as error:
        raise WorldError(str(error)) from error
    return [dict(message) for message in found]


def as_turn(value: Any, what: str) -> Turn:
    """A turn, checked: its messages as a list, its score a finite number or ``None``.

    Raises:
        WorldError: it has another form.
    """
    if isinstance(value, tuple) and 1 <= len(value) <= 3:
        value = Turn(*value)
    if not isinstance(value, Turn):
        raise WorldError(f"{what} returned {shortened(value)}; it must return Turn(messages, done=..., score=...)")
    messages = as_messages(value.messages, what)
    done = bool(value.done)
    if not done and not messages:
        raise WorldError(f"{what} returned a turn without messages that is not done; there is nothing to go on with")
    return Turn(messages, done, as_number(value.score, what))


def as_number(value: Any, what: str) -> float | None:
    """A score as a float.

    Raises:
        WorldError: it is no finite number.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except Exception as error:
        raise WorldError(f"{what} scored {shortened(value)}; a score is a number", "score") from error
    if not math.isfinite(number):
        raise WorldError(f"{what} scored {number}; a score is a finite number", "score")
    return number


def shortened(value: Any) -> str:
    """A value for a message."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


__all__ = ["MAX_CHARACTERS", "Completion", "Failure", "Message", "Opening", "Turn", "World", "WorldError"]
