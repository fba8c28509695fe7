"""``eggroll replay``: the weights of any generation, from the first weights and the run's log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from eggroll.core.settings import setting

if TYPE_CHECKING:
    from eggroll.core.records import UpdateRecord


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What ``eggroll replay`` can be told."""

    run: str = setting(positional="RUN")
    """The run directory."""
    to: int | None = None
    """The generation to rebuild (default: the last one in the log; 0 is the base model)."""
    output: str | None = setting(None, flags=("-o",))
    """Where the model goes (default: RUN/replay-<generation>)."""


OPTIONS = ReplayOptions


def run(options: ReplayOptions) -> int:
    """Rebuild the weights of a generation from the base model and the run's log."""
    from rich.progress import track

    from eggroll.cli.kinds import kind_of
    from eggroll.lifecycle import replay as rebuild
    from eggroll.run.run_dir import RunDir

    console = Console(soft_wrap=True, highlight=False)

    def shown(records: Iterable[UpdateRecord]) -> Iterable[UpdateRecord]:
        return track(list(records), description="replaying", console=console, disable=not console.is_terminal)

    directory = RunDir.open(options.run)
    done = rebuild(kind_of(directory), directory, to=options.to, output=options.output, track=shown)
    if done.damage:
        compared = f", not compared with its checkpoint, which is damaged: {escape(done.damage)}"
    elif done.equal is None:
        compared = ""
    elif done.equal:
        compared = ", equal to its checkpoint, bit for bit"
    else:
        compared = ", [red]differs from its checkpoint[/] (another kind of machine, or another number of threads?)"
    console.print(f"generation {done.generation} of {done.logged}{compared}")
    console.print(f"{done.saved.what:8} {escape(str(done.saved.path))}")
    for number, line in enumerate(done.saved.load):
        console.print(f"{'load it' if number == 0 else '':8} [bold]{escape(line)}[/]")
    return 0
