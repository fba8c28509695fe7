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
    trust_remote_code: bool = False
    """Run code that comes with the run's model or environment. A run's directory alone is never believed in this."""
    allow_difference: bool = False
    """Write the weights also if they differ from the run's checkpoint (another kind of machine, other threads)."""


OPTIONS = ReplayOptions


def run(options: ReplayOptions) -> int:
    """Rebuild the weights of a generation from the base model and the run's log."""
    from rich.progress import track

    from eggroll.cli.kinds import kind_of
    from eggroll.lifecycle import replay as rebuild
    from eggroll.run.run_dir import RunDir

    console = Console(soft_wrap=True, highlight=False, emoji=False)

    def shown(records: Iterable[UpdateRecord]) -> Iterable[UpdateRecord]:
        return track(list(records), description="replaying", console=console, disable=not console.is_terminal)

    directory = RunDir.open(options.run)
    done = rebuild(
        kind_of(directory), directory, to=options.to, output=options.output, track=shown,
        trust_remote_code=options.trust_remote_code, allow_difference=options.allow_difference,
    )  # fmt: skip
    if done.equal is None and done.remark:
        compared = f", not compared with its checkpoint, which is damaged: {escape(done.remark)}"
    elif done.equal is None:
        compared = ", not compared: the run keeps no checkpoint of it" if done.generation > 0 else ""
    elif done.equal:
        compared = ", equal to its checkpoint, bit for bit"
    else:
        compared = f", [red]differs from its checkpoint[/] ({escape(done.remark)})"
    console.print(f"generation {done.generation} of {done.logged}{compared}")
    console.print(f"{done.saved.what:8} {escape(str(done.saved.path))}")
    for number, line in enumerate(done.saved.load):
        console.print(f"{'load it' if number == 0 else '':8} [bold]{escape(line)}[/]")
    return 0
