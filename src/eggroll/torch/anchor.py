"""Anchored weight decay (L2-SP): a pull back to the weights that the run began with, beside the pull to zero.

With the start ``theta_0`` and the strength ``c``, for ``sgd``, ``momentum``, ``adam`` and an optimizer of your own

    gradient <- gradient - c (theta - theta_0)                        coupled: the optimizer sees it

and for ``adamw``, whose ``weight_decay`` is decoupled, too,

    theta <- step(theta) - lr c (theta - theta_0)                     both differences of the theta before the step

which is the penalty ``c/2 |theta - theta_0|^2`` of Li, Grandvalet and Davoine, *Explicit Inductive Bias for Transfer
Learning with Convolutional Networks* (2018), and what arXiv 2605.30148 advises against forgetting in evolution
strategies: with plain SGD the distance from the start shrinks by ``lr c`` in each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch.quantized.tensor import grid_of


class Anchor:
    """The start weights of parameters: a copy in their own dtype, which is exact.

    A checkpoint holds no second copy of them: a run is made from its start weights, and what a checkpoint has are their
    digests, so that a run that goes on from another start is refused.

    Args:
        parameters: name to parameter, as the run begins.
        strength: ``c``.
        decoupled: whether the pull passes by the optimizer.

    Raises:
        ConfigError: a parameter is quantized.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float, *, decoupled: bool) -> None:
        quantized = [name for name, parameter in parameters.items() if grid_of(parameter) is not None]
        if quantized:
            raise ConfigError(refusal(strength, quantized))
        self.strength, self.decoupled = strength, decoupled
        self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._digests: dict[str, Tensor] = {}

    def pull(self, name: str, target: Tensor) -> Tensor:
        """``c (theta - theta_0)`` of a parameter, float32 of its shape."""
        return (target.float() - self._start[name].float()).mul_(self.strength)

    def state(self) -> dict[str, Tensor]:
        """``(32,)`` uint8 SHA-256 of each parameter's start weights."""
        if not self._digests:
            self._digests = {name: _digest(start) for name, start in self._start.items()}
        return self._digests

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare digests of a checkpoint with those of the start weights here.

        Raises:
            CheckpointError: there are none, or they are of other weights.
        """
        missing = [name for name in self._start if name not in tensors]
        if missing:
            raise CheckpointError(
                f"the checkpoint was written without anchored_weight_decay (no digest of the start of {missing[0]}); "
                "use the same settings as then"
            )
        other = [name for name, digest in self.state().items() if not torch.equal(tensors[name].cpu(), digest)]
        if other:
            raise CheckpointError(
                f"anchored_weight_decay pulls towards the weights that the run began with, and {len(other)} parameters "
                f"({other[0]}, ...) began with others here; make the model with the weights that the run began with, "
                "then load the checkpoint"
            )


def refusal(strength: float, quantized: list[str]) -> str:
    """Why there is no anchor for quantized weights."""
    return (
        f"anchored_weight_decay (={strength}) needs a copy of the start weights, and {len(quantized)} of them are "
        f"quantized ({quantized[0]}, ...), whose codes move by whole quanta, too coarse for a small pull; use "
        "anchored_weight_decay=0, or load the model with quantize='none'"
    )


def _digest(tensor: Tensor) -> Tensor:
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(hashlib.sha256(raw).digest()), dtype=torch.uint8)
