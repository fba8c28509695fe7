"""``eggroll recipe``: run a published result from its one readable file."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from eggroll._optional import require
from eggroll.cli.watch import resumed_run
from eggroll.errors import ConfigError, MissingExtraError, RunError

if TYPE_CHECKING:
    from eggroll.run.run_dir import RunDir
    from eggroll.torch.replica import Replica

RECIPES = {
    "cartpole": ("CartPoleOptions", "a policy learns to balance a pole; all members play at once"),
    "mnist": ("MnistOptions", "a perceptron learns MNIST from cross entropy alone"),
    "mnist_cnn": ("MnistCnnOptions", "two convolutions learn MNIST"),
    "profile": ("ProfileOptions", "where the time of a generation goes, beside plain inference"),
    "hyperscale": ("HyperscaleOptions", "the largest population before memory ends, beside full-rank ES"),
}


FILES = {"profile": "profiling"}
"""A recipe whose file is called otherwise: beside a profile.py, programs would not find Python's own ``profile``."""


def recipe(arguments: Sequence[str]) -> int:
    """Run a recipe by name, or all of them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "all":
        return run_all(rest)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, [*RECIPES, "all"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"eggroll recipe: there is no recipe {name!r}{hint}\n\n{usage()}", end="", file=sys.stderr)
        return 2
    module = load(name)
    kind = getattr(module, RECIPES[name][0])
    absent: Any = tyro.MISSING_NONPROP
    default = _resumed(name, kind, rest)
    module.run(
        tyro.cli(
            kind,
            args=rest,
            prog=f"eggroll recipe {name}",
            description=module.__doc__,
            default=absent if default is None else default,
        )
    )
    return 0


def _resumed(name: str, kind: type[Any], arguments: Sequence[str]) -> Any | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    path = resumed_run(arguments)
    return None if path is None else dataclasses.replace(options_of_run(path, kind, name), resume=path)


def options_of_run(path: str, kind: type[Any], name: str) -> Any:
    """The options that a recipe's run was started with.

    Raises:
        RunError: it is a run of something else.
        ConfigError: options that this version does not know.
    """
    from eggroll.run.run_dir import RunDir

    config = RunDir.open(path).config
    if config.get("recipe") != name:
        what = f"of the recipe {config['recipe']}" if "recipe" in config else "of no recipe"
        raise RunError(f"{path} is a run {what}, so eggroll recipe {name} cannot continue it")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(config["options"]) - known)
    if unknown:
        raise ConfigError(f"{path}/config.json has settings that this version does not know: {', '.join(unknown)}")
    return kind(**config["options"])


def replica_of_run(run: RunDir) -> Replica:
    """The replica that a recipe's run began with, for a replay."""
    name = run.config["recipe"]
    module = load(name)
    replica: Replica = module.replica_for(options_of_run(str(run.path), getattr(module, RECIPES[name][0]), name))
    return replica


@dataclass(frozen=True)
class AllOptions:
    """What ``eggroll recipe all`` can be told; each recipe has its own defaults for the rest."""

    device: str | None = None
    """cpu, cuda, cuda:1 (default: that of each recipe)."""
    data: str | None = None
    """Folder with MNIST's IDX files."""
    seed: int | None = None
    """Seed of everything random."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for the run directories, one for each recipe (default: runs/NAME-TIME)."""


def run_all(arguments: Sequence[str]) -> int:
    """Every recipe, one after the other."""
    options = tyro.cli(AllOptions, args=list(arguments), prog="eggroll recipe all", description=run_all.__doc__)
    given = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    if options.output is not None:
        given["output"] = None  # each has its own
    planned = []
    for name in RECIPES:
        module = load(name)
        kind = getattr(module, RECIPES[name][0])
        known = {field.name for field in dataclasses.fields(kind)}
        chosen = {key: value for key, value in given.items() if key in known}
        if "output" in chosen:
            chosen["output"] = str(Path(str(options.output)) / name)
        planned.append((name, module, kind(**chosen)))
    console = Console(highlight=False)
    for name, module, chosen_options in planned:
        console.rule(f"[bold]eggroll recipe {name}")
        module.run(chosen_options)
    return 0


def load(name: str) -> ModuleType:
    """The module of a recipe.

    Raises:
        MissingExtraError: torch, or another library that it needs, is not installed.
    """
    require("torch", extra="recipes")
    try:
        return importlib.import_module(f"eggroll.recipes.{FILES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("eggroll"):
            raise MissingExtraError(
                f"the recipe {name} needs '{error.name}', which is not installed. "
                "Install it with: pip install 'eggroll-es[recipes]'"
            ) from error
        raise


def usage() -> str:
    """The recipes, one a line."""
    lines = "".join(f"  {name:<12}{what}\n" for name, (_, what) in RECIPES.items())
    return (
        "usage: eggroll recipe NAME ...   (eggroll recipe NAME --help lists its options)\n\n"
        f"{lines}  {'all':<12}all of them, one after the other\n"
    )
