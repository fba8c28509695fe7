"""``threshold``: codes move by one where an estimate stands out, the rule of the EGGROLL paper's int8 fine-tuning.

With Adam's moments ``m`` and ``v`` of the estimate ``g`` (arXiv 2511.16652v2, appendix on int8 fine-tuning):

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   u = m / sqrt(v)
    z = (u - mean(u)) / std(u), over the whole weight;   code <- code + sign(z) where |z| >= threshold, within its range

Quanta play no part, and neither does a learning rate, since ``z`` has no scale; a rate of 0 moves nothing. Adam's
corrections of the first steps are a factor for all of ``u`` and drop out as well. There is no error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.rounding import rounded
from eggroll.torch.quantized.update import GridRule, load_state, move


class ThresholdUpdater:
    """The steps of one quantized weight by its z-scores.

    Args:
        grid: whose codes are moved.
        rule: its ``threshold`` and ``betas``.

    Attributes:
        first, second: moments ``(m, n)`` bfloat16, as in the paper, rounded with the right mean: rounded to nearest,
            ``v`` could not decay, as 0.999 is closer to 1 than two bfloat16 numbers are to each other.
    """

    def __init__(self, grid: Grid, rule: GridRule) -> None:
        self.grid, self.rule = grid, rule
        self.first = torch.zeros(grid.shape, dtype=torch.bfloat16, device=grid.device)
        self.second = torch.zeros_like(self.first)

    @torch.no_grad()
    def step(self, gradient: Tensor, generation: int) -> float:
        """Take the estimate ``(m, n)`` float32, overwritten. Returns the squared norm of the change of the weights."""
        b1, b2 = self.rule.betas
        second = (gradient * gradient).mul_(1 - b2).add_(self.second, alpha=b2)
        first = gradient.mul_(1 - b1).add_(self.first, alpha=b1)
        u = torch.where(second > 0, first * second.rsqrt(), 0.0)
        self.first.copy_(rounded(first, torch.bfloat16, generation))
        self.second.copy_(rounded(second, torch.bfloat16, generation))
        std, mean = torch.std_mean(u, correction=0)
        z = u.sub_(mean).div_(std + 1e-8)
        moved = torch.where(z.abs() >= self.rule.threshold, z.sign(), 0.0).to(torch.int16)
        quanta, codes = self.grid.quanta(), self.grid.codes().to(torch.int16)
        moved.view(*quanta.shape, -1).masked_fill_((quanta == 0).unsqueeze(-1), 0)
        moved.add_(codes).clamp_(self.grid.low, self.grid.high).sub_(codes)
        return move(self.grid, moved, quanta)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the codes."""
        return {"first_moment": self.first, "second_moment": self.second}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave.

        Raises:
            CheckpointError: a moment is missing.
        """
        load_state(self.state(), tensors)
