"""Conversations of a population's rows in PyTorch: which member a row belongs to, and turns that go on from caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eggroll.llm.config import EggrollConfig
from eggroll.llm.generation.encode import Encoded
from eggroll.llm.generation.generate import Sampling, generate
from eggroll.llm.generation.memory import Memory
from eggroll.torch import Active


class RowSelection:
    """Keeps track of which member each remaining row belongs to.

    Args:
        active: the members.
        member_of_row: ``(rows,)``.
    """

    def __init__(self, active: Active, member_of_row: Tensor) -> None:
        self.active, self.member_of_row = active, member_of_row

    def __call__(self, keep: Tensor) -> None:
        """Go on with the rows ``keep`` of those that there were."""
        self.member_of_row = self.member_of_row[keep.cpu()]
        self.active.select_rows(self.member_of_row.to(keep.device))


class TurnSpeaker:
    """Lets rows say something, turn by turn: a :class:`~eggroll.llm.worlds.rollout.Speaker`.

    Args:
        evaluator: has the model, the tokenizer and the settings.
        active: the members; ``None`` where one model, the center or a member in its place, speaks in all rows.
        generation: for sampled tokens.
        rows: each row's number in its generation, for sampled tokens.
        prompts: rows of each member.
    """

    def __init__(
        self, evaluator: Any, active: Active | None, generation: int, rows: Sequence[int], prompts: int
    ) -> None:
        self.evaluator, self.active, self.generation, self.numbers = evaluator, active, generation, rows
        self.prompts = prompts
        self.memory = Memory.of(evaluator.model)
        self._selected = False

    def say(self, rows: Sequence[int], ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        """See :class:`~eggroll.llm.worlds.rollout.Speaker`."""
        evaluator, config = self.evaluator, self.evaluator.config
        assert isinstance(config, EggrollConfig)
        pad_id = int(evaluator.tokenizer.pad_token_id or 0)
        padded, mask = Encoded([list(row) for row in ids]).padded(pad_id, left=not evaluator.encoder_decoder)
        padded, mask = evaluator.checked_ids(padded), mask.to(evaluator.device)
        complete = len(rows) == len(self.numbers)
        select = None
        if self.active is not None:
            select = RowSelection(self.active, torch.tensor(rows) // self.prompts)
            if self._selected or not complete:  # rows are no longer the same ones for each member
                self.active.select_rows(select.member_of_row.to(padded.device))
            self._selected = True
        if self.memory is not None:
            self.memory.rows = rows
        alike = complete and turn == 0 and all(
            row == ids[index % self.prompts] for index, row in enumerate(ids)
        )  # fmt: skip
        return generate(
            evaluator.model,
            padded,
            mask,
            max_tokens=config.max_tokens,
            eos_ids=evaluator.eos_ids,
            pad_id=pad_id,
            sampling=Sampling.for_rows(
                config.temperature, config.seed, self.generation, [self.numbers[row] for row in rows], turn
            ),
            select_rows=select,
            prompts=self.prompts if alike else None,
            defaults=evaluator.defaults,
            memory=self.memory,
        )


__all__ = ["RowSelection", "TurnSpeaker"]
