"""The last generations of a run, to rebuild from: what they were told, which with the noise's addresses is their steps.

A residual that decays forgets: after ``K`` generations ``decay**K`` of a step is left. So instead of a number for each
weight, the ``N`` scores of each of the last ``K`` generations are kept, and the residual is computed again from 0 when
a weight is updated (QES, arXiv 2602.03120, with K = 50 and a decay of 0.9).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.errors import CheckpointError

Told = tuple[int, NDArray[np.float32], NDArray[np.float64]]
"""A generation, its ``(N,)`` weights, and the ``(S,)`` learning rates of the parameters."""


class Past:
    """What the last generations were told.

    Args:
        generations: how many are kept.
        names: of the parameters, in the order of their learning rates.
    """

    def __init__(self, generations: int, names: Sequence[str]) -> None:
        self._told: deque[Told] = deque(maxlen=generations)
        self._place = {name: index for index, name in enumerate(names)}

    def add(self, generation: int, weights: NDArray[np.float32], lr: float | Mapping[str, float]) -> None:
        """Keep a generation, and forget the oldest if there are enough."""
        rates = [lr[name] if isinstance(lr, Mapping) else lr for name in self._place]
        self._told.append((generation, np.array(weights, np.float32), np.array(rates, np.float64)))

    def of(self, name: str) -> Iterator[tuple[int, NDArray[np.float32], float]]:
        """Generation, weights and learning rate of a parameter, oldest first."""
        place = self._place[name]
        for generation, weights, rates in self._told:
            yield generation, weights, float(rates[place])

    def state(self) -> dict[str, Tensor]:
        """``generation (k,)``, ``weights (k, N)`` and ``lr (k, S)``; k is 0 at the start."""
        told = list(self._told)
        return {
            "generation": torch.tensor([generation for generation, _, _ in told], dtype=torch.int64),
            "weights": torch.from_numpy(np.array([weights for _, weights, _ in told], np.float32)),
            "lr": torch.from_numpy(np.array([rates for _, _, rates in told], np.float64)),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave.

        Raises:
            CheckpointError: there is none.
        """
        if not {"generation", "weights", "lr"} <= set(tensors):
            raise CheckpointError(
                "the checkpoint has no scores of earlier generations, from which a residual is rebuilt: it was written "
                "with residual_generations=0; use the same as then"
            )
        self._told.clear()
        rows = (tensors[key].cpu().numpy() for key in ("generation", "weights", "lr"))
        for generation, weights, rates in zip(*rows, strict=True):
            self._told.append((int(generation), weights.copy(), rates.copy()))
