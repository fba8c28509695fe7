"""``eggroll runs``: a table of the runs in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eggroll.core.settings import setting
from eggroll.errors import RunError
from eggroll.run.terminal import Terminal, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from eggroll.run.listing import Folder, Row

EVERY_S = 2.0
"""Seconds between two looks of --watch."""
NUMERIC = ("generations", "best", "last", "age")
LEFT_OUT = ("kind", "age", "last", "task")
"""Columns that a narrow terminal does without, the first one first."""
STYLES = {"running": "bold cyan", "finished": "green", "ended": "green", "stopped": "yellow", "broken": "bold red"}


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """What ``eggroll runs`` can be told."""

    folder: str = setting("runs", positional="FOLDER")
    """The folder that the runs are in."""
    sort: str = setting("age", flags=("-s",))
    """name, kind, model, task, generations, best, last, state or age: newest, longest and best first."""
    reverse: bool = False
    """The other way round."""
    filter: tuple[str, ...] = setting((), flags=("-f",))
    """Only these: a word, or conditions such as kind=tune, state=running, "best>0.5", "age<2h"; all must hold."""
    watch: bool = setting(False, flags=("-w",))
    """Look again every two seconds, until Ctrl-C."""


OPTIONS = RunsOptions


def run(options: RunsOptions) -> int:
    """Show the runs in a folder: what each is, how far it has come, and how well it does."""
    from eggroll.run.listing import Folder

    console, folder = Terminal(highlight=False), Folder(Path(options.folder))
    shown = lambda: table(console, rows(folder, options))  # noqa: E731
    first = shown()
    if not options.watch:
        _print(console, first)
    elif console.is_terminal and not console.is_dumb_terminal:
        _live(console, first, shown)
    else:
        _follow(console, first, shown)
    return 0


def rows(folder: Folder, options: RunsOptions) -> list[Row]:
    """The rows that were asked for."""
    from eggroll.run.listing import chosen

    return chosen(folder.rows(), sort=options.sort, conditions=options.filter, reverse=options.reverse)


def table(console: Terminal, found: Sequence[Row]) -> RenderableType:
    """The rows as a table on a terminal, as plain columns elsewhere: complete, however long the lines are."""
    from eggroll.run.listing import COLUMNS

    now = time.time()
    if not found:
        return Text("no run fulfils the conditions")
    cells = [[printable(cell).replace("\n", " ") for cell in row.cells(now)] for row in found]
    troubles = [f"{row.name}: {row.trouble}" for row in found if row.trouble]
    if not console.is_terminal:
        lines = _columns([list(COLUMNS), *cells])
        return Text("\n".join([*lines, *(f"broken: {printable(trouble)}" for trouble in troubles)]))
    shown = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    kept = _kept([list(COLUMNS), *cells], console.width)
    for name in kept:
        shown.add_column(name, justify="right" if name in NUMERIC else "left", overflow="ellipsis", no_wrap=True)
    for row, line in zip(found, cells, strict=True):
        by_name = dict(zip(COLUMNS, line, strict=True))
        style = {"state": STYLES.get(row.state, "")}
        shown.add_row(*(Text(by_name[name], style=style.get(name, "")) for name in kept))
    if troubles:
        shown.caption = escape(printable("\n".join(troubles)))
        shown.caption_justify, shown.caption_style = "left", "red"
    return shown


def _kept(lines: Sequence[Sequence[str]], width: int) -> list[str]:
    """The columns that a terminal has room for."""
    widths = dict(zip(lines[0], (max(map(len, column)) for column in zip(*lines, strict=True)), strict=True))
    for name in LEFT_OUT:
        if sum(widths.values()) + 2 * (len(widths) - 1) > width:
            del widths[name]
    return list(widths)


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _print(console: Terminal, shown: RenderableType) -> None:
    console.print(shown, soft_wrap=not console.is_terminal)


def _live(console: Terminal, first: RenderableType, shown: Callable[[], RenderableType]) -> None:
    from rich.live import Live

    with Live(first, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        live.refresh()
        _again(lambda now: live.update(now, refresh=True), shown)


def _follow(console: Terminal, first: RenderableType, shown: Callable[[], RenderableType]) -> None:
    """Without a terminal: the table once more whenever it has changed."""
    last = str(first)
    _print(console, first)

    def show(now: RenderableType) -> None:
        nonlocal last
        if _without_age(str(now)) != _without_age(last):
            console.print()
            _print(console, now)
            last = str(now)

    _again(show, shown)


def _without_age(text: str) -> list[str]:
    return [line.rpartition("  ")[0] for line in text.splitlines()]


def _again(show: Callable[[RenderableType], None], shown: Callable[[], RenderableType]) -> None:
    try:
        while True:
            time.sleep(EVERY_S)
            try:
                show(shown())
            except RunError as error:  # the folder was emptied; it may fill again
                show(Text(str(error)))
    except KeyboardInterrupt:
        return
