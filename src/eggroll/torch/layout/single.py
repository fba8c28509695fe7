"""What the checks of a population evaluate single members with: a sigma that stands out, and plain weights."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eggroll.torch.perturbed import PerturbedWeight
from eggroll.torch.quantized.tensor import grid_of, plain

if TYPE_CHECKING:
    from eggroll.torch.members import Members

SIGMA_SHARE = 0.05
"""sigma of the check relative to the size of the weights: effects that stand out from rounding."""
PLAIN_BYTES = 2**30
"""Members are checked with plain weights if these take at most this much memory, with low-rank values otherwise."""


def sigma_for_checks(population: Members) -> float:
    """A sigma whose effect stands out from rounding: a part of the perturbed weights' size."""
    norms = [
        1.0 if spec.scale_groups else _rms(population.parameter(spec.name))
        for spec in population.specs
        if population.parameter(spec.name).numel()
    ]
    return SIGMA_SHARE * max(statistics.median(norms), 1e-6)


def _rms(parameter: Tensor) -> float:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return float(plain(parameter).detach().square().mean(dtype=wide).sqrt())


def plain_values(population: Members, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One member's weights as plain tensors, if they are small enough: what code sees that asks for their type.

    Quantized ones stay values: numbers of their own would take several times their memory.
    """
    parameters = [population.parameter(spec.name) for spec in population.specs]
    if sum(p.numel() * p.element_size() for p in parameters) > PLAIN_BYTES:
        return dict(values)
    dense = {name: v for name, v in values.items() if isinstance(v, PerturbedWeight) and grid_of(v.base) is None}
    # All of their memory first: made one after the other, they would lie between what making them takes for a moment.
    made: dict[str, Tensor] = {name: torch.empty_like(plain(v.base)) for name, v in dense.items()}
    for name, v in dense.items():
        made[name].copy_(v.dense())
    return {name: made.get(name, v) for name, v in values.items()}
