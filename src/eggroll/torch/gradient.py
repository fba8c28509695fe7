"""The estimate ``es_gradient = (1/N) sum_p s_p E_p``, streamed over members in float32 with bounded memory.

A matrix's sum is one product over stacked factors, ``(diag(w) A)^T`` of shape ``(m, K r)`` times ``(K r, n)``. It is
never the product of two sums: ``(sum s A)(sum s B)^T`` has the cross terms ``s_p s_q A_p B_q^T`` and rank ``r``, where
the estimate has rank ``min(K r, m, n)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.core.select import ParameterSpec
from eggroll.torch.noise import Noise


def pair_weights(shaped_fitness: NDArray[np.float32], *, antithetic: bool) -> NDArray[np.float32]:
    """Weight of each draw ``(K,)``: ``s_{2k} - s_{2k+1}`` with antithetic pairs, ``s_p`` otherwise."""
    weights = np.asarray(shaped_fitness, dtype=np.float32)
    return weights[0::2] - weights[1::2] if antithetic else weights


def es_gradient(
    noise: Noise,
    spec: ParameterSpec,
    shaped_fitness: NDArray[np.float32],
    generation: int,
    *,
    antithetic: bool,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    """The estimate for one parameter: float32, of ``spec.estimate_shape`` (EGGROLL section 4).

    Args:
        noise: the noise that the members were drawn from.
        spec: the parameter.
        shaped_fitness: ``(N,)`` weights ``s_p``.
        generation: the generation of the noise.
        antithetic: whether members come in pairs.
        device: where to compute.
        out: a float32 buffer of that shape to write into.

    The order of the sum depends on the parameter's shape alone, so results do not depend on how members were
    evaluated. Draws whose weight is zero are left out.
    """
    weights = pair_weights(shaped_fitness, antithetic=antithetic)
    pairs = np.flatnonzero(weights)
    total = torch.zeros(spec.estimate_shape, dtype=torch.float32, device=device) if out is None else out.zero_()
    if len(pairs) == 0:
        return total
    chosen: Sequence[int] = pairs.tolist()
    if pairs[-1] - pairs[0] + 1 == len(pairs):
        chosen = range(int(pairs[0]), int(pairs[-1]) + 1)
    w_K = torch.from_numpy(weights[pairs]).to(device)
    scale = 1.0 / len(shaped_fitness)
    for part, draws in noise.chunks(spec, generation, chosen, device):
        if not spec.low_rank:
            total.view(-1).add_(draws.T @ w_K[part], alpha=scale)
            continue
        a, b = noise.factors(spec, draws)
        a = a * w_K[part].view(-1, *([1] * (a.ndim - 1)))
        _add_outer(total.view(*spec.batch_shape, *spec.matrix_shape), a, b, scale / noise.rank**0.5)
    return total


def _add_outer(total: Tensor, a_Kmr: Tensor, b_Knr: Tensor, alpha: float) -> None:
    """``total += alpha * sum_k a_k b_k^T``; with experts, one such sum per expert."""
    if total.ndim == 2:
        left = a_Kmr.permute(1, 0, 2).reshape(total.shape[0], -1)
        right = b_Knr.permute(0, 2, 1).reshape(-1, total.shape[1])
        total.addmm_(left, right, alpha=alpha)
        return
    experts, m, n = total.shape
    left = a_Kmr.permute(1, 2, 0, 3).reshape(experts, m, -1)
    right = b_Knr.permute(1, 0, 3, 2).reshape(experts, -1, n)
    total.baddbmm_(left, right, alpha=alpha)
