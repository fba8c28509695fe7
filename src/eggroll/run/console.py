"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eggroll._streams import forgive
from eggroll.run.metrics import series
from eggroll.run.terminal import Terminal, printable, without_echo_of_keys

WINDOW = 20
"""Generations that the estimate of the time left is averaged over."""
LINE_S = 5.0
"""Seconds between plain lines, at least: a log should not have thousands of them."""
ANSWER = 400
"""Characters of an answer that are looked at: more than any terminal is wide."""
SPARK = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
SPARK_MIN_COLUMNS = 76
"""Narrower terminals show the numbers without the curves."""


class Display:
    """The progress of a run, as a context manager around its generation loop.

    Args:
        total: the generation at which the run ends.
        start: finished generations when the display opens (above 0 when a run is resumed).
        title: what is being done, for example the model's name.
        history: lines of ``metrics.jsonl`` from before a resume, so that start and best are those of the whole run.
        console: where to write; ``None`` is a :class:`~eggroll.run.terminal.Terminal` on standard output.
        clock: seconds, for the elapsed time and the time left.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        title: str,
        history: Iterable[Mapping[str, Any]] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.title = title
        self.console = console or Terminal()
        forgive(self.console.file)
        self._clock = clock
        self._done = start
        self._latest: dict[str, Any] = {}
        past = list(history)
        self._fitness = series(past, "fitness_mean")[1]
        self._heldout = series(past, "heldout_reward")[1]
        self._opened = clock()
        self._times: deque[float] = deque([self._opened], maxlen=WINDOW + 1)
        self._live: Live | None = None
        self._quiet = ExitStack()
        self._said = -math.inf  # when the last plain line was written
        self._unsaid: dict[str, Any] = {}  # what has been measured since then
        self._answer: Mapping[str, Any] | None = None
        self._spinner = Spinner("dots" if self._unicode else "line")

    def __enter__(self) -> Self:
        self._opened = self._clock()
        self._times.clear()
        self._times.append(self._opened)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._quiet.enter_context(without_echo_of_keys())
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._live.start(refresh=True)
        else:
            self._line(f"{self.title}: generation {self._done} of {self.total}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._quiet.close()
        elif self._unsaid:
            self._say()

    def generation(self, metrics: Mapping[str, Any]) -> None:
        """Show one line of ``metrics.jsonl``; keys that are missing or ``None`` are left out of the display.

        A line with ``event="start"`` holds the held-out reward before training and counts no generation.
        """
        values = {key: value for key, value in metrics.items() if value is not None}
        self._done = values.get("generation", self._done)
        if values.get("event") != "start":
            self._times.append(self._clock())
        self._latest.update(values)
        if "fitness_mean" in values:
            self._fitness.append(values["fitness_mean"])
        if "heldout_reward" in values:
            self._heldout.append(values["heldout_reward"])
        if self._live is not None:
            self._live.refresh()
            return
        self._unsaid.update(values)
        if self._done >= self.total or self._clock() - self._said >= LINE_S:
            self._say()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show one answer of the newest rows of ``samples.jsonl``: the center's on held-out data, else the best one.

        The same held-out prompt each time, so that it can be seen to change; members' answers take its place only as
        long as there is none.
        """
        answers = [row for row in rows if row.get("completion") is not None]
        heldout = [row for row in answers if row.get("split") == "heldout"]
        if heldout:
            self._answer = heldout[0]
        elif answers and (self._answer is None or self._answer.get("split") != "heldout"):
            self._answer = max(answers, key=_reward)

    def message(self, text: str) -> None:
        """Print ``text`` above the live display, or as a line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """An estimate from the last generations; ``None`` before the first one has finished."""
        steps = len(self._times) - 1
        if steps < 1:
            return None
        return (self._times[-1] - self._times[0]) / steps * max(0, self.total - self._done)

    def _say(self) -> None:
        """One plain line with everything that has been measured since the last one."""
        self._line(self._plain(self._unsaid))
        self._unsaid, self._said = {}, self._clock()

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, values: dict[str, Any]) -> str:
        """One line in ASCII, readable in a log file and by ``grep``."""
        width = len(str(self.total))
        parts = [f"generation {self._done:>{width}}/{self.total}"]
        fitness = [
            f"{word} {number(values[key])}"
            for key, word in (("fitness_mean", "mean"), ("fitness_max", "max"), ("fitness_std", "std"))
            if key in values
        ]
        if fitness:
            parts.append("fitness " + " ".join(fitness))
        if "heldout_reward" in values:
            start, best = number(self._heldout[0]), number(max(self._heldout))
            parts.append(f"held-out {number(values['heldout_reward'])} (best {best}, start {start})")
        parts += [f"{rate(values[f'{what}_per_s'])} {what}/s" for what in ("members", "tokens") if _has(values, what)]
        if values.get("invalid_scores"):
            parts.append(f"{values['invalid_scores']} invalid scores")
        left = self.seconds_left()
        if left is not None and self._done < self.total:
            parts.append(f"{duration(left)} left")
        return " | ".join(parts)

    def _render(self) -> RenderableType:
        """The live display."""
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        left = self.seconds_left()
        done = self._done >= self.total
        left_text = "done" if done else f"{duration(left)} left" if left is not None else "first generation"
        status: RenderableType = Text("✓" if self._unicode else "*", style="green") if done else self._spinner
        head = Table.grid(padding=(0, 1))
        head.add_row(status, Text(f"generation {self._done}/{self.total}", style="bold"))
        progress = ProgressBar(total=max(1, self.total), completed=self._done if self.total else 1)
        bar.add_row(head, progress, Text(f"{duration(self._clock() - self._opened)}, {left_text}", style="dim"))

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="cyan")
        for row in (self._fitness_row(), self._heldout_row(), self._speed_row()):
            if row is not None:
                table.add_row(*row)
        title = Text(self.title, style="bold")
        parts = [bar, table, *([] if self._answer is None else [self._answer_line(self._answer)])]
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim", padding=(0, 1))

    def _fitness_row(self) -> tuple[RenderableType, ...] | None:
        latest = self._latest
        if "fitness_mean" not in latest:
            return None
        text = Text(f"mean {number(latest['fitness_mean'])}", style="bold")
        spread = {"max": "fitness_max", "spread": "fitness_std"}
        extra = "  ".join(f"{word} {number(latest[key])}" for word, key in spread.items() if key in latest)
        text.append(f"  {extra}", style="not bold")
        if latest.get("invalid_scores"):
            text.append(f"  {latest['invalid_scores']} invalid", style="red")
        return "fitness", text, self._spark(self._fitness)

    def _heldout_row(self) -> tuple[RenderableType, ...] | None:
        if not self._heldout:
            return None
        now, best, start = self._heldout[-1], max(self._heldout), self._heldout[0]
        style = "bold green" if now > start else "bold red" if now < start else "bold"
        text = Text(f"now  {number(now)}", style=style)
        text.append(f"  best {number(best)}  start {number(start)}", style="not bold default")
        return "held-out", text, self._spark(self._heldout)

    def _speed_row(self) -> tuple[RenderableType, ...] | None:
        rates = [
            f"{rate(self._latest[f'{what}_per_s'])} {what}/s"
            for what in ("members", "tokens")
            if _has(self._latest, what)
        ]
        return ("speed", Text("  ".join(rates)), "") if rates else None

    def _answer_line(self, row: Mapping[str, Any]) -> RenderableType:
        """An answer and its score in one line, cut off where the terminal ends; nothing in it steers the terminal."""
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(style="dim", no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis" if self._unicode else "crop", ratio=1)
        line.add_column(no_wrap=True, justify="right")
        score = _reward(row)
        text = Text(" ".join(printable(str(row["completion"])[:ANSWER]).split()) or "(empty)", style="italic")
        line.add_row("answer", text, number(score) if math.isfinite(score) else "")
        return line

    def _spark(self, values: list[float]) -> str:
        return sparkline(values) if self._unicode and self.console.width >= SPARK_MIN_COLUMNS else ""

    @property
    def _unicode(self) -> bool:
        return self.console.encoding.lower().startswith("utf")


def _reward(row: Mapping[str, Any]) -> float:
    found = row.get("reward")
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else -math.inf


def _has(values: Mapping[str, Any], what: str) -> bool:
    return f"{what}_per_s" in values


def sparkline(values: list[float], width: int = SPARK_WIDTH) -> str:
    """``values`` as a curve of at most ``width`` characters, averaged where there are more values."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    cells = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(cell) / len(cell) for cell in cells]
    low, high = min(means), max(means)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((mean - low) * scale)] for mean in means)


def number(value: float) -> str:
    """Four significant digits, zeros kept so that columns stand still: -2.500, 0.01234, 12345."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:#.4g}".removesuffix(".") if abs(value) < 9999.5 else f"{value:.0f}"


def rate(value: float) -> str:
    """A rate in three digits: 0.42, 7.3, 128, 1.2k, 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m 05s, 2h 14m, 3d 04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h"
