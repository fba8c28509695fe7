"""Hyperparameters that are not given: the paper's for its sixteen environments (EGGROLL v2, appendix N.4), and small
ones for a CPU."""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["paper", "small"]
COLUMNS = (
    "optimizer", "lr", "lr_decay", "sigma", "sigma_decay", "rank", "population_size", "episodes", "rank_transform",
)  # fmt: skip
"""``episodes`` is the paper's n_parallel_evals: episodes of each member in a generation."""

_TABLE: dict[str, tuple[Any, ...]] = {
    "CartPole-v1": ("sgd", 0.1, 0.9995, 0.2, 0.999, 4, 2048, 1, False),
    "Pendulum-v1": ("adam", 0.01, 0.995, 0.05, 0.995, 4, 4096, 1, False),
    "brax/ant": ("adam", 0.01, 0.9995, 0.05, 0.9995, 1, 2048, 1, False),
    "brax/humanoid": ("adam", 0.1, 1.0, 0.2, 0.9995, 1, 4096, 8, True),
    "brax/inverted_double_pendulum": ("adam", 0.1, 1.0, 0.5, 0.995, 2, 2048, 1, True),
    "craftax/Craftax-Classic-Symbolic-AutoReset-v1": ("sgd", 0.01, 0.995, 0.05, 1.0, 1, 2048, 4, False),
    "craftax/Craftax-Symbolic-AutoReset-v1": ("sgd", 0.01, 0.999, 0.05, 0.999, 4, 512, 1, True),
    "jumanji/Game2048-v1": ("adamw", 0.1, 1.0, 0.5, 0.9995, 1, 1024, 4, False),
    "jumanji/Knapsack-v1": ("sgd", 0.1, 0.999, 0.05, 1.0, 4, 1024, 4, True),
    "jumanji/Snake-v1": ("adam", 0.001, 0.9995, 0.05, 0.9995, 1, 4096, 8, True),
    "kinetix/l/hard_pinball": ("sgd", 0.01, 0.995, 0.05, 0.999, 4, 2048, 8, True),
    "kinetix/m/h17_thrustcontrol_left": ("sgd", 0.1, 0.9995, 0.5, 1.0, 4, 512, 4, True),
    "kinetix/s/h1_thrust_over_ball": ("adamw", 0.1, 0.995, 0.5, 0.9995, 1, 512, 1, True),
    "navix/Navix-DoorKey-8x8-v0": ("adamw", 0.01, 0.9995, 0.05, 1.0, 1, 1024, 1, False),
    "navix/Navix-Dynamic-Obstacles-6x6-Random-v0": ("adam", 0.01, 0.999, 0.05, 1.0, 2, 512, 4, False),
    "navix/Navix-FourRooms-v0": ("sgd", 0.01, 0.999, 0.05, 0.9995, 4, 2048, 4, True),
}

DEFAULT: dict[str, Any] = dict(zip(COLUMNS, ("adam", 0.01, 0.999, 0.05, 1.0, 1, 512, 1, True), strict=True))
"""For environments that the paper does not have."""

PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in _TABLE.items()}


SMALL: dict[str, Any] = dict(zip(COLUMNS, ("adam", 0.02, 1.0, 0.1, 1.0, 1, 128, 1, True), strict=True))
"""For a CPU, where the paper's populations take minutes a generation: those of ``benchmarks/rl/sixteen.py``."""
SMALL_BRAX = {"sigma": 0.05, "lr": 0.005}
"""The same for brax, where a policy that does nothing survives, and some twenty updates of that size end it."""
SMALL_SGD_LR = 0.2
"""In the paper's scale, for sgd in the place of Adam."""


def preset(name: str, which: PresetName, optimizer: str | None = None) -> dict[str, Any]:
    """The settings for an environment by its canonical name.

    Args:
        name: the environment.
        which: ``paper``, or ``small`` (for short runs on a CPU).
        optimizer: the one that was asked for, if any: Adam's learning rate is no other rule's.
    """
    if which == "paper":
        return dict(PRESETS.get(name, DEFAULT))
    found = {**SMALL, **(SMALL_BRAX if name.startswith("brax/") else {})}
    if optimizer in ("sgd", "momentum"):
        found["lr"] = SMALL_SGD_LR * (1.0 if optimizer == "sgd" else 0.1)  # momentum of 0.9 adds up to ten steps
    return found
