"""Functions that a model calls: their schemas, and the calls in what it has said.

Where the tokenizer says how its model's answers are written (transformers' ``response_template``, or the older
``response_schema``), ``tokenizer.parse_response`` reads them. Elsewhere the common form is looked for, that of Hermes,
Qwen and many others::

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.rewards.base import function_name

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16
"""Calls of one turn that are read; a model that repeats itself makes more."""

INSTRUCTION = (
    "You may call functions. These are their signatures:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write a JSON object with its name and arguments:\n"
    '<tool_call>\n{{"name": "function", "arguments": {{"argument": "value"}}}}\n</tool_call>'
)
"""What the system message says of functions where the chat template knows none."""


def schema_of(tool: Any) -> dict[str, Any]:
    """The JSON schema of a function, as chat templates take it; a schema is returned as it is.

    Raises:
        DataError: the function has no docstring or type hints that say what it takes.
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:
        raise DataError(
            f"the tool {function_name(tool)!r} cannot be described to a model: {error}. A tool needs a docstring that "
            'says what it does, with a line for each argument under "Args:", and type hints'
        ) from error


def knows_tools(tokenizer: Any, tools: Sequence[Any]) -> bool:
    """Whether the tokenizer's chat template writes functions."""
    template = tokenizer.get_chat_template(tools=list(tools)) if hasattr(tokenizer, "get_chat_template") else None
    return isinstance(template, str) and "tools" in template


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """The functions for a system message."""
    return INSTRUCTION.format(tools="\n".join(json.dumps(tool) for tool in tools))


def calls_in(
    tokenizer: Any, text: str, ids: Sequence[int], prefix: Sequence[int], tools: Sequence[Any]
) -> list[dict[str, Any]]:
    """The functions that a model asks for: ``{"name": ..., "arguments": {...}}`` each; none that cannot be read.

    Args:
        tokenizer: the model's.
        text: what it has said.
        ids: the same as tokens.
        prefix: tokens before that.
        tools: the schemas of the functions that it was shown.
    """
    parsed = _parsed(tokenizer, list(ids), list(prefix), tools)
    found = _in_tags(text) if parsed is None else parsed
    return [call for call in map(_checked, found[:MAX_CALLS]) if call is not None]


def _parsed(tokenizer: Any, ids: list[int], prefix: list[int], tools: Sequence[Any]) -> list[Any] | None:
    ways: list[Callable[[], Any]] = []
    if getattr(tokenizer, "response_template", None) is not None:
        ways = [
            lambda: tokenizer.parse_response(ids, prefix=prefix, tools=list(tools)),
            lambda: tokenizer.parse_response(ids, prefix=prefix),
        ]
    elif getattr(tokenizer, "response_schema", None) is not None:
        ways = [lambda: tokenizer.parse_response(ids)]
    for way in ways:
        try:
            found = way()
        except TypeError:  # an older transformers, without this argument
            continue
        except Exception:  # what a model writes may be anything
            return []
        calls = found.get("tool_calls") if isinstance(found, Mapping) else None
        return list(calls) if isinstance(calls, list) else []
    return None if not ways else []


def _in_tags(text: str) -> list[Any]:
    found: list[Any] = []
    for part in text.split(OPEN)[1 : MAX_CALLS + 1]:
        try:
            found.append(json.loads(part.split(CLOSE)[0]))
        except (ValueError, RecursionError):
            continue
    return found


def _checked(call: Any) -> dict[str, Any] | None:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters")) or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        return None
    return {"name": call["name"], "arguments": dict(arguments)}


__all__ = ["calls_in", "described", "knows_tools", "schema_of"]
