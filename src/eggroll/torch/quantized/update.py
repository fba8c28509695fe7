"""Steps on a grid of integers: what is smaller than one quantum is kept until it is a whole one.

``error_feedback`` (QES, arXiv 2602.03120): with the step ``u`` of the optimizer in quanta,

    e <- decay * e + u;   move = round(e), cut off where the code would leave its range;   e <- e - move

so that with ``decay=1`` the moved codes plus the residual are the sum of all steps, and what the residual began with.
That is a random part of a quantum for each weight, as in the authors' program: a sum of steps of a tenth of a quantum
then moves one code in ten. From 0, as in their text, no code would move before its own sum is half a quantum, which
with 4 bits few sums ever are. The residual is stored, or rebuilt from the last ``K`` generations each time
(:mod:`eggroll.torch.quantized.past`). ``nearest`` rounds each step alone, which loses all steps below half a quantum;
it is there to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from eggroll.core.config import ESConfig, QuantizedUpdate, ResidualStart
from eggroll.core.threefry import Key
from eggroll.errors import CheckpointError
from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.rounding import rounded
from eggroll.torch.threefry import random_bits

RESIDUAL_LIMIT = 1.5
"""Quanta that a residual may hold where a code is at the end of its range (QES)."""
MOVE_LIMIT = 255
"""Quanta that any code can move at most: from one end of 8 bits to the other."""

Steps = Callable[[], Iterable[tuple[int, Tensor]]]
"""Gives the steps of earlier generations, oldest first: the generation and ``(m, n)`` float32, to be overwritten."""


@dataclass(frozen=True)
class GridRule:
    """How steps become moves of codes.

    Attributes:
        name: the rule.
        decay: what is left of a residual after each generation; 1 loses nothing.
        start: what a residual begins with: ``uniform`` in [-1/2, 1/2) of a quantum, or ``zero``.
        threshold: of ``threshold``: standard deviations from which an entry moves.
        betas: of ``threshold``: decay of the two moments.
    """

    name: QuantizedUpdate = "error_feedback"
    decay: float = 1.0
    start: ResidualStart = "uniform"
    threshold: float = 2.5
    betas: tuple[float, float] = (0.9, 0.999)

    @classmethod
    def of(cls, config: ESConfig) -> Self:
        """The rule that a configuration names."""
        return cls(
            config.quantized_update, config.residual_decay, config.residual_start, config.move_threshold, config.betas
        )


class GridUpdater:
    """The steps of one quantized weight, by ``error_feedback`` or ``nearest``.

    Args:
        grid: whose codes are moved.
        rule: how steps become moves.
        past: the steps to rebuild the residual from; ``None`` stores it.
        key: of the random numbers that the residual begins with.

    Attributes:
        residual: ``(m, n)`` float16, in quanta; ``None`` if there is none, or if it is rebuilt.
    """

    def __init__(self, grid: Grid, rule: GridRule, past: Steps | None = None, key: Key = (0, 0)) -> None:
        self.grid, self.rule, self.past, self.key = grid, rule, past, key
        self.residual: Tensor | None = None
        if rule.name == "error_feedback" and past is None:
            self.residual = self._first_residual()

    def _no_residual(self) -> Tensor:
        return torch.zeros(self.grid.shape, dtype=torch.float16, device=self.grid.device)

    def _first_residual(self) -> Tensor:
        """What a run begins with: multiples of 2**-11 of a quantum, which float16 holds exactly."""
        residual = self._no_residual()
        if self.rule.start == "zero":
            return residual
        bits = random_bits(np.array([self.key], np.uint32), residual.numel(), device=residual.device)
        return residual.copy_((bits >> 21).view(residual.shape)).mul_(2.0**-11)

    @torch.no_grad()
    def step(self, delta: Tensor, generation: int) -> float:
        """Take a step of the weights. Returns the squared norm of what they changed by.

        Args:
            delta: ``(m, n)`` float32; overwritten.
            generation: decides how the residual is rounded to 16 bits.
        """
        quanta, codes = self.grid.quanta(), self.grid.codes().to(torch.int16)
        residual = self.residual if self.past is None else self._rebuilt(quanta, codes)
        moved = self._advance(residual, delta, quanta, codes, generation)
        return move(self.grid, moved, quanta)

    def _rebuilt(self, quanta: Tensor, codes: Tensor) -> Tensor:
        """The residual after the steps of the past, with moves cut off at the range as seen from today's codes."""
        assert self.past is not None
        residual: Tensor | None = None
        for generation, delta in self.past():
            if residual is None:
                residual = self._no_residual() if generation else self._first_residual()
            self._advance(residual, delta, quanta, codes, generation)
        return self._first_residual() if residual is None else residual

    def _advance(
        self, residual: Tensor | None, delta: Tensor, quanta: Tensor, codes: Tensor, generation: int
    ) -> Tensor:
        """One step of the recursion: ``residual`` is changed in place, ``delta`` overwritten; the moves, int16."""
        wanted = in_quanta_(delta, quanta)
        if residual is not None:
            wanted.add_(residual, alpha=self.rule.decay)
        moved = wanted.round().clamp_(-MOVE_LIMIT, MOVE_LIMIT).to(torch.int16)
        moved.add_(codes).clamp_(self.grid.low, self.grid.high).sub_(codes)
        if residual is not None:
            left = wanted.sub_(moved).clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)
            residual.copy_(rounded(left, residual.dtype, generation))
        return moved

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the codes."""
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave.

        Raises:
            CheckpointError: there is no residual.
        """
        load_state(self.state(), tensors)


def in_quanta_(delta: Tensor, quanta: Tensor) -> Tensor:
    """``delta (m, n)`` divided in place by the quanta ``(m, G)`` of its groups; 0 where nothing can change."""
    divisors = torch.where(quanta == 0, torch.inf, quanta)
    delta.view(*quanta.shape, -1).div_(divisors.unsqueeze(-1))
    return delta


def move(grid: Grid, moved: Tensor, quanta: Tensor) -> float:
    """Add ``moved (m, n)`` int16 to the codes. Returns the squared norm of the change of the weights."""
    if not bool(moved.any()):
        return 0.0
    grid.move(moved)
    by_group = torch.linalg.vector_norm(moved.view(*quanta.shape, -1).float(), dim=-1)
    return float(by_group.mul_(quanta).square_().sum())


def load_state(held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those that are held, by name.

    Raises:
        CheckpointError: one is missing.
    """
    missing = sorted(set(held) - set(tensors))
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {missing[0]} of the quantized weights: it was written with another "
            "setting of quantized_update or residual_generations; use the same as then"
        )
    for name, tensor in held.items():
        tensor.copy_(tensors[name])


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
