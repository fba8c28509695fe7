"""Text from a run as HTML: everything that a page shows of it comes through here."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 4000


def escape(value: Any) -> str:
    """A value as text in HTML, also within the quotes of an attribute."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """The same for a text that may be long."""
    return escape(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …")


def conversation(prompt: Any) -> str:
    """A prompt as text; of a conversation, each message with its role."""
    if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def in_script(values: Any) -> str:
    """JSON that can stand in a ``<script>`` element: nothing in it ends the element or opens a comment."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
