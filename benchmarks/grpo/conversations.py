"""Conversations with a task's world for TRL's GRPO: what its ``rollout_func`` has to return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from eggroll.llm.backends.turns import TurnSpeaker
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import load_examples
from eggroll.llm.measure.answers import Writer
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.tasks import Task
from eggroll.llm.worlds.reward import WorldReward


class Recorder:
    """A speaker that writes down which tokens of each row the model itself has made.

    Args:
        speaker: the one that speaks.
        rows: how many rows there are.
    """

    def __init__(self, speaker: TurnSpeaker, rows: int) -> None:
        self.speaker = speaker
        self.spans: list[list[tuple[int, int]]] = [[] for _ in range(rows)]

    def say(self, rows: Sequence[int], ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        """See ``eggroll.llm.worlds.rollout.Speaker``."""
        made = self.speaker.say(rows, ids, turn)
        for row, before, new in zip(rows, ids, made, strict=True):
            self.spans[row].append((len(before), len(before) + len(new)))
        return made


def conversing(
    loaded: LoadedModel, task: Task, talking: dict[str, Any], max_tokens: int, seed: int
) -> tuple[list[dict[str, str]], Callable[..., list[float]], Callable[..., dict[str, Any]]]:
    """Rows, reward and ``rollout_func`` for a ``GRPOTrainer``.

    A row's prompt is its number: TRL hands ``rollout_func`` nothing else of a row, and a world needs all of it.
    """
    examples = load_examples(task.train)
    config = EggrollConfig(max_tokens=max_tokens, temperature=1.0, seed=seed, **talking)
    writer = Writer(loaded, config, WorldReward(task.world, name=task.name))
    evaluator, calls = writer.evaluator, 0

    @torch.no_grad()
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        batch = [examples[int(prompt)] for prompt in prompts]
        training = loaded.model.training
        loaded.model.eval()
        try:
            recorder = Recorder(TurnSpeaker(evaluator, None, calls, range(len(batch)), len(batch)), len(batch))
            played = evaluator.worlds.stage.play(batch, recorder)
        finally:
            loaded.model.train(training)
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "world_score": []}
        for row, spans in zip(played.rows, recorder.spans, strict=True):
            assert row.failure is None, row.failure
            first, mask = spans[0][0], [0] * len(row.ids)
            for start, end in spans:
                # a text that ended by itself ends in a token that the model has chosen as well
                stop = end + (end - start < max_tokens and end < len(row.ids))
                mask[start:stop] = [1] * (stop - start)
            found["prompt_ids"].append(row.ids[:first])
            found["completion_ids"].append(row.ids[first:])
            found["env_mask"].append(mask[first:])
            found["world_score"].append(row.score)
        return {**found, "logprobs": None}

    def reward(world_score: list[float], **_: Any) -> list[float]:
        return world_score

    return [{"prompt": str(number)} for number in range(len(examples))], reward, rollout


__all__ = ["Recorder", "conversing"]
