"""``eggroll rl``: evolve a policy for an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eggroll._optional import require
from eggroll.cli.watch import option_given, resumed_options, run_command
from eggroll.errors import RunError
from eggroll.rl.config import RLConfig
from eggroll.run.terminal import Terminal

if TYPE_CHECKING:
    from eggroll.lifecycle import Trained


@dataclass(frozen=True, kw_only=True)
class RLOptions(RLConfig):
    """What ``eggroll rl`` can be told: the settings of a run, and what else it should do."""

    render: bool = True
    """Draw an episode of the trained policy, where the environment can."""
    list: bool = False
    """Show the environments and whether what they need is installed."""


OPTIONS = RLOptions


def run(options: RLOptions) -> int:
    """Evolve a policy for an environment; settings that are not given come from a preset."""
    if options.list:
        _list()
        return 0
    require("jax", extra="rl")
    require("optax", extra="rl")
    if options.algo == "ppo":
        from eggroll.rl.baselines import ppo

        ppo(options, Terminal(soft_wrap=True, highlight=False).print)
        return 0
    from eggroll.rl.kind import KIND

    return run_command(KIND, options, _drawing if options.render else _curve)


def default_options(arguments: Sequence[str]) -> RLOptions | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    from eggroll.core.settings import to_json_values
    from eggroll.lifecycle import kind_name
    from eggroll.rl.kind import KIND
    from eggroll.run.run_dir import RunDir

    path = option_given(arguments, "--resume")
    if path is None:
        return None
    if kind_name(RunDir.open(path).config) == "rl-ppo":
        raise RunError(f"{path} is a run of PPO, which cannot be resumed or replayed; start it again")
    return RLOptions(**to_json_values(resumed_options(KIND, arguments)))


def _curve(console: Console, trained: Trained) -> None:
    if not trained.interrupted:
        console.print(f"curve    {escape(str(trained.run.path / 'curve.png'))}")


def _drawing(console: Console, trained: Trained) -> None:
    from eggroll.rl.kind import KIND
    from eggroll.run.report import REPORT, write_report

    _curve(console, trained)
    drawn = None if trained.interrupted else trained.worker.draw(Path(trained.run.path) / "episode")
    if drawn is not None:
        path, score = drawn
        console.print(f"episode  {escape(str(path))} (return {score:.4g})")
        if (trained.run.path / REPORT).exists():
            write_report(
                trained.run, load_line=KIND.load_line(trained.run), defaults=KIND.defaults()
            )  # again, with the episode in it


def _list() -> None:
    from eggroll.rl.envs import registry

    console = Terminal(soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("environment", "library", "installed, or how to"):
        table.add_column(title)
    for row in registry.listing():
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
    console.print(
        "\nAny other id of these libraries works too: gymnax/Acrobot-v1, brax/hopper, kinetix/m/arm_left, "
        "jumanji/TSP-v1, gymnasium/HalfCheetah-v5."
    )
