"""How far two evaluations of the same member are apart, and how far rounding may take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from eggroll.torch.perturbed import Value


def relative_difference(x: Tensor, y: Tensor) -> float:
    """Largest difference relative to the largest entry of ``y``; infinite for other shapes or other NaNs."""
    if x.shape != y.shape or isinstance(x, Value):
        return float("inf")
    if x.numel() == 0:
        return 0.0
    same = (x == y) | (x.isnan() & y.isnan())
    x, y = x.double().masked_fill(same, 0.0), y.double()
    y_finite = y.masked_fill(~y.isfinite(), 0.0)
    difference = (x - y.masked_fill(same, 0.0)).abs().max() / y_finite.abs().max().clamp_min(1e-12)
    return float(difference.nan_to_num(float("inf")))


def tolerance(dtype: torch.dtype) -> float:
    """How far rounding may take two evaluations of the same member apart, relative to the largest entry."""
    if dtype == torch.float64:
        return 1e-8
    if dtype == torch.float32:
        return 1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-2
    return 0.1


def largest_difference(got: Any, expected: Any, precision: torch.dtype | None = None) -> tuple[float, bool]:
    """Over all tensors of two structures: the largest relative difference, and whether all are within rounding.

    ``precision`` is the narrowest dtype that outputs have passed through, if it is narrower than their own.

    Chosen tokens or indices may flip on rounding; they count only where there is nothing else, and then by majority.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(tree_flatten(got)[0], tree_flatten(expected)[0], strict=True)
        if isinstance(theirs, Tensor)
    ]
    if not all(isinstance(mine, Tensor) and mine.shape == theirs.shape for mine, theirs in pairs):
        return float("inf"), False
    floating = [(mine, theirs) for mine, theirs in pairs if theirs.is_floating_point()]
    if not floating:
        differing = [float((mine != theirs).float().mean()) for mine, theirs in pairs if theirs.numel()]
        return max(differing, default=0.0), all(share <= 0.1 for share in differing)
    differences = [
        (relative_difference(mine, theirs), max(tolerance(theirs.dtype), tolerance(precision or theirs.dtype)))
        for mine, theirs in floating
    ]
    return max(d for d, _ in differences), all(d <= allowed for d, allowed in differences)
