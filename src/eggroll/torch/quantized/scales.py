"""``scales``: codes stay, the scales of their groups are moved (QZO, arXiv 2505.13430).

Members multiply scales (and offsets) by ``1 + sigma * E_p`` (:mod:`eggroll.torch.scaled`), so a step ``u`` of the
optimizer is a relative one, for each row and group:

    scale <- scale * (1 + clip(u, -1/2, 1/2)),   and an offset likewise

so a scale keeps its sign, and one that is 0 stays 0. Scores are clipped before the estimate, as in QZO: one that is out
of all proportion would move every scale. Steps are taken on float32 copies, from which the format's own scales are
rounded: in float16, steps below 0.05 % would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.update import load_state

CLIP = 3.0
"""Largest size of a member's shaped fitness, in root mean squares of all members'."""
STEP_LIMIT = 0.5
"""Largest relative step of a scale in one generation."""


def clipped(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shaped fitness ``(N,)`` cut off at :data:`CLIP` root mean squares."""
    limit = CLIP * float(np.sqrt(np.mean(np.square(weights, dtype=np.float64))))
    return np.clip(weights, -limit, limit).astype(np.float32)


class ScalesUpdater:
    """The steps of one quantized weight's scales.

    Args:
        grid: whose scales are moved.

    Attributes:
        scales: ``(m, G)`` float32.
        offsets: likewise, or ``None`` if the format has none.

    Raises:
        UnsupportedOperationError: the format's scales cannot be written.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        scales, offsets = grid.scales()
        self.scales = scales.contiguous()
        self.offsets = None if offsets is None else offsets.contiguous()

    @torch.no_grad()
    def step(self, relative: Tensor) -> float:
        """Take a relative step ``(m, G)`` float32. Returns the squared norm of what the weights changed by."""
        before = self.grid.dequantized()
        factors = relative.clamp(-STEP_LIMIT, STEP_LIMIT).add_(1.0)
        self.scales.mul_(factors)
        if self.offsets is not None:
            self.offsets.mul_(factors)
        self.grid.set_scales(self.scales, self.offsets)
        return float(before.sub_(self.grid.dequantized()).square_().sum())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the codes."""
        return {"scales": self.scales} | ({} if self.offsets is None else {"offsets": self.offsets})

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave, in the format's own scales as well.

        Raises:
            CheckpointError: the scales are missing.
        """
        load_state(self.state(), tensors)
        self.grid.set_scales(self.scales, self.offsets)
