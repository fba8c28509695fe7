"""Scores as users give them: tensors or arrays, one for each member, or one for each member and prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eggroll.errors import RewardError


def checked_scores(scores: Any, members: int, asked: str, given: str, hint: str) -> Tensor:
    """Scores as a tensor: the given one without its graph, or a float64 copy of an array.

    Args:
        scores: ``(members,)`` or ``(members, prompts)``.
        members: how many scores are expected.
        asked: beginning of the message: "tell needs".
        given: what comes before the scores in the message: "it got".
        hint: the last sentence of the message.

    Raises:
        RewardError: they have another shape, or are no numbers.
    """
    table = scores.detach() if isinstance(scores, Tensor) else np.asarray(scores)
    is_number = not table.is_complex() if isinstance(table, Tensor) else table.dtype.kind in "fiub"
    if table.ndim not in (1, 2) or len(table) != members or not is_number:
        found = f"{str(table.dtype).removeprefix('torch.')} {tuple(table.shape)}" if table.ndim else repr(scores)
        raise RewardError(
            f"{asked} ({members},) scores, one for each member, or ({members}, prompts); {given} {found}. {hint}"
        )
    if isinstance(table, Tensor):
        return table
    return torch.from_numpy(np.array(table, dtype=np.float64))
