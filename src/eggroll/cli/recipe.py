"""``eggroll recipe``: run a published result from its one readable file."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console

from eggroll._optional import require
from eggroll.errors import MissingExtraError

RECIPES = {
    "cartpole": ("CartPoleOptions", "a policy learns to balance a pole; all members play at once"),
    "mnist": ("MnistOptions", "a perceptron learns MNIST from cross entropy alone"),
    "mnist_cnn": ("MnistCnnOptions", "two convolutions learn MNIST"),
    "profile": ("ProfileOptions", "where the time of a generation goes, beside plain inference"),
    "hyperscale": ("HyperscaleOptions", "the largest population before memory ends, beside full-rank ES"),
}


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
    kind, run = load(name)
    run(tyro.cli(kind, args=rest, prog=f"eggroll recipe {name}", description=run.__doc__))
    return 0


def run_all(arguments: Sequence[str]) -> int:
    """Every recipe with its defaults, one after the other; the options that they share may be given."""
    console = Console(highlight=False)
    for name in RECIPES:
        console.rule(f"[bold]eggroll recipe {name}")
        code = recipe([name, *arguments])
        if code:
            return code
    return 0


def load(name: str) -> tuple[type[Any], Callable[[Any], Any]]:
    """The options and the function of a recipe.

    Raises:
        MissingExtraError: torch, or another library that it needs, is not installed.
    """
    require("torch", extra="recipes")
    try:
        module = importlib.import_module(f"eggroll.recipes.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("eggroll"):
            raise MissingExtraError(
                f"the recipe {name} needs '{error.name}', which is not installed. "
                "Install it with: pip install 'eggroll-es[recipes]'"
            ) from error
        raise
    return getattr(module, RECIPES[name][0]), module.run


def usage() -> str:
    """The recipes, one a line."""
    lines = "".join(f"  {name:<12}{what}\n" for name, (_, what) in RECIPES.items())
    return (
        "usage: eggroll recipe NAME ...   (eggroll recipe NAME --help lists its options)\n\n"
        f"{lines}  {'all':<12}all of them, one after the other\n"
    )
