"""``eggroll report``: the report of a run, written again."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from eggroll.core.settings import setting


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What ``eggroll report`` can be told."""

    run: str = setting(positional="RUN")
    """The run directory."""


OPTIONS = ReportOptions


def run(options: ReportOptions) -> int:
    """Write a run's report.html again, also while the run goes on."""
    from eggroll.cli.kinds import kind_of
    from eggroll.errors import RunError
    from eggroll.run.report import write_report
    from eggroll.run.run_dir import RunDir

    directory = RunDir.open(options.run)
    try:
        load_line = kind_of(directory).load_line(directory)
    except RunError:  # of a program of the user's own
        load_line = None
    written = write_report(directory, load_line=load_line)
    Console(soft_wrap=True, highlight=False, emoji=False).print(f"report   {escape(str(written))}")
    return 0
