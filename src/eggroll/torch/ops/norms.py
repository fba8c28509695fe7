"""Rules for normalization layers: normalize without scale and shift, then apply each member's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.ops.elementwise import per_channel
from eggroll.torch.ops.registry import rule
from eggroll.torch.perturbed import Value


def _affine(x: Tensor, weight: Any, bias: Any) -> Any:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


@rule(F.layer_norm)
def layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Layer normalization over the trailing dimensions."""
    if isinstance(x, Value):
        return NotImplemented
    return _affine(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


@rule(F.rms_norm)
def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Root-mean-square normalization over the trailing dimensions."""
    if isinstance(x, Value):
        return NotImplemented
    return _affine(F.rms_norm(x, normalized_shape, None, eps), weight, None)


@rule(F.group_norm)
def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Group normalization of ``(R, C, ...)``."""
    if isinstance(x, Value):
        return NotImplemented
    out = F.group_norm(x, num_groups, None, None, eps)
    return _affine(out, per_channel(weight, x.ndim - 2), per_channel(bias, x.ndim - 2))


@rule(F.batch_norm)
def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Batch normalization with running statistics.

    Raises:
        UnsupportedOperationError: in training mode, where the statistics would mix the members.
    """
    if isinstance(x, Value):
        return NotImplemented
    if training:
        raise UnsupportedOperationError(
            "batch normalization in training mode computes statistics over all members together; call model.eval()"
        )
    out = F.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(out, per_channel(weight, x.ndim - 2), per_channel(bias, x.ndim - 2))


@rule(F.instance_norm)
def instance_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Instance normalization of ``(R, C, ...)``."""
    if isinstance(x, Value):
        return NotImplemented
    out = torch.nn.functional.instance_norm(x, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(out, per_channel(weight, x.ndim - 2), per_channel(bias, x.ndim - 2))
