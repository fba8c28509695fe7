"""The kinds of runs that commands start, by name; each is loaded when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eggroll._optional import missing, require
from eggroll.errors import RunError

if TYPE_CHECKING:
    from types import ModuleType

    from eggroll.lifecycle import RunKind
    from eggroll.run.run_dir import RunDir

HOMES = {"tune": "eggroll.llm.kind", "rl": "eggroll.rl.kind", "pretrain": "eggroll.pretrain.kind"}
RECIPES = {
    "cartpole": "a policy learns to balance a pole; all members play at once",
    "mnist": "a perceptron learns MNIST from cross entropy alone",
    "mnist_cnn": "two convolutions learn MNIST",
    "rwkv7": "an RWKV-7 in JAX learns a task through HyperscaleES's noiser",
    "profile": "where the time of a generation goes, beside plain inference",
    "hyperscale": "the largest population before memory ends, beside full-rank ES",
}
FILES = {"profile": "profiling"}
"""A recipe whose file is called otherwise: beside a profile.py, programs would not find Python's own ``profile``."""


def kind_of(run: RunDir) -> RunKind:
    """The kind of a run.

    Raises:
        RunError: no command started it.
    """
    from eggroll.lifecycle import kind_name

    name = kind_name(run.config)
    recipe = name.removeprefix("recipe ")
    if name in HOMES:
        kind: RunKind = importlib.import_module(HOMES[name]).KIND
    elif recipe != name and recipe in RECIPES:
        kind = load_recipe(recipe).KIND
    else:
        what = f"of {name!r}, which this version cannot rebuild" if name else "that no command of eggroll started"
        raise RunError(f"{run.path} is a run {what}; its updates.jsonl and checkpoints are intact")
    return kind


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe.

    Raises:
        MissingExtraError: torch, or another library that it needs, is not installed.
    """
    require("torch", extra="recipes")
    try:
        return importlib.import_module(f"eggroll.recipes.{FILES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("eggroll"):
            raise missing(f"the recipe {name} needs '{error.name}', which is not installed", "recipes") from error
        raise
