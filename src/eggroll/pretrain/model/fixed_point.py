"""The number format of the integer model: constants, clipping, divisors and tables (EGGROLL appendix G).

A weight or an activation is an int8 with four fractional bits: 16 stands for 1.0, and the largest value, 127, for 7.94.
Sums are int32; every division and every right shift rounds towards minus infinity, as ``>>`` does.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIXED_POINT = 4
"""Fractional bits of weights, activations, logits (in bits of information) and noise."""
ONE = 1 << FIXED_POINT
"""1.0."""
LIMIT = 127
"""Largest magnitude; -128 is never used, so that a sign can always be flipped."""
GATE_BITS = 8
"""A gate is ``f + 127`` in 0..254 out of 2^8, so that it never opens or closes altogether."""
LOGIT_OFFSET = 128
"""Added to a logit, so that it can be the index of a table: 1..255."""
NORMAL_BITS = 16
"""Random bits that make one int8 normal."""


def i8(x: NDArray[Any]) -> NDArray[np.int8]:
    """Clip to -127..127: the only nonlinearity of the model."""
    return np.clip(x, -LIMIT, LIMIT).astype(np.int8)


def divisor(inputs: int) -> int:
    """What the int32 sum of a product with ``inputs`` inputs is divided by: ``16 sqrt(n)``, to the nearest integer.

    The 16 takes one of the two fixed-point factors out again, ``sqrt(n)`` keeps the spread of the sum that of its
    terms. For widths that are powers of four it is a power of two, and the division a shift. For other widths
    ``16 sqrt(n)`` is no integer or no power of two; rounding it scales products by at most 0.5 / 16 (n = 1) and by
    less than 0.4 % from n = 64 on. ``16 sqrt(n)`` is never half-way between two integers, so this is exact.
    """
    squared = ONE * ONE * inputs
    root = math.isqrt(squared)
    return root + (squared > root * (root + 1))  # (root + 1/2)^2 = root (root + 1) + 1/4


@functools.cache
def exp2_table() -> NDArray[np.int32]:
    """``EXP2[i] = 16 * 2^(i / 16)`` for ``i`` in 0..255, to the nearest integer: ``(256,)`` int32, up to 1004120."""
    return np.array([round(ONE * 2 ** (i / ONE)) for i in range(256)], np.int32)


@functools.cache
def log2_thresholds() -> NDArray[np.int32]:
    """The table of :func:`log2_sixteenths`: entry ``j - 1`` is the smallest int32 of which the result is ``j``.

    ``(416,)``: results to 416 are for sums below 2^30; 256 terms of ``EXP2`` are below 2^28.
    """
    return np.array([math.ceil(ONE * 2 ** ((j - 0.5) / ONE)) for j in range(1, 417)], np.int32)


def log2_sixteenths(total: NDArray[np.int32]) -> NDArray[np.int32]:
    """``16 log2(total / 16)`` to the nearest integer, for ``total`` of at least 16: sixteenths of a bit.

    A table with an entry per sum, as in the paper, would have 2^28 of them. The function takes 416 values only, so the
    sums at which it steps are table enough.
    """
    return np.searchsorted(log2_thresholds(), total, side="right").astype(np.int32)


@functools.cache
def normal_table() -> NDArray[np.int8]:
    """``(65536,)`` int8: the normal that 16 random bits stand for, ``round(16 N(0, 1))``.

    Value ``v`` fills the entries from ``round(65536 Phi((v - 1/2) / 16))`` to that of ``v + 1``: an inverse
    distribution function, exact to 2^-17 in probability and symmetric. The largest value is 69 (4.3 standard
    deviations). Made of integers from here on, so that every implementation draws the same noise.
    """
    size = 1 << NORMAL_BITS
    ends = [round(size * NormalDist().cdf((v + 0.5) / ONE)) for v in range(-LIMIT, 0)]  # up to -1, the rest mirrored
    counts = np.diff([0, *ends])
    middle = size - 2 * int(counts.sum())
    values = np.arange(-LIMIT, LIMIT + 1, dtype=np.int8)
    return np.repeat(values, [*counts, middle, *counts[::-1]])


def threshold_sixteenths(alpha: float) -> int:
    """``I32(16 * Phi^-1(1 - alpha / 2))``: how many sixteenths of a standard deviation a share ``alpha`` exceeds.

    0 for ``alpha`` of 1, where every parameter with a nonzero sum moves; at most 131 (8.2 standard deviations).
    """
    if alpha >= 1.0:
        return 0
    return int(ONE * NormalDist().inv_cdf(min(1.0 - alpha / 2.0, 1.0 - 2.0**-53)))
