"""What the numbers of a run say about it, in words: whether there is a signal, and what goes wrong.

Each thing is said once. The thresholds:

- *No signal*: ``F`` of the first generations together (at least :data:`ROWS` rows) is below the 95 % point of what
  noise alone gives. With reliability 1/3, 16 pairs and 8 prompts, ``z`` is about 2 after three generations; of a good
  run it is far above. Later it takes two windows of ten generations in a row, since one of many is below by chance.
- *Weak*: split-half reliability below 1/3, so that two thirds of the differences that members are ranked by are noise.
  As ``reliability = Q / (Q + noise^2/spread^2)``, it is 1/2 with ``noise^2/spread^2`` prompts.
- *Fell*: the held-out score is below the best before it by 3 standard deviations of the members' scores. A center that
  moved by no more than a perturbation would be there once in 700 generations if scores were normal.
- *Falls while training rises*: three falls in a row, which is 1 of 24 orders of four scores, while the mean training
  score of the generations in between rose from their first half to their second by 2 standard errors.
- *Turning back*: the mean cosine of the last ten updates is below -0.2 and below 0 by 3 standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.core.config import ESConfig
from eggroll.core.signal import Components
from eggroll.run.console import number
from eggroll.run.keeping import Standing

FIRST = 3
"""Generations after which the signal is looked at first."""
WINDOW = 10
"""Generations that are looked at together later."""
ROWS = 8
"""Pairs or members that a verdict needs at least."""
SIGNIFICANT = 1.645
WEAK = 1 / 3
FELL = 3.0
SMALLER = 0.3
"""The factor that is advised for a learning rate that is too large."""


@dataclass
class Signs:
    """Looks at each generation of a run. It tells the same of the same numbers, and changes nothing.

    Args:
        config: the algorithm's settings.
        start: generations that were done before; the first look is not repeated.
    """

    config: ESConfig
    start: int = 0
    _sum: Components | None = None
    _seen: int = 0
    _verdict: str = ""
    _silent: int = 0
    """Windows in a row without signal."""
    _said: set[str] = field(default_factory=set)

    def measure(self, fitness: NDArray[np.floating[Any]]) -> dict[str, float]:
        """The numbers of a generation for the log, from ``(N,)`` or ``(N, Q)`` scores; empty with one prompt."""
        found = Components.of(fitness, antithetic=self.config.antithetic)
        self._seen += 1
        if found is None:
            return {}
        if self._sum is not None and self._sum.prompts != found.prompts:
            self._sum = None  # the last, smaller batch of a data set
        self._sum = found if self._sum is None else self._sum + found
        return found.metrics()

    def texts(self, history: Sequence[Mapping[str, Any]], standing: Standing) -> list[str]:
        """What is to be said after the generation that is last in ``history``."""
        found = [
            self._signal(),
            self._fell(history, standing),
            self._parting(history, standing),
            self._turning(history),
        ]
        return [text for text in found if text]

    def _signal(self) -> str:
        first = not self._verdict and self.start < FIRST
        if self._seen < (FIRST - self.start if first else WINDOW) or self._sum is None or self._sum.rows < ROWS:
            return ""
        pooled, seen = self._sum, self._seen
        self._sum, self._seen = None, 0
        verdict = "none" if pooled.z < SIGNIFICANT else "weak" if pooled.reliability < WEAK else "good"
        before, self._verdict = self._verdict, verdict
        self._silent = self._silent + 1 if verdict == "none" else 0
        if first:
            self._said.add(verdict)
            return {"none": self._no_signal, "weak": self._weak, "good": self._good}[verdict](pooled, seen)
        if verdict == "none" and self._silent == 2 and self._once("none"):
            return self._no_signal(pooled, seen)
        if verdict != "none" and before == "none" and "none" in self._said and self._once("good"):
            return self._good(pooled, seen)
        return self._weak(pooled, seen) if verdict == "weak" and before == "good" and self._once("weak") else ""

    def _once(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new

    def _fell(self, history: Sequence[Mapping[str, Any]], standing: Standing) -> str:
        """The held-out score fell further than perturbations of the center do."""
        spreads = [line["fitness_std"] for line in history[:FIRST] if line.get("fitness_std")]
        if len(standing.scores) < 2 or not spreads or standing.scores[-1][0] != history[-1]["generation"]:
            return ""
        generation, now = standing.scores[-1]
        when, best = max(standing.scores[:-1], key=lambda one: one[1])
        times = (best - now) / (math.fsum(spreads) / len(spreads))
        if times < FELL or not self._once("fell"):
            return ""
        since = "before training" if when == 0 else f"after generation {when}"
        return (
            f"held-out fell to {number(now)} after generation {generation}, from {number(best)} {since}: {times:.0f} "
            "times the spread between members, so sigma or lr is too large. Try a smaller lr, such as "
            f"{self._smaller()}"
        )

    def _parting(self, history: Sequence[Mapping[str, Any]], standing: Standing) -> str:
        """Held-out scores fall while training scores rise."""
        scores = standing.scores[-4:]
        if len(scores) < 4 or scores[-1][0] != history[-1]["generation"] or "fell" in self._said:
            return ""
        first, last = scores[0][0], scores[-1][0]
        means = [
            line["fitness_mean"] for line in history if first < line["generation"] <= last and "fitness_mean" in line
        ]
        if len(means) < 4 or any(one[1] <= other[1] for one, other in pairwise(scores)):
            return ""
        half = len(means) // 2
        early, late = np.asarray(means[:half]), np.asarray(means[-half:])
        error = math.sqrt((early.var(ddof=1) + late.var(ddof=1)) / half)
        if late.mean() - early.mean() <= 2 * error or not self._once("parting"):
            return ""
        return (
            f"held-out falls while training rises: {number(scores[0][1])} to {number(scores[-1][1])} from generation "
            f"{first} to {last}, and {number(early.mean())} to {number(late.mean())}. The model learns these "
            f"prompts more than the task: use more different ones, anchored weight decay, or stop here"
        )

    def _turning(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Updates take back what the ones before did."""
        cosines = np.asarray([line["update_cosine"] for line in history[-WINDOW:] if "update_cosine" in line])
        if len(cosines) < WINDOW:
            return ""
        mean, error = float(cosines.mean()), float(cosines.std(ddof=1)) / math.sqrt(WINDOW)
        if mean > -0.2 or mean > -3 * error or not self._once("turning"):
            return ""
        return (
            f"each update takes back a part of the one before (cosine {mean:.2f}, mean of {WINDOW} generations): lr is "
            f"too large. Try a smaller one, such as {self._smaller()}"
        )

    def _smaller(self) -> str:
        return f"{self.config.lr * SMALLER:.2g}"

    def _no_signal(self, pooled: Components, seen: int) -> str:
        return (
            f"no signal to be seen in {seen} generations: members' scores differ no more than the noise between "
            f"{pooled.prompts} prompts explains (a single score varies by {number(pooled.noise)}). Unless this is "
            f"the best there is, use more prompts per generation, a larger sigma or a larger population"
        )

    def _weak(self, pooled: Components, seen: int) -> str:
        times = pooled.noise / pooled.spread
        return (
            f"weak signal in {seen} generations: the noise between prompts is {times:.2g} times the spread "
            f"between members. Use more prompts per generation than {pooled.prompts} (about "
            f"{2 ** math.ceil(2 * math.log2(times))}), a larger sigma or a larger population"
        )

    def _good(self, pooled: Components, seen: int) -> str:
        return (
            f"there is signal: members' scores agree between halves of the prompts (reliability "
            f"{pooled.reliability:.2f})"
        )
