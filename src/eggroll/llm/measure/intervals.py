"""95 % confidence intervals for scores of held-out answers.

    right or wrong, one model      Wilson's score interval (Wilson 1927), right also for 0 of n and n of n
    right or wrong, two models     Newcombe's paired interval (Newcombe 1998, Stat. Med. 17:2635, method 10), and
                                   McNemar's exact test
    any score                      bootstrap of the mean over problems (BCa: bias-corrected, accelerated; Efron
                                   1987), and at least Student's t; for two models that of each problem's difference,
                                   which is the narrower
    any score, under 16 problems   Wilson's interval of the mean as a part of the range. Nothing varies more than scores
                                   at the two ends of their range, so it is right for any, and wide; resampling 8
                                   differences that are 0 on average would call every fifth pair of models different
    any score, no spread           a bootstrap of equal numbers would claim certainty; 0 of n have another score, so at
                                   most Wilson's bound for 0 of n do, and theirs is at worst the least or the most

The intervals are for what the model would score on more problems of the same kind; they do not cover a run's own
chance, for which several runs with different seeds are needed.

Bootstrap, t and the exact test are SciPy's. It has no paired interval of proportions, and its Wilson interval takes
whole counts only, where parts of a range are not whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["FEW", "Interval", "mcnemar", "mean_interval", "paired_proportions", "wilson"]

FEW = 16
"""Below so many problems the mean of any scores has the interval of a proportion."""
RESAMPLES = 10_000
_BLOCK = 500  # resamples drawn together, so that a thousand problems need megabytes
Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its 95 % interval, and how they were found."""

    value: float
    low: float
    high: float
    method: str


def wilson(count: float, total: int) -> Interval:
    """The interval of a proportion: ``count`` of ``total``."""
    p = count / total
    center = (p + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    return Interval(p, max(0.0, min(p, center - half)), min(1.0, max(p, center + half)), "Wilson")


def mean_interval(scores: NDArray[np.float64], low: float, high: float, *, seed: int) -> Interval:
    """The interval of the mean of ``scores (n,)``, each between ``low`` and ``high``.

    Args:
        scores: one per problem, or one difference per problem.
        low: the least that a score can be.
        high: the most that a score can be.
        seed: of the resampling.
    """
    mean = float(scores.mean())
    if np.ptp(scores) == 0:
        others = wilson(0, len(scores)).high
        return Interval(mean, mean - (mean - low) * others, mean + (high - mean) * others, "Wilson, no spread")
    if len(scores) < FEW:
        part = wilson(float((scores - low).sum()) / (high - low), len(scores))
        bounds = [low + (high - low) * bound for bound in (part.low, part.high)]
        return Interval(mean, min(mean, bounds[0]), max(mean, bounds[1]), "Wilson, of the range")
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((scores,), np.mean, n_resamples=RESAMPLES, batch=_BLOCK, method="BCa", rng=rng)
    down, up = found.confidence_interval
    t_low, t_high = stats.t.interval(0.95, len(scores) - 1, loc=mean, scale=stats.sem(scores))
    least, most = max(low, min(t_low, down)), min(high, max(t_high, up))
    return Interval(mean, float(least), float(most), "bootstrap (BCa)")


def paired_proportions(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Interval:
    """The interval of how much more often ``after (n,)`` is true than ``before (n,)``, problem by problem."""
    n = len(before)
    both, gained, lost, neither = (
        int(np.sum(pair)) for pair in (after & before, after & ~before, ~after & before, ~after & ~before)
    )
    one, two = wilson(both + gained, n), wilson(both + lost, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = both * neither - gained * lost
    # Newcombe's continuity correction of the correlation, for positive ones.
    corrected = max(product - n / 2, 0.0) if product > 0 else product
    phi = corrected / math.sqrt(margins) if margins else 0.0
    difference = one.value - two.value
    down = _hypotenuse(one.value - one.low, two.high - two.value, phi)
    up = _hypotenuse(one.high - one.value, two.value - two.low, phi)
    return Interval(difference, max(-1.0, difference - down), min(1.0, difference + up), "Newcombe, paired")


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value of McNemar's test: the problems whose answer changed are a fair coin's throws."""
    n = gained + lost
    return float(stats.binomtest(gained, n).pvalue) if n else 1.0


def _hypotenuse(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
