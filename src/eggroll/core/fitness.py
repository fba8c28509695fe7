"""From raw fitness to the weights of the estimate (EGGROLL section 4; Salimans et al. 2017 for centred ranks)."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Shaping = Literal["centered_rank", "normalized", "raw"]
Sampling = Literal["antithetic", "one_sided"]

VARIANCE_EPSILON = 1e-5


class NonFiniteFitnessWarning(UserWarning):
    """Some members had NaN or infinite fitness and were counted as the worst."""


def centered_rank(fitness: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Ranks scaled to [-0.5, 0.5] along the first axis; ties share their mean rank. Shape as given.

    A population of equal scores gets zeros: there is nothing to learn from it.
    """
    values = np.asarray(fitness, dtype=np.float64)
    size = values.shape[0]
    if size == 1:
        return np.zeros_like(values)
    flat = values.reshape(size, -1)
    ranks = np.empty_like(flat)
    for column in range(flat.shape[1]):
        _, inverse, counts = np.unique(flat[:, column], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks[:, column] = ((last - counts) + (last - 1))[inverse] / 2.0
    return (ranks / (size - 1) - 0.5).reshape(values.shape)


def replace_non_finite(fitness: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], int]:
    """Fitness in float64 with NaN and infinities replaced by the worst finite value, and how many there were.

    If nothing is finite, all become 0, so that the generation changes nothing.
    """
    values = np.array(fitness, dtype=np.float64)
    bad = ~np.isfinite(values)
    count = int(bad.sum())
    if count:
        worst = values[~bad].min() if count < values.size else 0.0
        values[bad] = worst
        warnings.warn(
            f"{count} of {values.size} scores were NaN or infinite; they count as the worst of the generation",
            NonFiniteFitnessWarning,
            stacklevel=3,
        )
    return values, count


def shape_fitness(
    fitness: NDArray[np.floating[Any]],
    *,
    method: Shaping = "centered_rank",
    sampling: Sampling = "antithetic",
    group_size: int = 0,
    elite_k: int = 0,
    group_std: bool = False,
) -> NDArray[np.float32]:
    """The weights ``s_p`` of the estimate ``(1/N) sum_p s_p E_p``.

    Args:
        fitness: ``(N,)`` raw scores, higher is better, or ``(N, Q)``: one score per member and prompt. With prompts,
            each is centred (or ranked) by itself and the member's weight is the mean over its prompts.
        method: ``centered_rank``: ranks in [-0.5, 0.5] within the group. ``normalized``: centred within the group,
            divided by the global ``sqrt(var + 1e-5)``. ``raw``: as given; with one-sided sampling minus the mean of
            the other members, ``f_p - mean_{q != p} f_q`` (leave-one-out, which keeps the estimate unbiased).
        sampling: how the members were drawn.
        group_size: consecutive members that are centred together; 0 means all.
        elite_k: if positive, only the k best members count, each with its margin over the best of the rest.
        group_std: with ``normalized``, divide by the standard deviation of the group instead of the global one.

    Returns:
        ``(N,)`` float32. NaN and infinite scores count as the worst of the generation, with a warning.
    """
    values, _ = replace_non_finite(fitness)
    size = values.shape[0]
    table = values.reshape(size, -1)
    groups = table.reshape(-1, group_size or size, table.shape[1])
    if method == "centered_rank":
        shaped = np.stack([centered_rank(group) for group in groups])
    elif method == "normalized":
        variance = groups.var(axis=1, keepdims=True) if group_std else table.var()
        shaped = (groups - groups.mean(axis=1, keepdims=True)) / np.sqrt(variance + VARIANCE_EPSILON)
    elif sampling == "one_sided":
        members = groups.shape[1]
        shaped = (groups - groups.mean(axis=1, keepdims=True)) * (members / max(members - 1, 1))
    else:
        shaped = groups
    weights = shaped.reshape(size, -1).mean(axis=1)
    if elite_k:
        weights = _keep_elite(weights, elite_k)
    return weights.astype(np.float32)


def _keep_elite(weights: NDArray[np.float64], elite_k: int) -> NDArray[np.float64]:
    order = np.sort(weights)[::-1]
    return np.maximum(weights - order[elite_k], 0.0)
