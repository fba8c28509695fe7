"""What commands that train share: the run that ``--resume`` names, a live display with trackers, the result's lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

if TYPE_CHECKING:
    from eggroll.loop import Listener
    from eggroll.run.console import Display
    from eggroll.run.run_dir import RunDir
    from eggroll.run.trackers import Tracker


def option_given(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, before the command line is read; ``None`` without it."""
    for index, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == name:
            return value or (arguments[index + 1] if index + 1 < len(arguments) else "")
    return None


def resumed_run(arguments: Sequence[str]) -> str | None:
    """The directory that ``--resume`` names; ``None`` without it."""
    return option_given(arguments, "--resume")


class Watch:
    """The live display and the trackers of a run, from its first generation to the end of the ``with`` block.

    Args:
        console: where to show.
        report_to: which trackers.
        title: of the display, from the run.

    Raises:
        ConfigError: a tracker is not known; nothing has been written then.
    """

    def __init__(self, console: Console, report_to: str, title: Callable[[RunDir], str]) -> None:
        from eggroll.run.trackers import tracker_names

        tracker_names(report_to)
        self.console, self.report_to, self.title = console, report_to, title
        self._display: Display | None = None
        self._tracker: Tracker | None = None

    def listeners(self, run: RunDir, start: int) -> Sequence[Listener]:
        """Open both, for a run of which ``start`` generations are done."""
        from eggroll.run.console import Display
        from eggroll.run.trackers import TrackerListener, make_trackers

        total = int(run.config["generations"])
        self._tracker = make_trackers(self.report_to, run)
        display = Display(total, start=start, title=self.title(run), history=run.metrics(), console=self.console)
        self._display = display.__enter__()
        return [display, TrackerListener(self._tracker)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, trace)
        if self._tracker is not None:
            self._tracker.close()


def show_result(console: Console, result: Mapping[str, Any]) -> None:
    """One line for each entry of ``result.json``."""
    console.print()
    for key, value in result.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        console.print(f"  {key.replace('_', ' '):28} [bold]{shown}[/]")
