"""From prompts to what a model reads, and back to what a reward reads: chat templates and conversations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from eggroll.errors import DataError

Message = dict[str, Any]
Prompt = str | list[Message]


def format_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, chat: bool | None = None, system: str | None = None
) -> list[str]:
    """The text that the model continues, one string per prompt.

    A conversation goes through the tokenizer's chat template, with the opening of the assistant's turn at the end (or,
    if its last turn is the assistant's, so that the model continues that turn). The results are meant for a plain
    ``tokenizer(text)``: where that adds a start token which the template has written already, it is taken off here.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: strings or conversations.
        chat: what happens to strings. ``True`` makes each a user turn; ``False`` leaves it as it is, as TRL does;
            ``None`` makes it a user turn if the tokenizer has a chat template.
        system: a system message for conversations without one. It is put in front of strings that stay as they are,
            and into the first user turn where the template knows no system role (Gemma).

    Raises:
        DataError: a conversation (or ``chat=True``) without a chat template, or one that the template refuses.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    as_chat = has_template if chat is None else chat
    return [_format(tokenizer, prompt, as_chat, has_template, system) for prompt in prompts]


def encode_prompts(tokenizer: Any, texts: Sequence[str], max_length: int, **settings: Any) -> Any:
    """What the tokenizer makes of the texts of :func:`format_prompts`; longer ones lose their beginning.

    The side is a property of the tokenizer (an argument of the call is ignored), and is put back afterwards.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: one for each prompt.
        max_length: tokens that are kept, the last ones.
        **settings: of the tokenizer's call.
    """
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length, **settings)
    finally:
        tokenizer.truncation_side = side
    if any(one.overflowing for one in encoded.encodings or ()):
        warnings.warn(
            f"prompts of more than max_length (={max_length}) tokens lose their beginning; a larger max_length "
            "(--max-length) keeps it",
            stacklevel=2,
        )
    return encoded


def as_conversational(prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[list[Prompt], list[Any]]:
    """Prompts and completions as TRL hands them to a reward.

    For a string prompt both stay strings. For a conversation the completion becomes
    ``[{"role": "assistant", "content": ...}]``; if the prompt ends with an assistant turn that the model continued,
    that turn moves from the prompt to the front of the completion.
    """
    shown: list[Prompt] = []
    answers: list[Any] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            shown.append(prompt)
            answers.append(completion)
            continue
        begun = str(prompt[-1]["content"]) if prompt and prompt[-1]["role"] == "assistant" else None
        shown.append(prompt if begun is None else prompt[:-1])
        answers.append([{"role": "assistant", "content": (begun or "") + completion}])
    return shown, answers


def plain_text(prompt: Prompt) -> str:
    """A prompt for people: the string, or the last turn of the conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


def _format(tokenizer: Any, prompt: Prompt, as_chat: bool, has_template: bool, system: str | None) -> str:
    if isinstance(prompt, str):
        if not as_chat:
            return f"{system}\n\n{prompt}" if system else prompt
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"the prompts are conversations, but the tokenizer {name!r} has no chat template. Give the prompts as "
            "strings, or use an instruction-tuned model"
        )
    if system and not any(message["role"] == "system" for message in prompt):
        try:
            return _apply(tokenizer, [{"role": "system", "content": system}, *prompt])
        except Exception:
            # templates without a system role raise an error of their own; the first user turn takes the text instead
            prompt = _into_user_turn(prompt, system)
    try:
        return _apply(tokenizer, prompt)
    except Exception as error:
        roles = [message.get("role") for message in prompt]
        raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error


def _apply(tokenizer: Any, messages: list[Message]) -> str:
    continued = messages[-1]["role"] == "assistant"
    text = str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
    )
    start = getattr(tokenizer, "bos_token", None)
    if start and text.startswith(start) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return text[len(start) :]
    return text


def _into_user_turn(messages: list[Message], system: str) -> list[Message]:
    turns = [dict(message) for message in messages]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{system}\n\n{turn['content']}"
            break
    return turns
