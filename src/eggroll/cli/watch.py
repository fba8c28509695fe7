"""What commands that train share: a live display while it goes on, warnings as lines, and the lines at the end."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape

from eggroll._command import typed
from eggroll.cli.cores import choose_threads
from eggroll.run.terminal import Terminal

if TYPE_CHECKING:
    from eggroll.lifecycle import Opened, RunKind, Trained
    from eggroll.loop import Listener
    from eggroll.run.console import Display
    from eggroll.run.keeping import Kept
    from eggroll.run.run_dir import RunDir

SAID_FROM = 100e6
"""Bytes of a run that are worth a line."""
Show = Callable[[Console, "Trained"], None]


def option_given(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, before the command line is read; ``None`` without it."""
    for index, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == name:
            return value or (arguments[index + 1] if index + 1 < len(arguments) else "")
    return None


def resumed_options(kind: RunKind, arguments: Sequence[str]) -> Any | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    from eggroll.lifecycle import resumed_options as options

    path = option_given(arguments, "--resume")
    return None if path is None else options(kind, path)


def run_command(kind: RunKind, options: Any, show: Show | None = None) -> int:
    """Train on a terminal. Returns the exit status: 0, or 130 if it was interrupted.

    Args:
        kind: what is trained.
        options: of the command line.
        show: prints what came of it, below the figures of ``result.json``.
    """
    from eggroll.lifecycle import train
    from eggroll.lifecycle.training import resume_command
    from eggroll.run.keeping import RESULT_KEYS

    console = Terminal(soft_wrap=True, highlight=False)
    with Watch(console) as watch:
        watch.about_threads = choose_threads(options)
        trained = train(kind, options, opened=watch.opened, notify=watch.say, progress=watch.steps)
    figures = {key: value for key, value in trained.result.items() if key not in RESULT_KEYS}
    if set(figures) - {"generations"}:  # a kind of run with figures of its own
        show_result(console, figures)
    if show is not None and trained.generation > 0:
        show(console, trained)
    if trained.generation > 0:
        show_worse(console, trained.run, trained.kept.generation)
    report = trained.run.path / "report.html"
    if report.exists() and not (trained.interrupted and not trained.plan.finish_interrupted):
        console.print(f"report   {escape(str(report))}")
    show_disk(console, trained.run)
    if not trained.interrupted:
        return 0
    if trained.generation == 0:
        console.print("interrupted before the first generation was complete; nothing was saved")
    else:
        command = resume_command(kind, trained.plan, trained.run)
        console.print(f"\ninterrupted after generation {trained.generation}; continue with\n         {escape(command)}")
    return 130


class Watch:
    """The live display of a run, from its first generation to the end of the ``with`` block.

    Warnings within the block are lines above the display, without the place in the code that they came from.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.about_threads: str | None = None
        from eggroll.run.steps import Steps

        self.steps = Steps(console)
        self._display: Display | None = None
        self._warnings = warnings.catch_warnings()

    def opened(self, run: Opened) -> list[Listener]:
        """Print what is trained and open the display."""
        from eggroll.run.console import Display

        self.steps.close()
        for line in run.plan.describe(run.worker):
            self.console.print(line)
        if self.about_threads is not None:
            self.console.print(f"[dim]{escape(self.about_threads)}[/]")
        self.console.print(f"[dim]run directory: {escape(str(run.run.path))}[/]\n")
        display = Display(
            run.plan.config.generations,
            start=run.start,
            title=run.plan.title,
            history=run.run.metrics(),
            console=self.console,
        )
        self._display = display.__enter__()
        return [display]

    def say(self, text: str) -> None:
        """A line above the display."""
        self.console.print(text, markup=False)

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        warnings.showwarning = self._warn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warnings.__exit__(kind, error, trace)
        self.steps.close()
        if self._display is not None:
            self._display.__exit__(kind, error, trace)

    def _warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(str(message))}")


def show_result(console: Console, result: dict[str, Any]) -> None:
    """One line for each entry of ``result.json``."""
    from eggroll.run.console import duration

    console.print()
    for key, value in result.items():
        is_time = key.endswith("_s") and not key.endswith("_per_s")
        if is_time:
            shown, key = duration(value), key.removesuffix("_s")
        else:
            is_count = isinstance(value, int) and not isinstance(value, bool)
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if is_count else value
        console.print(f"  {key.replace('_', ' '):32} [bold]{shown}[/]")
    console.print()


def show_disk(console: Console, run: RunDir) -> None:
    """What the run takes, if that is worth a line."""
    from eggroll.run.disk import bytes_of, size

    total, kept = bytes_of(run.path), bytes_of(run.checkpoints)
    if total >= SAID_FROM:
        console.print(f"disk     {size(total)}, {size(kept)} of it checkpoints, from which the run can be continued")


def show_kept(console: Console, kept: Kept) -> None:
    """Which generation's weights the run leaves, with the scores of the best and of the last one."""
    if kept.sentence():
        console.print(f"kept     {escape(kept.sentence())}")


def heldout_scores(run: RunDir) -> list[tuple[int, float]]:
    """The center's held-out scores, each with its generation; the first is that from before training."""
    return [(line["generation"], score) for line in run.metrics() if (score := line.get("heldout_reward")) is not None]


def show_worse(console: Console, run: RunDir, saved: int | None = None) -> None:
    """If a run has made the held-out score worse: say so, and how its best generation is rebuilt.

    Args:
        console: where to.
        run: the run.
        saved: the generation whose weights it leaves; what came after it does not count.
    """
    from eggroll.run.console import number

    scores = [score for score in heldout_scores(run) if saved is None or score[0] <= saved]
    if len(scores) < 2 or scores[-1][1] >= scores[0][1]:
        return
    (_, before), (last, after) = scores[0], scores[-1]
    best, score = max(scores, key=lambda one: one[1])
    what = (
        "no generation did better than that" if best == 0 else f"the best was {number(score)} after generation {best}"
    )
    console.print(
        f"\n[bold red]the held-out score got worse:[/] {number(before)} before training, {number(after)} after "
        f"generation {last}; {what}. Rebuild {'the weights from before training' if best == 0 else 'those weights'}:\n"
        f"         [bold]{escape(typed())} replay {quoted(run.path)} --to {best} -o {quoted(run.path / 'best')}[/]"
    )


def quoted(path: Path | str) -> str:
    """A path as it is typed on a command line, for rich."""
    return escape(shlex.quote(str(path)))
