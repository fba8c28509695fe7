"""The token ids of a conversation: what was really generated, and what the chat template writes around it.

A conversation's ids only grow. What a model has said stays as it was generated, token for token: it is never decoded
and tokenized again. What follows it is the template's difference: a short conversation is written twice, with and
without the new messages, and the text by which the two differ is tokenized, from the end of the assistant's turn on.

    without:   ... <|im_start|>assistant ANSWER<|im_end|>
    with:      ... <|im_start|>assistant ANSWER<|im_end|> <|im_start|>user higher<|im_end|> <|im_start|>assistant
    appended:                                  <|im_end|> <|im_start|>user higher<|im_end|> <|im_start|>assistant

Where the two do not begin alike (a template that writes earlier turns otherwise once there are later ones), the new
messages are written as a conversation of their own behind an end token. A template that refuses the role ``tool``, or
leaves out what such a message says, gets results as the user's messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.generation.chat import apply_template
from eggroll.llm.worlds.world import Message

ANSWER = "ANSWER-8c1f"
"""Stands for what a model has said; no template writes it by itself."""


class Chat:
    """Writes what follows a model's turns.

    Args:
        tokenizer: with a chat template.
        ends: tokens that end a completion.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "eos_token_id", None)
        ordered = [*([own] if own in ends or not ends else []), *(end for end in ends if end != own)]
        self.ends = [str(tokenizer.convert_ids_to_tokens(end)) for end in ordered if end is not None]
        self._known: dict[str, list[int]] = {}

    def after(self, messages: Sequence[Message], columns: Mapping[str, Any]) -> list[int]:
        """The ids between a model's turn and its next one, from the former's end to the latter's opening.

        Args:
            messages: what the world has said.
            columns: of the row, for the template (``tools``, ``chat_template_kwargs``).

        Raises:
            DataError: the template refuses the messages in every form.
        """
        switches = columns.get("chat_template_kwargs")
        key = json.dumps([list(messages), columns.get("tools"), switches], default=str, sort_keys=True)
        if key not in self._known:
            text = self._text(list(messages), columns)
            self._known[key] = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return self._known[key]

    def _text(self, messages: list[Message], columns: Mapping[str, Any]) -> str:
        begun = [{"role": "user", "content": "?"}, _assistant(messages)]
        try:
            return self._difference(begun, messages, columns)
        except DataError:
            if not any(message["role"] == "tool" for message in messages):
                raise
        plain = [as_user(message) if message["role"] == "tool" else message for message in messages]
        return self._difference([begun[0], _assistant(plain)], plain, columns)

    def _difference(self, begun: list[Message], messages: list[Message], columns: Mapping[str, Any]) -> str:
        before = self._written(begun, columns, opened=False)
        after = self._written([*begun, *messages], columns, opened=True)
        start = before.rfind(ANSWER)
        places = [before.find(end, start) for end in self.ends]
        end = min((place for place in places if place >= 0), default=-1)
        if end < 0:  # nothing ends a turn in this template
            end = start + len(ANSWER) if "tool_calls" not in begun[-1] else len(before)
        if start >= 0 and after.startswith(before[:end]):
            written = after[end:]
        else:
            alone = self._written(messages, columns, opened=True)
            start_token = str(getattr(self.tokenizer, "bos_token", None))
            written = "".join(self.ends[:1]) + alone.removeprefix(start_token)
        if any(str(message["content"]).strip() not in written for message in messages):
            roles = [message["role"] for message in messages]
            raise DataError(f"the chat template leaves out what messages with the roles {roles} say")
        return written

    def _written(self, messages: list[Message], columns: Mapping[str, Any], *, opened: bool) -> str:
        if opened:
            return str(apply_template(self.tokenizer, messages, columns))
        return str(apply_template(self.tokenizer, messages, columns, closed=True))


def _assistant(messages: Sequence[Message]) -> Message:
    """The turn that the messages answer: one that calls a function, if they are its results."""
    calls = [
        {"type": "function", "function": {"name": str(message.get("name", "tool")), "arguments": {"x": ANSWER}}}
        for message in messages
        if message["role"] == "tool"
    ]
    return {"role": "assistant", "content": ANSWER, **({"tool_calls": calls} if calls else {})}


def as_user(message: Message) -> Message:
    """A function's result as a user's message."""
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


__all__ = ["Chat", "as_user"]
