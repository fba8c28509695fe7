"""``eggroll recipe``: run a published result from its one readable file."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.cli.config_file import parse_with_file
from eggroll.cli.kinds import RECIPES, load_recipe
from eggroll.cli.watch import resumed_options, run_command
from eggroll.core.settings import setting
from eggroll.run.terminal import Terminal


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
    module = load_recipe(name)
    defaults = partial(resumed_options, module.KIND) if hasattr(module, "KIND") else None
    options = parse_with_file(
        options_type(module),
        rest,
        prog=f"eggroll recipe {name}",
        description=module.__doc__ or "",
        default_options=defaults,
    )
    return run(module, options)


def options_type(module: ModuleType) -> type[Any]:
    """The options of a recipe."""
    kind: type[Any] = module.KIND.options if hasattr(module, "KIND") else module.OPTIONS
    return kind


def run(module: ModuleType, options: Any) -> int:
    """Run a recipe: one that trains, or one that measures."""
    if hasattr(module, "KIND"):
        return run_command(module.KIND, options)
    module.run(options)
    return 0


@dataclass(frozen=True, kw_only=True)
class AllOptions:
    """What ``eggroll recipe all`` can be told; each recipe has its own defaults for the rest."""

    device: str | None = None
    """cpu, cuda, cuda:1 (default: that of each recipe)."""
    data: str | None = None
    """Folder with MNIST's IDX files."""
    seed: int | None = None
    """Seed of everything random."""
    output: str | None = setting(None, flags=("-o",))
    """Folder for the run directories, one for each recipe (default: runs/NAME-TIME)."""


def run_all(arguments: Sequence[str]) -> int:
    """Every recipe, one after the other."""
    about = run_all.__doc__ or ""
    options = parse_with_file(AllOptions, arguments, prog="eggroll recipe all", description=about)
    given = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    planned = []
    for name in RECIPES:
        module = load_recipe(name)
        kind = options_type(module)
        known = {field.name for field in dataclasses.fields(kind)}
        chosen = {key: value for key, value in given.items() if key in known}
        if "output" in chosen:  # each has its own
            chosen["output"] = str(Path(str(options.output)) / name)
        planned.append((name, module, kind(**chosen)))
    console = Terminal(highlight=False)
    for name, module, chosen_options in planned:
        console.rule(f"[bold]eggroll recipe {name}")
        status = run(module, chosen_options)
        if status:
            return status
    return 0


def usage() -> str:
    """The recipes, one a line."""
    lines = "".join(f"  {name:<12}{what}\n" for name, what in RECIPES.items())
    return (
        "usage: eggroll recipe NAME ...   (eggroll recipe NAME --help lists its options)\n\n"
        f"{lines}  {'all':<12}all of them, one after the other\n"
    )
