"""The problems of reasoning-gym, by task and number: the same in every process.

The package seeds each problem by its number. A few of its tasks also take elements out of sets of strings, whose order
changes from one Python process to the next, or draw from global generators. A resumed run would go on with other
problems, and a worker would score other ones than the driver asked. So the problems of those come from a child process
in which the hash seed and the global generators are fixed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from eggroll._optional import require
from eggroll.errors import ConfigError

__all__ = ["DRAWS", "SLOW", "SLOWEST", "UNSTABLE", "dataset_of", "entry_of", "names"]

SEED = 2024
DRAWS = 4096
"""Problems of a task that are looked at; tasks with few different ones end up with smaller splits."""
_SLOW = """advanced_geometry countdown game_of_life game_of_life_halting intermediate_integration jugs
    polynomial_equations polynomial_multiplication rearc rectangle_count rubiks_cube simple_integration sudoku
    word_ladder"""
SLOW = frozenset(_SLOW.split())
"""Tasks that need 4 to 60 milliseconds for a problem."""
_SLOWEST = "futoshiki knight_swap puzzle24 quantum_lock sokoban zebra_puzzles"
SLOWEST = frozenset(_SLOWEST.split())
"""Tasks that need 0.1 to 1 second for a problem."""
_UNSTABLE = """codeio isomorphic_strings knight_swap list_functions polynomial_multiplication ransom_note
    word_ladder"""
UNSTABLE = frozenset(_UNSTABLE.split())
"""Tasks whose problems differ between processes; found by making 200 problems of every task in two of them.
In the child they are the same, but for two of 500 of codeio: it runs programs, and some report an address or a time."""
CHILD_SECONDS = 600
"""The longest wait for a child process. The slowest task takes half a minute on an idle core."""
NO_TASKS = frozenset({"composite"})
"""A mixture of other tasks; it has no problems of its own."""

_CHILD = """
import json, random, sys
import numpy
import reasoning_gym
name, seed, size, first, count = sys.argv[1], *map(int, sys.argv[2:])
made = reasoning_gym.create_dataset(name, seed=seed, size=size)
entries = []
for index in range(first, first + count):
    random.seed(seed + index)
    numpy.random.seed(seed + index)
    entries.append(made[index])
print("\\n" + json.dumps(entries, default=str))
"""


def names() -> list[str]:
    """The tasks of the installed package.

    Raises:
        MissingExtraError: it is not installed.
    """
    require("reasoning_gym", extra="tasks")
    return sorted(set(require("reasoning_gym.factory", extra="tasks").DATASETS) - NO_TASKS)


@cache
def dataset_of(name: str) -> Any:
    """The package's data set, which has the task's scorer."""
    return require("reasoning_gym", extra="tasks").create_dataset(name, seed=SEED, size=DRAWS)


@cache
def entry_of(name: str, index: int) -> dict[str, Any]:
    """One problem: ``question``, ``answer`` (``None`` where there are many) and ``metadata``, for the scorer."""
    if name not in UNSTABLE:
        return dict(dataset_of(name)[index])
    count = 32 if name in SLOWEST else 256 if name in SLOW else 1024  # starting a child takes seconds
    return _made_in_child(name, index // count, count)[index % count]


@cache
def _made_in_child(name: str, block: int, count: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, name, *map(str, (SEED, DRAWS, block * count, count))]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"reasoning-gym made no {count} problems of {name!r} in {CHILD_SECONDS} seconds, which takes less than a "
            "minute on an idle machine; try again when less else runs, or take another task"
        ) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ConfigError(f"reasoning-gym could not make problems of {name!r}: {reason[0]}")
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made
