"""``eggroll report``: one page about a run, or about several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from eggroll._command import typed
from eggroll.core.settings import setting
from eggroll.errors import ConfigError
from eggroll.run.terminal import Terminal

if TYPE_CHECKING:
    from eggroll.run.report.view import RunView
    from eggroll.run.run_dir import RunDir

COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What ``eggroll report`` can be told."""

    runs: tuple[str, ...] = setting((), positional="RUN [RUN ...]")
    """The run directory; several are compared on one page."""
    output: str | None = setting(None, flags=("-o",))
    """The file to write (default: report.html in the run's directory, or comparison.html here for several runs)."""


OPTIONS = ReportOptions


def run(options: ReportOptions) -> int:
    """Write a page with the curves, answers and settings of a run, also while it goes on, or of several runs."""
    from eggroll.run.report import write_comparison, write_report
    from eggroll.run.run_dir import RunDir

    if not options.runs:
        raise ConfigError(f"report needs the directory of a run, or of several: {typed()} report runs/NAME")
    directories = [RunDir.open(path) for path in options.runs]
    views = [_view(run, name) for run, name in zip(directories, _names(options.runs), strict=True)]
    if len(views) == 1:
        view = views[0]
        written = write_report(view.run, load_line=view.load_line, defaults=view.defaults, output=options.output)
    else:
        written = write_comparison(views, options.output or COMPARISON)
    Terminal(soft_wrap=True, highlight=False).print(f"report   {escape(str(written))}")
    return 0


def _view(directory: RunDir, name: str) -> RunView:
    from eggroll.cli.kinds import kind_of
    from eggroll.errors import RunError
    from eggroll.run.report.view import RunView

    try:
        kind = kind_of(directory)
    except RunError:  # of a program of the user's own
        return RunView(directory, name)
    return RunView(directory, name, kind.defaults(), kind.load_line(directory))


def _names(paths: tuple[str, ...]) -> list[str]:
    """The folders' names; with the folders that they are in where two are called the same."""
    names = [Path(path).resolve().name for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
