"""The one way to a terminal: text from elsewhere is shown, and never steers it.

A reward's exception may quote what a model wrote, a run's directory may come from anyone, and a terminal obeys escape
sequences in whatever is printed. Commands print to a :class:`Terminal`.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

SHOWN_INSTEAD = "\N{REPLACEMENT CHARACTER}"
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
"""Characters that show a text in another order than it is written, or break its line."""


def printable(text: str) -> str:
    """``text`` with a replacement character for each one that a terminal would obey: all but line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(SHOWN_INSTEAD if _steers(char) else char for char in text.replace("\r\n", "\n"))


def _steers(char: str) -> bool:
    return (unicodedata.category(char) == "Cc" and char not in "\n\t") or char in _REORDERING


class Terminal(Console):
    """A console that prints text :func:`printable`, in markup, tables and the live display; ``:name:`` is text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"emoji": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text in markup: replaced before its width is measured."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever else is printed; the console's own control sequences pass."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


@contextmanager
def without_echo_of_keys() -> Iterator[None]:
    """Let the terminal not write ``^C`` for Ctrl-C: in the middle of a live display it moves everything by a line."""
    before: Any = None
    with suppress(ImportError, OSError, ValueError, AttributeError):  # another system, or no terminal
        import termios

        descriptor = sys.stdin.fileno()
        if os.tcgetpgrp(descriptor) == os.getpgrp():  # a process in the background would be stopped
            before = termios.tcgetattr(descriptor)
            changed = [*before]
            changed[3] &= ~termios.ECHOCTL
            termios.tcsetattr(descriptor, termios.TCSANOW, changed)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                if os.tcgetpgrp(descriptor) == os.getpgrp():
                    termios.tcsetattr(descriptor, termios.TCSANOW, before)
