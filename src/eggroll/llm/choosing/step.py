"""The learning rate from the size of a step: a fraction of sigma per entry, whatever the population's size.

The estimate is ``g = (1/N) sum_p s_p E_p``, and an entry of ``E_p`` has unit variance. With ``w`` the weights of the
directions (``s_2k - s_2k+1`` of a pair, which has one direction; ``s_p`` of a member of its own), an entry of ``g`` has
the standard deviation

    G = sqrt(sum w^2) / N

For centered ranks of N independent scores that is 0.29/sqrt(N). A step of SGD is ``lr * g``, so that one of the
standard deviation ``c * sigma`` takes ``lr = c * sigma / G``. With prompts that disagree about the members the weights
are smaller, and so is the step: what is noise is not blown up.

Most of a step is noise, as there are far more entries than members, and steps of noise add up like a random walk: after
T generations with the decay ``d_t`` the center is ``c * sigma * sqrt(sum d_t^2)`` away from where the signal alone
would have taken it. Members at twice sigma still behave (``MARGIN`` of :mod:`eggroll.llm.choosing.calibrate`), which
leaves 1.7 sigma for it. So ``c = REACH / sqrt(sum d_t^2)``, but at most ``LARGEST``: longer runs take smaller steps.
"""

from __future__ import annotations

import math

import numpy as np

from eggroll.core.config import ESConfig

REACH = 1.5
"""How far the noise of all steps together may take the center, in units of sigma."""
LARGEST = 0.5
"""Of a step's standard deviation per entry, in units of sigma."""
DRAWS = 16
"""Imagined generations that the size of an estimate is averaged over."""


def relative_step(config: ESConfig) -> float:
    """The standard deviation of the first step's entries in units of sigma, ``c`` above.

    Steps with the same noise (``noise_reuse``) point the same way, so that k of them are one of k times the size.
    """
    schedule = config.lr_at
    decays = [schedule(generation) / schedule(0) for generation in range(config.generations)] or [1.0]
    walk = math.sqrt(config.noise_reuse * sum(decay**2 for decay in decays))
    return min(LARGEST, REACH / max(walk, 1e-9))


def estimate_size(config: ESConfig, deviation: float = 1.0) -> float:
    """The standard deviation of an entry of the estimate, ``G`` above, for scores that are independent.

    Args:
        config: the settings; population, shaping, groups and elite count.
        deviation: standard deviation of the scores, on which raw ones depend.
    """
    random = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        weights = np.asarray(config.shape(deviation * random.standard_normal(config.population_size)), np.float64)
        if config.antithetic and len(weights) == config.population_size:
            weights = weights[0::2] - weights[1::2]
        found.append(float(np.sum(weights**2)) / config.population_size**2)
    return math.sqrt(float(np.mean(found)))


def learning_rate(config: ESConfig, deviation: float = 1.0) -> float:
    """The learning rate of the first generation for a step of :func:`relative_step`.

    With momentum, steps of one direction add up to ``1 / (1 - momentum)`` of them. Adam's are of the size ``lr``.

    Args:
        config: the settings, ``sigma``, ``generations`` and the schedule among them; its ``lr`` only has to be above 0.
        deviation: as for :func:`estimate_size`.
    """
    step = relative_step(config) * config.sigma
    if config.optimizer in ("adam", "adamw"):
        return rounded(step)
    size = estimate_size(config, deviation)
    if not (math.isfinite(size) and size > 0):
        return rounded(step)
    return rounded(step / size * ((1 - config.momentum) if config.optimizer == "momentum" else 1.0))


def rounded(value: float) -> float:
    """Two digits, which are all that is known."""
    return float(f"{value:.2g}")
