"""Steps on a grid of integers: what is smaller than one quantum is kept until it is a whole one.

``error_feedback`` (QES, arXiv 2602.03120): with the step ``u`` of the optimizer in quanta,

    e <- decay * e + u;   move = round(e), left out where the code would leave its range;   e <- e - move

so that with ``decay=1`` the moved codes plus the residual are the sum of all steps. ``nearest`` rounds each step alone,
which loses nearly all of them; it is there to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eggroll.core.config import QuantizedUpdate
from eggroll.errors import CheckpointError
from eggroll.torch.quantized.grid import Grid, by_group


@dataclass(frozen=True)
class GridRule:
    """How steps become moves of codes.

    Attributes:
        name: ``error_feedback`` or ``nearest``.
        decay: what is left of a residual after each generation; 1 loses nothing.
    """

    name: QuantizedUpdate = "error_feedback"
    decay: float = 1.0


RESIDUAL_LIMIT = 1.5
"""Quanta that a residual may hold where a code is at the end of its range (QES)."""


class GridUpdater:
    """The steps of one quantized weight.

    Args:
        grid: whose codes are moved.
        rule: how steps become moves.

    Attributes:
        residual: ``(m, n)`` float16, in quanta.
    """

    def __init__(self, grid: Grid, rule: GridRule) -> None:
        self.grid, self.rule = grid, rule
        self.residual: Tensor | None = None
        if rule.name == "error_feedback":
            self.residual = torch.zeros(grid.shape, dtype=torch.float16, device=grid.device)

    @torch.no_grad()
    def step(self, delta: Tensor) -> float:
        """Take a step ``delta (m, n)``, float32, of the weights. Returns the squared norm of what they changed by."""
        quanta = by_group(self.grid.quanta(), self.grid.shape[1])
        wanted = torch.where(quanta == 0, 0.0, delta / quanta)
        if self.residual is not None:
            wanted.add_(self.residual, alpha=self.rule.decay)
        codes = self.grid.codes().to(torch.int16)
        moved = wanted.round().clamp_(-255, 255).to(torch.int16)
        moved = (codes + moved).clamp_(self.grid.low, self.grid.high) - codes
        if bool(moved.any()):
            self.grid.move(moved)
        if self.residual is not None:
            self.residual.copy_(wanted.sub_(moved).clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT))
        return float(quanta.mul_(moved).square_().sum())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the codes."""
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave.

        Raises:
            CheckpointError: there is no residual.
        """
        if self.residual is None:
            return
        if "residual" not in tensors:
            raise CheckpointError(
                "the checkpoint has no residual of the quantized weights: it was written with another "
                "setting of quantized_update; use the same as then"
            )
        self.residual.copy_(tensors["residual"])


def delta_of(step: Callable[[Tensor], Any], grid: Grid, *, needs_weights: bool) -> Tensor:
    """The step that an optimizer takes: ``step`` changes a float32 tensor in place.

    Args:
        step: takes one step of the optimizer on the tensor.
        grid: the weight.
        needs_weights: whether the step depends on the weight (decay); then it is unpacked for the length of the call.
    """
    if not needs_weights:
        change = torch.zeros(grid.shape, dtype=torch.float32, device=grid.device)
        step(change)
        return change
    wide = grid.dequantized()
    before = wide.clone()
    step(wide)
    return wide.sub_(before)
