"""The update of the integer model: from fitness to steps of one (EGGROLL section 6.1, appendices H and I).

    F_p = sign(s_2p - s_2p+1)                       Z = sum_p F_p A_p^T B_p           (int32, a GEMM over all pairs)
    w   = I8(w + sign(Z)) where |Z| >= Phi^-1(1 - alpha / 2) std(Z)                   alpha_t = alpha / (decay t + 1)

If fitness were independent of the noise, Z would have mean 0 and a standard deviation of ``256 sqrt(r sum F^2)`` (two
draws of standard deviation 16), so a share alpha of the weights would move: a two-sided z-test of each weight.

Momentum, which the paper leaves open, tests an int32 accumulator of Z instead, in units of 1/256 standard deviation:
``m = m - m / 2^k + 256 Z / std(Z)``, with the standard deviation ``256 sqrt(sum_j (1 - 2^-k)^(2 j))`` of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eggroll.pretrain.engines.base import MOMENTUM_ONE, Step
from eggroll.pretrain.model.fixed_point import FIXED_POINT, LIMIT, ONE, i8, threshold_sixteenths
from eggroll.pretrain.model.shape import Parameter

Shaping = Literal["sign", "normalized"]


def shape_pairs(fitness: NDArray[np.integer[Any]], shaping: Shaping = "sign") -> NDArray[np.int8]:
    """The weight of each antithetic pair, in sixteenths: ``(P,)`` int8 from ``(2 P,)`` scores.

    Args:
        fitness: whole numbers; those of the members ``2k`` (sign +1) and ``2k + 1`` (sign -1) are neighbors.
        shaping: ``sign`` (16, 0 or -16), or ``normalized``: the difference over the root of its mean square.
    """
    scores = np.asarray(fitness, np.int64).reshape(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    if shaping == "sign":
        return (ONE * np.sign(difference)).astype(np.int8)
    square = int((difference * difference).sum())
    root = max(1, math.isqrt(square // max(1, len(difference))))
    return i8((2 * ONE * difference + root) // (2 * root))


def alpha_at(generation: int, alpha: float = 1.0, decay: float = 0.015) -> float:
    """``alpha / (decay t + 1)``: the share of weights that would move if fitness were noise."""
    return alpha / (decay * generation + 1.0)


def make_step(
    pairs: NDArray[np.int8],
    alpha: float,
    rank: int,
    *,
    generation: int = 0,
    momentum_shift: int = 0,
    sign_of_noise: bool = False,
) -> Step:
    """The threshold of an update.

    Args:
        pairs: ``(P,)`` weights from :func:`shape_pairs`.
        alpha: share of weights to move.
        rank: of the perturbations.
        generation: how many updates the momentum holds already.
        momentum_shift: ``k`` above; 0 is no momentum.
        sign_of_noise: whether only the signs of draws count, times 16.
    """
    root = math.isqrt(rank * int((pairs.astype(np.int64) ** 2).sum()))  # 16 sqrt(r sum F^2)
    threshold = threshold_sixteenths(alpha)  # in sixteenths, which the 16 in the root takes out
    if not momentum_shift:
        return Step(threshold * root, max(1, ONE * root), 0, sign_of_noise)
    kept = (1.0 - 2.0**-momentum_shift) ** 2
    deviation = math.sqrt((1.0 - kept ** (generation + 1)) / (1.0 - kept))
    limit = threshold * int(MOMENTUM_ONE // ONE * deviation)
    return Step(limit, max(1, ONE * root), momentum_shift, sign_of_noise)


def sum_of_draws(
    parameter: Parameter,
    draws: NDArray[np.int8],
    pairs: NDArray[np.int8],
    *,
    sign_of_noise: bool = False,
) -> NDArray[np.int32]:
    """Z of one parameter, in its shape: ``sum_p I8((F_p A_p) >> 4)^T B_p``, int32.

    Args:
        parameter: whose.
        draws: ``(P, rank, inputs + outputs)`` int8, first B, then A.
        pairs: ``(P,)`` int8 in sixteenths, F.
        sign_of_noise: whether only the signs of draws count, times 16.
    """
    wide = draws.astype(np.int32)
    if sign_of_noise:
        wide = ONE * np.sign(wide)
    b = wide[..., : parameter.inputs].reshape(-1, parameter.inputs)
    a = i8((pairs[:, None, None] * wide[..., parameter.inputs :]) >> FIXED_POINT).astype(np.int32)
    a = a.reshape(-1, parameter.outputs)
    if parameter.kind == "vector":
        return (a * b).sum(axis=0, dtype=np.int32)
    left, right = (b, a) if parameter.kind == "embedding" else (a, b)
    return left.T @ right


def move(weights: NDArray[np.int8], z: NDArray[np.int32], step: Step, momentum: NDArray[np.int32] | None) -> int:
    """Move ``weights`` (and ``momentum``) in place by one parameter's sum; returns how many weights have moved."""
    total = z.astype(np.int64)
    if step.momentum_shift:
        assert momentum is not None, "momentum_shift asks for momentum"
        normalized = (2 * MOMENTUM_ONE * total + step.unit) // (2 * step.unit)
        total = momentum - ((momentum.astype(np.int64) + (1 << (step.momentum_shift - 1))) >> step.momentum_shift)
        total += normalized
        momentum[...] = total
    steps = np.sign(total) * (np.abs(total) >= step.limit)
    moved = np.clip(weights + steps, -LIMIT, LIMIT).astype(np.int8)
    count = int((moved != weights).sum())
    weights[...] = moved
    return count


def update(
    params: dict[str, NDArray[np.int8]],
    parameters: tuple[Parameter, ...],
    draws: Mapping[str, NDArray[np.int8]],
    pairs: NDArray[np.int8],
    step: Step,
    momentum: dict[str, NDArray[np.int32]] | None = None,
) -> int:
    """A whole update in NumPy, in place: what the engines must equal. Returns how many weights have moved."""
    moved = 0
    for p in parameters:
        z = sum_of_draws(p, draws[p.name], pairs, sign_of_noise=step.sign_of_noise)
        moved += move(params[p.name], z, step, None if momentum is None else momentum[p.name])
    return moved
