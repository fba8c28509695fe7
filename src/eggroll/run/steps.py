"""What is being done before the first generation, step by step: a line that moves, and one for what each step found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from eggroll.run.console import duration
from eggroll.run.terminal import without_echo_of_keys

LINE_S = 10.0
"""Seconds between lines where there is no terminal, at least."""


class Steps:
    """A spinner with the step and the time on a terminal, under lines of what was found; elsewhere a few plain lines.

    Args:
        console: where to write.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._doing = ""
        self._began = 0.0
        self._said = -math.inf
        self._live: Live | None = None
        self._quiet = ExitStack()
        unicode = console.encoding.lower().startswith("utf")
        self._spinner = Spinner("dots" if unicode else "line")

    def __call__(self, doing: str, found: str = "") -> None:
        """Show a step.

        Args:
            doing: what is done now; empty at the end.
            found: what the step before it found.
        """
        if not doing:
            self.close()
        if not self._doing:
            self._began = self._clock()
        self._doing = doing
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            if found:
                self.console.print(Text(f"  {found}", style="dim"))
            if doing and self._live is None:
                self._quiet.enter_context(without_echo_of_keys())
                self._live = Live(
                    get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True
                )
                self._live.start(refresh=True)
            elif self._live is not None:
                self._live.refresh()
        elif found and self._clock() - self._said >= LINE_S:
            self._said = self._clock()
            time_spent = duration(self._said - self._began)
            self.console.print(f"  {found} ({time_spent})", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the moving line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._quiet.close()

    def _render(self) -> RenderableType:
        self._spinner.text = Text(f"{self._doing}  {duration(self._clock() - self._began)}", overflow="ellipsis")
        return self._spinner
