"""From prompts to token ids: what a model reads, with the special tokens that belong there and no others.

The ids of a conversation are those of the tokenizer's ``apply_chat_template``: the template writes its special tokens
itself, and nothing is added. A text gets the special tokens that the tokenizer puts around texts, except that a prompt
which is continued never ends in an end token that the tokenizer has added: a decoder that has read one has finished.
An encoder reads a whole text, end token included.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eggroll.llm.generation.chat import Prompt, apply_template, as_read, check_system, templates_in_time

__all__ = ["Encoded", "encode_prompts"]


@dataclass(frozen=True)
class Encoded:
    """Prompts as token ids, one list each."""

    input_ids: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.input_ids), default=0)

    def padded(self, pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both ``(prompts, longest)`` int64; the mask is 0 for padding.

        Args:
            pad_id: fills up short rows.
            left: on which side. A decoder continues at the right end; an encoder counts positions from the left one.
        """
        ids = torch.full((len(self.input_ids), self.longest), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(self.input_ids):
            place = slice(self.longest - len(tokens), None) if left else slice(0, len(tokens))
            ids[row, place] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, place] = 1
        return ids, mask


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_length: int,
    *,
    chat: bool | None = None,
    system: str | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    ends: Collection[int] = (),
    encoder: bool = False,
) -> Encoded:
    """What a model reads of prompts; longer ones lose their beginning (behind a start token), and a warning says so.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: strings or conversations.
        max_length: tokens that are kept, the last ones.
        chat, system, columns: see :func:`eggroll.llm.generation.chat.format_prompts`.
        ends: tokens that end a completion, besides the tokenizer's own.
        encoder: whether an encoder reads the prompts, in the place of a decoder that continues them.

    Raises:
        DataError: see :func:`eggroll.llm.generation.chat.format_prompts`.
    """
    check_system(system)
    rows = columns if columns is not None else [{}] * len(prompts)
    read = [as_read(tokenizer, one, row, chat=chat, system=system) for one, row in zip(prompts, rows, strict=True)]
    texts = iter(_texts(tokenizer, [one for one in read if isinstance(one, str)], ends, encoder))
    start = getattr(tokenizer, "bos_token_id", None)
    with templates_in_time(len(prompts)):
        chats = [
            None if isinstance(one, str) else list(apply_template(tokenizer, one, row, system=system, tokenize=True))
            for one, row in zip(read, rows, strict=True)
        ]
    ids, cut = [], False
    for body in chats:
        if body is None:
            before, body, after = next(texts)
        else:
            before, body = (body[:1], body[1:]) if body[:1] == [start] else ([], body)
            after = []
        room = max_length - len(before) - len(after)
        if len(body) > room:
            cut, body = True, body[len(body) - max(room, 0) :]
        ids.append([*before, *body, *after][-max_length:])
    if cut:
        warnings.warn(
            f"prompts of more than max_length (={max_length}) tokens lose their beginning; a larger max_length "
            "(--max-length) keeps it",
            stacklevel=2,
        )
    return Encoded(ids)


def _texts(
    tokenizer: Any, texts: Sequence[str], ends: Collection[int], encoder: bool
) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each text the special tokens before it, its own tokens, and the special tokens behind it that stay."""
    if not texts:
        return []
    whole = tokenizer(list(texts), verbose=False).input_ids
    bare = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    final = {*ends, getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "sep_token_id", None)}
    found = []
    for full, body in zip(whole, bare, strict=True):
        added = len(full) - len(body)
        at = next((index for index in range(added + 1) if full[index : index + len(body)] == body), None)
        if at is None:  # a tokenizer that writes a text otherwise where special tokens stand around it
            end = len(full) - (full[-1:] != body[-1:])
            before, body, after = [], list(full[:end]), list(full[end:])
        else:  # around an empty text all of them count as what stands behind it
            at = at if body else 0
            before, body, after = list(full[:at]), list(body), list(full[at + len(body) :])
        while after and not encoder and after[-1] in final and (before or body or len(after) > 1):
            after.pop()
        found.append((before, body, after))
    return found
