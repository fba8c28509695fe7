"""The token ids of a conversation: what was really generated, and what the chat template writes around it.

A conversation's ids only grow. What a model has said stays as it was generated, token for token: it is never decoded
and tokenized again. What follows it is what the template writes behind an answer: a short conversation is written with
a stand-in for the answer, and the text from the end of the stand-in's turn on is tokenized.

    written:   ... <|im_start|>assistant ANSWER<|im_end|> <|im_start|>user higher<|im_end|> <|im_start|>assistant
    appended:                                  <|im_end|> <|im_start|>user higher<|im_end|> <|im_start|>assistant

So it does not matter whether the template writes earlier turns otherwise once there are later ones (without their
thoughts, say). A template that leaves out the answer gets the new messages as a conversation of their own behind an end
token; one that refuses the role ``tool``, or leaves out what such a message says, gets results as the user's messages.
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
        try:
            return self._behind_answer(messages, columns)
        except DataError:
            if not any(message["role"] == "tool" for message in messages):
                raise
        plain = [as_user(message) if message["role"] == "tool" else message for message in messages]
        return self._behind_answer(plain, columns)

    def _behind_answer(self, messages: list[Message], columns: Mapping[str, Any]) -> str:
        answer = _assistant(messages)
        text = str(apply_template(self.tokenizer, [{"role": "user", "content": "?"}, answer, *messages], columns))
        start = text.rfind(ANSWER)
        if start >= 0:
            begin = start + len(ANSWER)
            ends = [place for place in (text.find(end, begin) for end in self.ends) if place >= 0]
            # A template whose turns have no end token: behind the answer itself, unless that stands within a call.
            places = [*([min(ends)] if ends else []), *([] if "tool_calls" in answer else [begin])]
            written = [text[place:] for place in places]
        else:
            start_token = str(getattr(self.tokenizer, "bos_token", None))
            alone = str(apply_template(self.tokenizer, messages, columns))
            written = ["".join(self.ends[:1]) + alone.removeprefix(start_token)]
        contents = [str(message["content"]).strip() for message in messages]
        for one in written:
            if all(content in one for content in contents):
                return one
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template leaves out what messages with the roles {roles} say")


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
