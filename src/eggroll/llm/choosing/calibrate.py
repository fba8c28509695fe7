"""Which sigma: half of the largest at which members still behave, found by a few evaluations.

The same members (the same noise addresses) answer the same prompts at several sigmas, a factor of 2 apart. At each of
them the scores ``f[p, q]`` of member p on prompt q say two things.

*Whether members behave.* Their mean falls short of the center's by ``drop``. The unit is what there is to lose: the
distance ``center - broken`` from the center's score to that of members at a sigma that breaks every text. Where that
distance cannot be told from 0 (scores of 0 everywhere, or nonsense that scores better), the score does not say which
text is broken, and sigma stays near its start. Half of the largest, because members of later generations carry the
noise of all steps as well: up to 1.5 sigma of it (:mod:`eggroll.llm.choosing.step`), with their own
``sqrt(1 + 1.5^2) = 1.8`` sigma.

*Whether they differ.* Half the difference within a pair, ``d[k, q] = (f[2k, q] - f[2k+1, q]) / 2``, has a variance
between pairs and one between prompts within a pair (a one-way layout):

    between = var_k(mean_q d) - residual / Q        residual = mean_k var_q(d)
    noise   = residual / Q

An update learns from what is between; the noise is what more prompts would average away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.core.signal import Components
from eggroll.lifecycle.kind import Progress
from eggroll.loop import Evaluation

MEMBERS = 16
"""Members that are evaluated at each sigma."""
BROKEN = 16.0
"""Times the start: a sigma at which every text is broken."""
MOST_LOST = 0.5
"""Of the distance to what broken text scores, what members may lose on average."""
MOST_DEVIATIONS = 4.0
"""Of the members' scores, that they may lose on average: beyond it, what differs is mostly how broken they are."""
FIRST = 4
"""Members that are looked at first: where these have lost far too much, the others would only take time."""
LEAST = 8
"""Members that are evaluated where time is short."""
FAR = 1.5
"""Times ``MOST_LOST``: far too much."""
MARGIN = 2.0
"""Times the chosen sigma: where members still have to behave, if that was tried."""
UP, DOWN = 3, 5
"""Doublings and halvings of the start at most."""
TINY = 1e-6
"""Times the start: members that are the center, but for rounding."""

Evaluate = Callable[[float, range], Evaluation]
"""Scores of some members at a sigma."""


