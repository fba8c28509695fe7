"""The word ``auto`` in the place of a setting, and the numbers that stand in for it until it is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from eggroll.core.config import OptimizerName

AUTO: Literal["auto"] = "auto"
LEARNING_RATES: Mapping[OptimizerName, float] = {"sgd": 0.05, "momentum": 0.005, "adam": 0.003, "adamw": 0.003}
"""With 32 members, steps of up to about 0.003 per entry."""
STAND_INS: Mapping[str, Any] = {
    "population_size": 32, "prompts_per_generation": 8, "generations": 100, "sigma": 0.01, "lr": 0.05,
    "lr_schedule": "exponential",
}  # fmt: skip
"""Settings that may be ``auto``, and what they are until they are chosen, or where nothing has to be."""

Options = TypeVar("Options")


def automatic(options: Any) -> set[str]:
    """Names of the settings that are to be chosen."""
    return {name for name in STAND_INS if getattr(options, name, None) == AUTO}


def with_stand_ins(options: Options) -> Options:
    """``options`` with a number in each place."""
    names = automatic(options)
    values = {name: STAND_INS[name] for name in names}
    if "lr" in names:
        values["lr"] = LEARNING_RATES.get(options.optimizer, STAND_INS["lr"])  # type: ignore[attr-defined]
    return dataclasses.replace(options, **values) if names else options  # type: ignore[type-var]
