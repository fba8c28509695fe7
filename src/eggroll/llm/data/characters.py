"""Text that no tokenizer can read: halves of characters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from eggroll.errors import DataError

_HALF = re.compile("[\ud800-\udfff]")


def check_characters(value: Any, what: str) -> None:
    """Look for halves of characters in a text, also in the texts of lists and dicts.

    JSON writes an emoji as two halves (``\\ud83d\\ude00``). Text that was cut between them cannot be encoded.

    Raises:
        DataError: there is one. ``what`` opens the message.
    """
    open_values = [value]
    while open_values:
        found = open_values.pop()
        if isinstance(found, str):
            # most text is ASCII or can be encoded, and this is far faster than a search
            half = None if found.isascii() else _HALF.search(found)
            if half is not None:
                raise DataError(
                    f"{what} has half of a character, {ascii(half.group())[1:-1]}, at position {half.start() + 1}: "
                    "an emoji that was cut in two. Write the whole character, or leave it out"
                )
        elif isinstance(found, Mapping):
            open_values += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple):
            open_values += found
