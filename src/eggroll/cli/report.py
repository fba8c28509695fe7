"""``eggroll report``: the report of a run, written again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape


@dataclass(frozen=True)
class ReportOptions:
    """What ``eggroll report`` can be told."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run directory."""


def report(options: ReportOptions) -> int:
    """Write a run's report.html again, also while the run goes on."""
    from eggroll.llm.models.export import load_line
    from eggroll.run.report import write_report
    from eggroll.run.run_dir import RunDir

    run = RunDir.open(options.run)
    model = Path(run.path) / "model"
    written = write_report(run, load_line=load_line(model) if model.exists() else None)
    Console(soft_wrap=True, highlight=False).print(f"report   {escape(str(written))}")
    return 0
