"""A run as a report sees it: what was measured, where each measurement stands, and how the run ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eggroll.core.reading import parse
from eggroll.errors import EggrollError
from eggroll.run.files import read_plain
from eggroll.run.metrics import METRICS, series
from eggroll.run.run_dir import RunDir

RESULT = "result.json"
SECONDS, STEPS = "@seconds", "@steps"
"""Keys of lines that the page adds: time over all sessions, and steps of the environment so far."""
PPO = "rl-ppo"
"""The kind of a baseline, which counts iterations and has no number of them in its settings."""
LARGEST = 1e300
"""Numbers from here on are not drawn: the length of an axis would be infinite."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """What the held-out data say about a run.

    Attributes:
        key: of ``metrics.jsonl``.
        short: its name.
        label: of its plot.
        higher: whether higher is better.
    """

    key: str
    short: str
    label: str
    higher: bool = True

    def best(self, values: Sequence[float]) -> int:
        """The index of the best value."""
        return (max if self.higher else min)(range(len(values)), key=values.__getitem__)


REWARD = Measure("heldout_reward", "held-out reward", METRICS["heldout_reward"].label)
RETURN = Measure("heldout_reward", "return", "return of held-out episodes")
BITS = Measure("validation_bits_per_byte", "bits per byte", "bits per byte of held-out text (lower is better)", False)
"""A language model from scratch: there the reward is minus these bits."""


def heldout_measure(metrics: Sequence[Line]) -> Measure:
    """The measure that a person expects of such a run."""
    if series(metrics, BITS.key)[0]:
        return BITS
    return RETURN if series(metrics, "env_steps")[0] else REWARD


@dataclass(frozen=True)
class RunView:
    """A run and what is known of it.

    Attributes:
        run: the run.
        name: how it is called in the page.
        defaults: the settings of its kind that nobody gave, by name.
        load_line: Python that loads the result, or the command that uses it.
    """

    run: RunDir
    name: str
    defaults: Mapping[str, Any] | None = None
    load_line: str | None = None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``, without numbers that cannot be drawn, each with its time and its steps.

        ``SECONDS`` are those over all sessions: ``elapsed_s`` starts at 0 again when a run is resumed.
        """
        found, before, last, steps = [], 0.0, 0.0, 0.0
        for line in self.run.metrics():
            line = {key: _drawable(value) for key, value in line.items()}
            elapsed = line.get("elapsed_s")
            if isinstance(elapsed, int | float):
                before, last = (before + last, elapsed) if elapsed < last else (before, elapsed)
            steps = line["env_steps"] if isinstance(line.get("env_steps"), int | float) else steps
            found.append({**line, SECONDS: before + last, STEPS: steps})
        return found

    @cached_property
    def measure(self) -> Measure:
        """What its held-out data say."""
        return heldout_measure(self.metrics)

    @cached_property
    def finished(self) -> int:
        """Updates done."""
        return len(self.run.updates()) or max((line["generation"] for line in self.metrics), default=0)

    @property
    def total(self) -> int | None:
        """Generations that it shall have; ``None`` where that is not known."""
        found = None if self.kind == PPO else self.run.setting("generations")
        return found if type(found) is int else None

    @cached_property
    def result(self) -> dict[str, Any]:
        """What is in ``result.json``; empty without one that can be read."""
        try:
            found = parse(read_plain(self.run.path / RESULT))
        except (OSError, ValueError, EggrollError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def kept(self) -> int | None:
        """The generation whose weights the run has saved, where that is known."""
        found = self.result.get("saved_generation")
        return found if type(found) is int and found <= self.finished else None

    @property
    def seconds(self) -> float:
        """Time over all sessions."""
        return self.metrics[-1][SECONDS] if self.metrics else 0.0

    @property
    def steps(self) -> bool:
        """Whether it counts steps of an environment."""
        return any(line[STEPS] for line in self.metrics)

    @cached_property
    def kind(self) -> str:
        """The command that started it, such as ``tune``; empty if it is not known."""
        name = self.run.config.get("kind") or (f"recipe {recipe}" if (recipe := self.run.config.get("recipe")) else "")
        return str(name)

    @property
    def model(self) -> str:
        """What evolves, in a word: a model's name, or an environment."""
        environment = self.run.environment
        for value in (environment.get("model"), *(self.run.setting(name) for name in ("model", "env", "recipe"))):
            if isinstance(value, str) and value:
                return value
        return ""

    @property
    def task(self) -> str:
        """What it is scored on, in a word."""
        for name in ("task", "reward", "data", "dataset", "prompts"):
            value = self.run.setting(name)
            if isinstance(value, str) and value:
                return value
        return ""

    def points(self, key: str) -> tuple[Sequence[Line], list[float]]:
        """The lines that have a finite ``key``, and its values."""
        lines = [line for line in self.metrics if _is_number(line.get(key))]
        return lines, [float(line[key]) for line in lines]

    def values(self, key: str) -> list[float]:
        """All values of ``key``."""
        return self.points(key)[1]

    def settings(self) -> dict[str, Any]:
        """All settings in one table; the algorithm's own come last."""
        config = self.run.config
        parts = {key: value for key, value in config.items() if key not in ("options", "config")}
        return {**parts, **(config.get("options") or {}), **(config.get("config") or {})}

    def changed(self) -> dict[str, Any] | None:
        """The settings that are not the defaults of its kind; ``None`` where those are not known."""
        if self.defaults is None:
            return None
        settings = self.settings()
        return {
            key: settings[key]
            for key in settings
            if key in self.defaults and _differs(settings[key], self.defaults[key])
        }


def _differs(value: Any, default: Any) -> bool:
    return json.dumps(value) != json.dumps(list(default) if isinstance(default, tuple) else default, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _drawable(value: Any) -> Any:
    """``None`` in the place of a number that axes have no room for."""
    return None if isinstance(value, int | float) and not abs(value) < LARGEST else value
