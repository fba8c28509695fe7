"""A dense float64 EGGROLL step that materializes everything: the one reference for every fast path.

    E_p         = sign_p * A_p B_p^T / sqrt(r)     matrices (for experts: one product per expert)
    E_p         = sign_p * N(0, 1)                 everything else
    W_p         = W + sigma * E_p
    es_gradient = (1/N) * sum_p s_p E_p            (EGGROLL section 4)
    W          <- W + lr * es_gradient             (plain SGD)

Factors are drawn in float32 (that is what every implementation draws) and used in float64 from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.core.address import dense_draw, factor_draw, member_of
from eggroll.core.select import ParameterSpec

Array = NDArray[np.float64]


def perturbation(
    spec: ParameterSpec,
    member: int,
    *,
    rank: int,
    seed: int,
    generation: int,
    antithetic: bool = True,
    noise_reuse: int = 1,
) -> Array:
    """``E_p`` of one member: float64, the parameter's shape, unit variance per entry, sign included."""
    which = member_of(member, antithetic=antithetic)
    if not spec.low_rank:
        return which.sign * dense_draw(spec, seed, generation, which.pair, noise_reuse=noise_reuse).astype(np.float64)
    a, b = factor_draw(spec, rank, seed, generation, which.pair, noise_reuse=noise_reuse)
    product = a.astype(np.float64) @ np.swapaxes(b.astype(np.float64), -1, -2)
    return (which.sign / np.sqrt(rank) * product).reshape(spec.shape)


def member_params(
    params: Mapping[str, NDArray[Any]],
    specs: Sequence[ParameterSpec],
    member: int,
    *,
    sigma: float,
    rank: int,
    seed: int,
    generation: int,
    antithetic: bool = True,
    noise_reuse: int = 1,
) -> dict[str, Array]:
    """The weights of one member, float64: perturbed where ``specs`` says so, the center elsewhere."""
    result = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    for spec in specs:
        noise = perturbation(
            spec, member, rank=rank, seed=seed, generation=generation, antithetic=antithetic, noise_reuse=noise_reuse
        )
        result[spec.name] = result[spec.name] + sigma * noise
    return result


def es_gradient(
    spec: ParameterSpec,
    shaped_fitness: Sequence[float] | NDArray[Any],
    *,
    rank: int,
    seed: int,
    generation: int,
    antithetic: bool = True,
    noise_reuse: int = 1,
) -> Array:
    """``(1/N) sum_p s_p E_p`` of one parameter, float64, summed member by member."""
    total = np.zeros(spec.shape, dtype=np.float64)
    for member, weight in enumerate(shaped_fitness):
        total += float(weight) * perturbation(
            spec, member, rank=rank, seed=seed, generation=generation, antithetic=antithetic, noise_reuse=noise_reuse
        )
    return total / len(shaped_fitness)


def sgd_step(
    params: Mapping[str, NDArray[Any]],
    specs: Sequence[ParameterSpec],
    shaped_fitness: Sequence[float] | NDArray[Any],
    *,
    lr: float,
    rank: int,
    seed: int,
    generation: int,
    antithetic: bool = True,
    noise_reuse: int = 1,
) -> dict[str, Array]:
    """All parameters after one plain SGD step, float64."""
    result = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    for spec in specs:
        result[spec.name] = result[spec.name] + lr * es_gradient(
            spec,
            shaped_fitness,
            rank=rank,
            seed=seed,
            generation=generation,
            antithetic=antithetic,
            noise_reuse=noise_reuse,
        )
    return result
