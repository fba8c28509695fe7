"""``eggroll rl``: evolve a policy for an environment."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eggroll._optional import require
from eggroll.cli.watch import Watch, resumed_run, show_result
from eggroll.rl.config import RLConfig

if TYPE_CHECKING:
    from eggroll.rl.envs.base import Environment
    from eggroll.rl.trainer import Trained
    from eggroll.rl.worker import PolicyLearner
    from eggroll.run.run_dir import RunDir


def rl(options: RLConfig) -> int:
    """Evolve a policy for an environment; hyperparameters that are not given are the paper's for it."""
    from eggroll.rl.envs import registry

    console = Console(soft_wrap=True, highlight=False)
    if options.list:
        _list(console, registry.listing())
        return 0
    require("jax", extra="rl")
    require("optax", extra="rl")
    if options.algo == "ppo":
        from eggroll.rl.baselines import ppo

        ppo(options, console.print)
        return 0
    from eggroll.rl.trainer import train

    with Watch(console, options.report_to, lambda run: str(run.config["env"])) as watch:
        trained = train(options, listeners=watch.listeners, opened=lambda *what: _opened(console, *what))
    if trained.interrupted:
        command = f"eggroll rl --resume {shlex.quote(str(trained.run.path))}"
        console.print(f"\ninterrupted after generation {trained.generation}; continue with\n         {command}")
        return 130
    _finish(console, trained, render=options.render)
    return 0


def default_options(arguments: Sequence[str]) -> RLConfig | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    from eggroll.rl.trainer import options_of_run

    path = resumed_run(arguments)
    return None if path is None else dataclasses.replace(options_of_run(path), resume=path)


def _opened(console: Console, run: RunDir, env: Environment, learner: PolicyLearner) -> None:
    config, size = learner.config, sum(leaf.spec.size for leaf in learner.leaves)
    console.print(
        f"[bold]{escape(env.name)}[/]  {env.obs_size} observations, {escape(str(env.actions))}, episodes of at most "
        f"{learner.max_steps} steps\npolicy   {size:,} parameters evolved\n"
        f"search   population {config.population_size}, rank {config.rank}, sigma {config.sigma:g}, "
        f"{config.optimizer} lr {config.lr:.4g}, seed {config.seed}\n[dim]run directory: {escape(str(run.path))}[/]\n"
        "[dim]the first generation compiles, which takes some seconds to a minute[/]\n"
    )


def _finish(console: Console, trained: Trained, *, render: bool) -> None:
    from eggroll.run.report import write_report

    run, result = trained.run, trained.result
    report = write_report(run)
    show_result(console, result)
    console.print(f"\ncurve    {escape(str(run.path / 'curve.png'))}\nreport   {escape(str(report))}")
    if not render:
        return
    drawn = trained.learner.draw(Path(run.path) / "episode")
    if drawn is not None:
        path, score = drawn
        console.print(f"episode  {escape(str(path))} (return {score:.4g})")


def _list(console: Console, rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("environment", "library", "installed, or how to"):
        table.add_column(title)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
    console.print(
        "\nAny other id of these libraries works too: gymnax/Acrobot-v1, brax/hopper, kinetix/m/arm_left, "
        "jumanji/TSP-v1, gymnasium/HalfCheetah-v5."
    )
