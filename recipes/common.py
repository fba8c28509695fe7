"""What recipes share: their options, and a run with a live display, a log, checkpoints, a report and a result."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from eggroll.core.config import ESConfig
from eggroll.errors import ConfigError, RunError
from eggroll.loop import Evaluation, Heldout, Loop
from eggroll.run.console import Display, duration
from eggroll.run.report import write_report
from eggroll.run.run_dir import RunDir
from eggroll.run.trackers import TrackerListener, make_trackers, tracker_names
from eggroll.torch.replica import Replica

MAY_CHANGE = ("generations",)
"""Settings of the algorithm that a resumed run may have other values of."""
FREE_OPTIONS = ("output", "resume", "report_to", "device", "members_per_forward", "generations", "backprop")
"""Options that a resumed run may have other values of: they do not change what is learned."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's ``mallopt``."""

console = Console(highlight=False, soft_wrap=True)


Population = Annotated[int, tyro.conf.arg(aliases=["-p"])]
Generations = Annotated[int, tyro.conf.arg(aliases=["-g"])]


@dataclass(frozen=True)
class Options:
    """What every recipe that trains can be told; each has defaults of its own."""

    population: Population = 1024
    """Members per generation; both signs of a pair count."""
    generations: Generations = 100
    """Updates."""
    rank: int = 1
    """Rank of the perturbations."""
    sigma: float = 0.05
    """Standard deviation of the perturbations."""
    lr: float = 0.01
    """Learning rate of the first generation."""
    members_per_forward: int = 256
    """Members evaluated at once: so many that their activations stay in cache."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU if there is one."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Run directory (default: runs/NAME-TIME)."""
    resume: str | None = None
    """Continue the run in this directory with the options it has."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, none, or several separated by commas."""

    def place(self) -> torch.device:
        """The device.

        Raises:
            ConfigError: there is no such device here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            place = torch.device(self.device)
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {self.device}: {str(error).splitlines()[0]}; use cpu or auto") from None
        return place


@dataclass(frozen=True)
class Done:
    """A run that is over, and what this process has done of it."""

    run: RunDir
    seconds: float
    generations: int

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The metrics of every generation, those before a resume included."""
        return [line for line in self.run.metrics() if "fitness_mean" in line]


def program(name: str) -> None:
    """A recipe as a program of its own: the command line of ``eggroll recipe NAME``."""
    from eggroll.cli.main import main

    sys.exit(main(["recipe", name, *sys.argv[1:]]))


