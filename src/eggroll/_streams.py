"""Standard output and error as a program finds them, in whatever encoding."""

from __future__ import annotations

import io
from typing import Any


def forgive(*streams: Any) -> None:
    """Let text streams write a question mark for what their encoding lacks, where they would raise.

    A terminal in an old code page, or ``LANG=C``, must not end a run because of an umlaut in a path, an arrow in a
    prompt or half an emoji in an answer.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
