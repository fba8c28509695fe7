"""From prompts to what a model reads, and back to what a reward reads: chat templates and conversations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.data.characters import check_characters
from eggroll.llm.generation.limits import time_limit

Message = dict[str, Any]
Prompt = str | list[Message]

OWN_ARGUMENTS = frozenset(
    {"conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
)
"""Arguments of ``apply_chat_template`` that a row cannot set."""

TEMPLATE_S, TEMPLATE_S_EACH = 30.0, 0.1
"""Seconds that a chat template may take, and those for each prompt on top. It is code that comes with a model."""
TOO_LONG = "the chat template does not come to an end: it has loops within loops, so correct it or use another model"

UNREAD_TOOLS = "the model does not see the column 'tools' (rewards do)"


def format_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    system: str | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
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
        columns: the further columns of each prompt, for those that the template reads, see :func:`template_arguments`.

    Raises:
        DataError: a conversation (or ``chat=True``) without a chat template, or one that the template refuses or takes
            too long for.
    """
    check_system(system)
    rows = columns if columns is not None else [{}] * len(prompts)
    texts = []
    with templates_in_time(len(prompts)):
        for prompt, row in zip(prompts, rows, strict=True):
            shown = as_read(tokenizer, prompt, row, chat=chat, system=system)
            if not isinstance(shown, str):
                shown = _without_start(tokenizer, apply_template(tokenizer, shown, row, system=system))
            texts.append(shown)
    return texts


def templates_in_time(count: int) -> AbstractContextManager[None]:
    """Ends the block if the chat templates of ``count`` prompts take longer than any that comes to an end."""
    return time_limit(TEMPLATE_S + TEMPLATE_S_EACH * count, TOO_LONG)


def as_read(
    tokenizer: Any, prompt: Prompt, columns: Mapping[str, Any], *, chat: bool | None, system: str | None
) -> Prompt:
    """A prompt as the model reads it: a text as it is (with the system message), or a conversation for the template.

    Raises:
        DataError: it is a conversation, and there is no chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str):
        if not (has_template if chat is None else chat):
            if columns.get("tools"):
                warnings.warn(f"plain prompts go through no chat template: {UNREAD_TOOLS}", stacklevel=3)
            return f"{system}\n\n{prompt}" if system else prompt
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"the prompts are conversations, but the tokenizer {name!r} has no chat template. Give the prompts as "
            "strings, or use an instruction-tuned model"
        )
    return prompt


def apply_template(
    tokenizer: Any,
    messages: list[Message],
    columns: Mapping[str, Any],
    *,
    system: str | None = None,
    tokenize: bool = False,
) -> Any:
    """What a tokenizer's ``apply_chat_template`` makes of a conversation: text, or token ids.

    The assistant's turn is opened at the end; a last turn of the assistant's is left open instead.

    Raises:
        DataError: the template refuses the conversation.
    """
    arguments = {**template_arguments(tokenizer, columns), "tokenize": tokenize}
    if tokenize:
        arguments["return_dict"] = False
    if system and not any(message["role"] == "system" for message in messages):
        try:
            return _apply(tokenizer, [{"role": "system", "content": system}, *messages], arguments)
        except Exception:
            # templates without a system role raise an error of their own; the first user turn takes the text instead
            messages = _into_user_turn(messages, system)
    try:
        return _apply(tokenizer, messages, arguments)
    except Exception as error:
        roles = [message.get("role") for message in messages]
        raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error


def check_system(system: str | None) -> None:
    """Refuse a system message that cannot be encoded; prompts have been looked at when they were read.

    Raises:
        DataError: it holds half of a character.
    """
    check_characters(system, "a prompt with its system message")


def template_arguments(tokenizer: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a row hands to its chat template, by TRL's names of columns.

    ``tools`` are the functions that the model may call: a list of JSON schemas (or the list as JSON text).
    ``chat_template_kwargs`` is a dict of the template's own switches, such as ``{"enable_thinking": False}``.

    Raises:
        DataError: they have another form.
    """
    found: dict[str, Any] = {}
    switches = columns.get("chat_template_kwargs")
    if switches:
        if not isinstance(switches, Mapping) or not OWN_ARGUMENTS.isdisjoint(switches):
            raise DataError(
                "the column 'chat_template_kwargs' must be an object with switches of the chat template, none of "
                f"{', '.join(sorted(OWN_ARGUMENTS))}; got {_shown(switches)}"
            )
        found.update(switches)
    tools = columns.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(_not_tools(tools)) from None
    if not tools:
        return found
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise DataError(_not_tools(tools))
    template = tokenizer.get_chat_template(tools=list(tools)) if hasattr(tokenizer, "get_chat_template") else None
    if isinstance(template, str) and "tools" not in template:
        warnings.warn(f"the chat template of this model knows no tools: {UNREAD_TOOLS}", stacklevel=2)
    return {**found, "tools": list(tools)}


def as_conversational(
    prompts: Sequence[Prompt], completions: Sequence[str | list[Message]]
) -> tuple[list[Prompt], list[Any]]:
    """Prompts and completions as TRL hands them to a reward.

    For a string prompt both stay strings. For a conversation the completion becomes
    ``[{"role": "assistant", "content": ...}]``; if the prompt ends with an assistant turn that the model continued,
    that turn moves from the prompt to the front of the completion. A completion that is a list of messages already
    stays as it is.
    """
    shown: list[Prompt] = []
    answers: list[Any] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str) or not isinstance(completion, str):
            shown.append(prompt)
            answers.append(completion)
            continue
        begun = str(prompt[-1]["content"]) if prompt and prompt[-1]["role"] == "assistant" else None
        shown.append(prompt if begun is None else prompt[:-1])
        answers.append([{"role": "assistant", "content": (begun or "") + completion}])
    return shown, answers


def last_answer(completion: str | Sequence[Message]) -> str:
    """What a model said last: a completion of text as it is, of messages the last one of the assistant's."""
    if isinstance(completion, str):
        return completion
    return next((str(m["content"]) for m in reversed(completion) if m["role"] == "assistant"), "")


def plain_text(prompt: Prompt) -> str:
    """A prompt for people: the string, or the last turn of the conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


def _not_tools(tools: Any) -> str:
    return (
        "the column 'tools' goes to the chat template and must be a list of functions as JSON schemas, such as "
        f'[{{"type": "function", "function": {{"name": ...}}}}]; got {_shown(tools)}. Name the column otherwise if it '
        "is something else"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _apply(tokenizer: Any, messages: list[Message], arguments: Mapping[str, Any]) -> Any:
    continued = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=not continued, continue_final_message=continued, **arguments
    )


def _without_start(tokenizer: Any, text: str) -> str:
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