def evolve(
    name: str,
    options: Options,
    replica: Replica,
    evaluate: Callable[[int, float], Tensor],
    heldout: Callable[[], float],
    *,
    eval_every: int,
    stop: Callable[[RunDir], bool] | None = None,
    extra: dict[str, Any] | None = None,
) -> Done:
    """Run all generations of a recipe.

    Args:
        name: of the recipe.
        options: of the recipe; they are the run's ``config.json``.
        replica: what is evolved.
        evaluate: ``(generation, sigma) -> (population,)`` scores.
        heldout: the centre's score on data that is not trained on.
        eval_every: generations between calls of ``heldout``.
        stop: asked after each generation; true ends the run early.
        extra: facts for ``environment.json``.
    """
    _keep_freed_memory()
    config: ESConfig = replica.config
    tracker_names(options.report_to)
    run = _run_dir(name, options, config, extra or {})
    resumed = options.resume is not None
    console.print(
        f"[bold]{name}[/]  {sum(s.size for s in replica.population.specs)} parameters evolved, on {options.place()}"
    )
    console.print(
        f"population {config.population_size} ({config.sampling}), rank {config.rank}, sigma {config.sigma:g}, lr "
        f"{config.lr:g}, {config.optimizer}, seed {config.seed}\n[dim]run directory: {escape(str(run.path))}[/]\n"
    )
    tracker = make_trackers(options.report_to, run)
    done = len(run.updates()) if resumed else 0
    display = Display(config.generations, start=done, title=name, history=run.metrics(), console=console)
    loop = Loop(
        config=config,
        learner=replica,
        evaluate=lambda generation, sigma: Evaluation(evaluate(generation, sigma).double().cpu().numpy()),
        heldout=lambda: Heldout(heldout()),
        eval_every=eval_every,
        run=run,
        checkpoint_every=max(1, config.generations // 10),
        listeners=[display, TrackerListener(tracker)],
        stop=None if stop is None else lambda _: stop(run),
    )
    start = loop.resume() if resumed else 0
    began = time.perf_counter()
    with display:
        loop.go(start)
    seconds = time.perf_counter() - began
    tracker.close()
    if loop.interrupted:
        command = f"eggroll recipe {name} --resume {shlex.quote(str(run.path))}"
        console.print(f"\ninterrupted after generation {loop.applied}; continue with\n         {command}")
        raise SystemExit(130)
    return Done(run, seconds, loop.applied - start)


def finish(done: Done, result: dict[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` and the report, and print both; returns the result."""
    run = done.run
    result = {"recipe_s": round(sum(line["evaluate_s"] + line["update_s"] for line in done.trained), 2), **result}
    run.write_file("result.json", (json.dumps(result, indent=1) + "\n").encode())
    report = write_report(run)
    console.print()
    for key, value in result.items():
        is_time = key.endswith("_s") and not key.endswith("_per_s")
        shown = duration(value) if is_time else f"{value:,.4g}" if isinstance(value, float) else value
        console.print(f"  {(key.removesuffix('_s') if is_time else key).replace('_', ' '):32} [bold]{shown}[/]")
    console.print(f"\nreport   {escape(str(report))}")
    return result


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next generation.

    By default glibc gives large blocks back to the system, which then hands out the same memory again page by page: a
    third of the time of small networks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # no glibc
    for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30), (M_TOP_PAD, 2**26)):
        mallopt(parameter, value)


def _run_dir(name: str, options: Options, config: ESConfig, extra: dict[str, Any]) -> RunDir:
    settings: dict[str, Any] = {
        "recipe": name,
        "options": dataclasses.asdict(options),
        "population_size": config.population_size,
        "rank": config.rank,
        "generations": config.generations,
        "config": config.to_dict(),
    }
    if options.resume is None:
        path = Path(options.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return RunDir.create(path, settings, extra={"model": name, "device": str(options.place()), **extra})
    run = RunDir.open(options.resume)
    if len(run.updates()) > config.generations:
        raise ConfigError(
            f"--generations {config.generations}: the run in {run.path} has {len(run.updates())} finished generations "
            "already; give more, or rebuild an earlier one with eggroll replay"
        )
    _check_options(run, settings["options"])
    run.check_config(settings, may_change=("options", "config", "generations"))
    before, now = run.config["config"], settings["config"]
    changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"the run in {run.path} has {', '.join(f'{key}={before.get(key)!r}' for key in changed)}; a run is resumed "
            "with the settings it has"
        )
    run.update_config(settings)
    run.note_resume(len(run.updates()))
    return run


def _check_options(run: RunDir, options: dict[str, Any]) -> None:
    """Refuse to go on with other options than the run was started with, apart from those that change no result.

    Raises:
        RunError: options differ; the message lists each with its old and its new value.
    """
    before = run.config["options"]
    changes = [
        f"  - --{key.replace('_', '-')}: {_shown(before[key])} in the run, {_shown(value)} now"
        for key, value in options.items()
        if key not in FREE_OPTIONS and key in before and before[key] != value
    ]
    if changes:
        free = ", ".join(f"--{key.replace('_', '-')}" for key in FREE_OPTIONS if key in options and key != "resume")
        raise RunError(
            f"the run in {run.path} was started with other options:\n"
            + "\n".join(changes)
            + "\nLeave them out, as --resume takes them from the run, or start a new run in another directory (-o). "
            f"Only {free} may change."
        )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
