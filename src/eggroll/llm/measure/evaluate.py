"""A model's answers to a task's test problems, and what they score: before, after, and the difference.

Answers are made and scored as a run makes and scores those to its held-out prompts, so the figures are comparable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.errors import ConfigError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.batches import batches
from eggroll.llm.data.examples import Example, load_examples
from eggroll.llm.measure.answers import Writer
from eggroll.llm.measure.intervals import Interval, mcnemar, mean_interval, paired_proportions, wilson
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.rewards import FunctionReward, Reward
from eggroll.llm.tasks import SOLVED, Task
from eggroll.llm.worlds.reward import WorldReward

__all__ = ["Comparison", "Result", "compare", "draw_problems", "evaluate", "solved"]

DEFAULT_SAMPLES = 128
Listener = Callable[["Result"], None]


@dataclass
class Result:
    """The answers of one model, in the order of the problems; while it answers, the first of them."""

    scores: list[float] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def right(self) -> int:
        """Answers that are right."""
        return int(np.sum(solved(self.scores)))

    def accuracy(self) -> Interval:
        """The part of the answers that are right."""
        return wilson(self.right, len(self.scores))

    def mean(self, task: Task, *, seed: int) -> Interval:
        """The mean score. Where scores are 0 and 1 only, it is a proportion and has a proportion's interval."""
        if task.best == 1.0 and set(self.scores) <= {0.0, 1.0}:
            return wilson(self.right, len(self.scores))
        return mean_interval(np.asarray(self.scores), 0.0, task.best, seed=seed)


@dataclass(frozen=True)
class Comparison:
    """What changed between two models on the same problems: after minus before.

    Attributes:
        accuracy: difference of the parts that are right, between -1 and 1.
        mean: difference of the mean scores.
        gained: problems that only the second model got right.
        lost: problems that only the first model got right.
        p_value: McNemar's exact test of whether gains and losses are equally likely.
    """

    accuracy: Interval
    mean: Interval
    gained: int
    lost: int
    p_value: float


def draw_problems(task: Task, samples: int | None, seed: int) -> list[Example]:
    """``samples`` of the task's test problems (``None``: 128 or all), chosen and ordered by ``seed``.

    Raises:
        ConfigError: there are fewer.
    """
    rows = task.test or task.heldout
    samples = min(DEFAULT_SAMPLES, len(rows)) if samples is None else samples
    if not 1 <= samples <= len(rows):
        raise ConfigError(f"samples (={samples}) must be from 1 to {len(rows)}, the test problems of {task.name}")
    return batches(load_examples(rows), samples, 0, seed)


def evaluate(
    loaded: LoadedModel,
    task: Task,
    problems: Sequence[Example],
    config: EggrollConfig,
    *,
    batch_size: int = 16,
    listener: Listener | None = None,
) -> Result:
    """Let a model answer problems and score the answers.

    Args:
        loaded: the model and its tokenizer.
        task: gives the reward.
        problems: rows of the task.
        config: ``max_tokens``, ``max_length``, ``temperature``, ``system`` and ``seed`` are used. Sampled answers
            (temperature above 0) depend on the seed and on ``batch_size``, greedy ones on neither.
        batch_size: problems answered together.
        listener: called after each batch with what there is by then.

    Raises:
        RewardError: the reward fails.
    """
    reward: Reward = FunctionReward(task.reward, tokenizer=loaded.tokenizer, name=task.name)
    if task.world is not None:
        reward = WorldReward(task.world, name=task.name)
    writer = Writer(loaded, config, reward)
    result, start = Result(), time.perf_counter()
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        scores = writer.scores(batch, first)
        result.scores += scores.values.tolist()
        result.completions += scores.completions
        result.tokens += scores.tokens
        result.seconds = time.perf_counter() - start
        if listener is not None:
            listener(result)
    return result


def compare(before: Result, after: Result, task: Task, *, seed: int) -> Comparison:
    """The paired difference of two models' answers to the same problems."""
    one, two = solved(before.scores), solved(after.scores)
    gained, lost = int(np.sum(two & ~one)), int(np.sum(one & ~two))
    differences = np.asarray(after.scores) - np.asarray(before.scores)
    accuracy = paired_proportions(one, two)
    zero_one = task.best == 1.0 and {*before.scores, *after.scores} <= {0.0, 1.0}
    mean = accuracy if zero_one else mean_interval(differences, -task.best, task.best, seed=seed)
    return Comparison(accuracy, mean, gained, lost, mcnemar(gained, lost))


def solved(scores: Sequence[float]) -> NDArray[np.bool_]:
    """Which scores are those of right answers ``(n,)``."""
    return np.asarray(scores, dtype=np.float64) >= SOLVED - 1e-9