@dataclass(frozen=True)
class Level:
    """What was measured at one sigma.

    Attributes:
        sigma: the standard deviation of the perturbations.
        mean: of all scores.
        deviation: standard deviation of the members' scores.
        between: of half the differences within pairs, the standard deviation that is not noise.
        noise: the standard deviation that comes from the choice of prompts.
        members: that were evaluated.
        seconds: for one member.
    """

    sigma: float
    mean: float
    deviation: float
    between: float
    noise: float
    members: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what follows from it.

    Attributes:
        sigma: the choice.
        center: mean score of the model as it is, on these prompts.
        broken: mean score of broken text; ``None`` if nothing had to be chosen.
        levels: by sigma.
        members: evaluated at each sigma, at most.
        prompts: that they answered.
        seconds: that all of it took.
        reason: in words.
        warning: what a person should know; empty if there is nothing.
    """

    sigma: float
    center: float
    broken: float | None
    levels: tuple[Level, ...]
    members: int
    prompts: int
    seconds: float
    reason: str
    warning: str = ""

    @property
    def chosen(self) -> Level:
        """What was measured at the choice, or next to it."""
        return nearest(self.levels, self.sigma)

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def nearest(levels: Iterable[Level], sigma: float) -> Level:
    """What was measured at a sigma, or next to it."""
    return min(levels, key=lambda level: abs(math.log(level.sigma / sigma)))


def starting_sigma(shapes: list[tuple[int, int]], largest: float = math.inf) -> float:
    """A quarter of the size that weights of these shapes have: ``1 / sqrt(n)`` for n inputs, by number of entries.

    Args:
        shapes: ``(m, n)`` of the matrices that are evolved.
        largest: bound of the result.
    """
    entries = sum(m * n for m, n in shapes)
    if not entries:
        return min(0.01, largest)
    logarithm = sum(m * n * math.log(n) / 2 for m, n in shapes) / entries
    return min(float(f"{0.25 * math.exp(-logarithm):.1g}"), largest)


def calibrate(
    evaluate: Evaluate,
    members: int,
    start: float,
    *,
    only_start: bool = False,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda doing, found: None,
) -> Calibration:
    """Try sigmas from ``start`` upwards while members behave, or downwards until they do.

    Args:
        evaluate: scores members ``(len(members),)`` or ``(len(members), prompts)`` at a sigma, always on the same
            prompts and with the same noise.
        members: how many, an even number of at least 2.
        start: the first sigma.
        only_start: sigma is given, and only measured.
        seconds: that this may take, roughly: when they are over, no larger sigma is tried, and no more than
            ``LEAST`` members at each.
        clock: what the time is.
        progress: told of each sigma before and after it is tried.
    """
    return _Search(evaluate, members, start, seconds, clock, progress).run(only_start=only_start)


class _Search:
    def __init__(
        self, evaluate: Evaluate, members: int, start: float, seconds: float, clock: Callable[[], float],
        progress: Progress,
    ) -> None:  # fmt: skip
        self.evaluate, self.members, self.start, self.clock = evaluate, members, start, clock
        self.progress, self.found = progress, ""
        self.began = clock()
        self.end = self.began + seconds
        self.levels: dict[float, Level] = {}
        self.prompts = 1
        self.distance = math.inf
        """What there is to lose; infinite where that is not known."""
        self.early = False
        """Whether the time was over before a sigma was broken."""

    def run(self, *, only_start: bool) -> Calibration:
        self.progress("evaluating the model as it is", "")
        first = self.evaluate(self.start * TINY, range(2))
        self.numbers = bool(np.isfinite(np.asarray(first.fitness, dtype=np.float64)).any())
        center = scores_of(first)
        self.prompts, self.center = center.shape[1], float(center.mean())
        self.nothing = not center.any()
        self.found = f"the model as it is: mean score {self.center:.3g} on {self.prompts} prompts"
        broken: float | None = None
        if only_start:
            sigma, reason, warning = self.start, "given", ""
            self.level(sigma)
        else:
            self.progress(f"evaluating text that is broken, sigma {self.start * BROKEN:g}", self.found)
            apart = center - scores_of(self.evaluate(self.start * BROKEN, range(2)))
            broken = self.center - float(apart.mean())
            self.found = f"broken text (sigma {self.start * BROKEN:g}): mean score {broken:.3g}"
            sigma, reason, warning = self._choose(apart.mean(axis=0), broken)
        self.progress("", self.found)
        levels = tuple(sorted(self.levels.values(), key=lambda level: level.sigma))
        seconds = self.clock() - self.began
        return Calibration(
            sigma, self.center, broken, levels, self.members, self.prompts, seconds, reason, warning
        )  # fmt: skip

    def _choose(self, apart: NDArray[np.float64], broken: float) -> tuple[float, str, str]:
        """Sigma, the reason and a warning, from how far broken text is from the center on each prompt."""
        # The prompts are the same ones, so their differences say how well the distance is known.
        doubt = float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        distance = float(apart.mean())
        if distance > max(doubt, 1e-9 * max(1.0, abs(self.center))):
            self.distance = distance
            largest = sigma = self._while_behaving()
            lost = (self.center - self.level(largest).mean) / distance
            if self.behaves(largest):
                sigma = largest if self.early and largest == self.start else largest / MARGIN
                at = f" at {largest:g}" if sigma != largest else ""
                reason = (
                    f"members{at} score {max(0.0, lost):.0%} of the way down from the model ({self.center:.3g}) to "
                    f"broken text ({broken:.3g}); the limit is {MOST_LOST:.0%}"
                )
                if self.clock() < self.end:
                    self.level(sigma)
                if self.early:
                    reason += f"; no larger one was tried, as the {self.end - self.began:.3g} s for choosing were over"
            else:
                reason = (
                    f"the smallest one tried; members lose {lost:.0%} of the model's lead over broken text even there"
                )
        else:
            sigma = self._near_start()
            reason = (
                f"from the size of the weights, as the score does not tell broken text ({broken:.3g}) from the "
                f"model's own ({self.center:.3g})"
            )
        return sigma, reason, self._warning(sigma, broken, distance < -2 * doubt)

    def level(self, sigma: float, left: int = 0) -> Level:
        """What is measured at a sigma, after which at most ``left`` others are tried."""
        if sigma not in self.levels:
            self.progress(f"trying sigma {sigma:g}, {f'at most {left} more' if left else 'the last one'}", self.found)
            began, first = self.clock(), min(FIRST, self.members)
            scores = scores_of(self.evaluate(sigma, range(first)))
            now = self.clock()
            fit = first * (self.end - now) / max(now - began, 1e-9)
            members = min(self.members, max(LEAST, first + 2 * int(min(fit, MEMBERS) / 2)))
            if first < members and self.center - scores.mean() <= FAR * MOST_LOST * self.distance:
                scores = np.concatenate([scores, scores_of(self.evaluate(sigma, range(first, members)))])
            between, noise = components(scores)
            self.levels[sigma] = Level(
                sigma, float(scores.mean()), float(scores.mean(axis=1).std()), between, noise, len(scores),
                (self.clock() - began) / len(scores),
            )  # fmt: skip
            self.found = f"sigma {sigma:g}: mean score {scores.mean():.3g} of {len(scores)} members"
        return self.levels[sigma]

    def behaves(self, sigma: float, left: int = 0) -> bool:
        level = self.level(sigma, left)
        lost = self.center - level.mean
        return lost <= MOST_LOST * self.distance and lost <= MOST_DEVIATIONS * level.deviation

    def _while_behaving(self) -> float:
        sigma, tried = self.start, 0
        if self.behaves(sigma, max(UP, DOWN)):
            while tried < UP and self.clock() < self.end and self.behaves(2 * sigma, UP - tried - 1):
                sigma, tried = 2 * sigma, tried + 1
            self.early = tried < UP and 2 * sigma not in self.levels
        else:
            while tried < DOWN and not self.behaves(sigma, DOWN - tried):
                sigma, tried = sigma / 2, tried + 1
        return sigma

    def _near_start(self) -> float:
        tries = (self.start, 2 * self.start, self.start / 2)
        varied = (sigma for left, sigma in zip((2, 1, 0), tries, strict=True) if self.level(sigma, left).deviation > 0)
        return next(varied, self.start)

    def _warning(self, sigma: float, broken: float, nonsense: bool) -> str:
        if not self.numbers:
            return (
                "not one score of the model's own answers is a number: the score returned None or NaN for all of them, "
                "so sigma cannot be chosen by them; a function without a return gives None"
            )
        if all(level.deviation == 0 for level in self.levels.values()):
            return (
                f"all members score the same ({self.center:.3g}) at every sigma that was tried, so there may be "
                "nothing to learn from: give partial credit in the score, or prompts that the model can sometimes do"
            )
        if nonsense:
            return (
                f"broken text scores {broken:.3g}, more than the model's own answers ({self.center:.3g}): what is "
                "learned may be nonsense. Let the score ask for what a good answer needs, too"
            )
        level = nearest(self.levels.values(), sigma)
        if self.nothing:
            return (
                f"the model itself scores 0 on all {self.prompts} prompts, so that there is only what members find by "
                f"chance to learn from (mean score {level.mean:.3g} at sigma {sigma:g}): partial credit in the score, "
                "easier prompts, or an example of a good answer in them make that more"
            )
        if level.noise > 2 * level.between:
            return (
                f"the scores' noise between prompts is {_times(level)} the spread between members: "
                "more prompts (--batch-size) or more members (-p) may be needed"
            )
        return ""


def _times(level: Level) -> str:
    return f"{level.noise / level.between:.1f} times" if level.between > level.noise / 20 else "far above"


def scores_of(evaluation: Evaluation) -> NDArray[np.float64]:
    """``(members, prompts)`` finite scores; those that are no numbers count as the worst."""
    values = np.asarray(evaluation.fitness, dtype=np.float64)
    values = values.reshape(len(values), -1)
    finite = np.isfinite(values)
    return np.where(finite, values, values[finite].min() if finite.any() else 0.0)


def components(scores: NDArray[np.float64]) -> tuple[float, float]:
    """Standard deviations of half the differences within pairs: between pairs, and by the choice of prompts.

    Args:
        scores: ``(members, prompts)``, an even number of members.
    """
    found = Components.of(scores, antithetic=True, least=1)
    if found is None:  # one prompt, whose noise cannot be told; or no differences at all
        return math.sqrt(float((((scores[0::2] - scores[1::2]) / 2).mean(axis=1) ** 2).mean())), 0.0
    return found.spread / math.sqrt(2), found.noise / math.sqrt(2 * found.prompts)  # of halves, not of 1/sqrt(2)
